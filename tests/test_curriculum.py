"""curriculum.py: weights by hand, and the distribution of what is drawn."""

import random
from collections import Counter

import pytest

from minir1.curriculum import OUTSIDE, draw, weights


def test_weights_by_hand():
    nan = float("nan")
    assert weights([0.0, 0.1, 0.5, 0.9, 1.0, nan], 0.1, 0.9) == [OUTSIDE, 1.0, 1.0, 1.0, OUTSIDE, 1.0]
    assert weights([0.0, 1.0], 0.0, 1.0) == [1.0, 1.0]  # the widest window leaves out nothing


def test_the_first_index_has_the_probability_of_its_weight():
    rng, weight, n = random.Random(0), [1.0, 0.1, 0.5], 20_000
    first = Counter(draw(rng, weight, 1)[0] for _ in range(n))
    for i, w in enumerate(weight):
        p = w / sum(weight)
        assert abs(first[i] / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_pairs_are_drawn_without_replacement():
    """P(i then j) = w_i / W · w_j / (W - w_i)."""
    rng, weight, n = random.Random(1), [1.0, 0.1, 0.5], 20_000
    pairs = Counter(tuple(draw(rng, weight, 2)) for _ in range(n))
    for i in range(3):
        for j in set(range(3)) - {i}:
            p = weight[i] / 1.6 * weight[j] / (1.6 - weight[i])
            assert abs(pairs[i, j] / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_all_of_them_and_more():
    assert sorted(draw(random.Random(0), [0.1] * 5, 5)) == [0, 1, 2, 3, 4]
    assert draw(random.Random(3), [0.1, 1.0] * 5, 4) == draw(random.Random(3), [0.1, 1.0] * 5, 4)
    with pytest.raises(ValueError, match="3 different problems of 2"):
        draw(random.Random(0), [1.0, 1.0], 3)

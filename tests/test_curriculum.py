"""curriculum.py: weights by hand, and the distribution of what is drawn."""

import random
from collections import Counter

import pytest

from minir1.curriculum import OUTSIDE, Curriculum, draw, weights


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


def test_a_curriculum_draws_problems_inside_its_window():
    curriculum = Curriculum(100, (0.1, 0.9))
    curriculum.measured(range(50), [0.0, 1.0] * 25)
    inside = sum(i >= 50 for step in range(200) for i in curriculum.draw(random.Random(step), 10))
    assert 0.85 < inside / 2000 < 0.93  # 50 · 1 / (50 · 1 + 50 · 0.1) = 0.909, less as those run out
    curriculum.measured([50, 60], [float("nan"), 1.0])
    assert curriculum.shares[60] == 1.0 and curriculum.shares[50] != curriculum.shares[50]


def test_without_a_window_problems_are_drawn_as_random_sample_does():
    assert Curriculum(100).draw(random.Random(3), 8) == random.Random(3).sample(range(100), 8)


def test_a_restored_curriculum_draws_the_same():
    one, other = Curriculum(20, (0.2, 0.8)), Curriculum(20, (0.2, 0.8))
    one.measured([3, 4, 5], [0.0, 0.5, 1.0])
    other.load_state_dict(one.state_dict())
    assert one.draw(random.Random(1), 20) == other.draw(random.Random(1), 20)
    one.measured([6], [0.0])
    assert other.shares[6] != 0.0


def test_a_window_upside_down():
    with pytest.raises(ValueError, match="difficulty_window = .*: the lower share comes first"):
        Curriculum(3, (0.9, 0.1))

"""curriculum.py: weights by hand, and the distribution of what is drawn."""

import random
from collections import Counter

import pytest

from minir1.curriculum import OUTSIDE, Curriculum, draw, weights
from minir1.judge import Answer
from minir1.tasks import Problem


def test_weights_by_hand():
    assert weights([0.0, 0.1, 0.5, 0.9, 1.0, None], 0.1, 0.9) == [OUTSIDE, 1.0, 1.0, 1.0, OUTSIDE, 1.0]
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


PROBLEMS = [Problem(str(i), "") for i in range(100)]


def group(*right: bool) -> list[Answer]:
    return [Answer("", 1, False, r, True) for r in right]


def test_a_curriculum_draws_problems_inside_its_window():
    curriculum = Curriculum(PROBLEMS, (0.1, 0.9))
    curriculum.measured(PROBLEMS[:50], [group(False, False), group(True, True)] * 25)
    drawn = [int(p.prompt) for step in range(200) for p in curriculum.draw(random.Random(step), 10)]
    assert 0.85 < sum(i >= 50 for i in drawn) / 2000 < 0.93  # 50 / (50 + 50 · 0.1) = 0.909, less as those run out


def test_copies_of_a_problem_share_what_was_measured():
    """Each of four copies of a solved problem has weight 0.1 then, the other problem 1."""
    curriculum = Curriculum([PROBLEMS[0]] * 4 + [PROBLEMS[1]], (0.1, 0.9))
    curriculum.measured(PROBLEMS[:1], [group(True, True)])
    drawn = [curriculum.draw(random.Random(step), 1)[0] for step in range(1000)]
    assert 0.65 < sum(problem == PROBLEMS[1] for problem in drawn) / 1000 < 0.78  # 1 / 1.4 = 0.714


def test_unjudged_answers_measure_nothing():
    unjudged = Answer("", 1, False, False, True, unjudged=True)
    curriculum = Curriculum(PROBLEMS, (0.1, 0.9))
    curriculum.measured(PROBLEMS[3:5], [[unjudged] * 2, [unjudged, *group(True, True, False)]])
    assert curriculum.shares == {4: pytest.approx(2 / 3)}


def test_the_share_inside_the_window_is_reported():
    curriculum = Curriculum(PROBLEMS, (0.1, 0.9))
    curriculum.measured(PROBLEMS[:4], [group(False), group(True, False), group(True), group(True, True, False)])
    assert curriculum.metrics() == {"train/inside_window": 0.5} and Curriculum(PROBLEMS).metrics() == {}


def test_without_a_window_problems_are_drawn_as_random_sample_does():
    assert Curriculum(PROBLEMS).draw(random.Random(3), 8) == random.Random(3).sample(PROBLEMS, 8)


def test_a_restored_curriculum_draws_the_same():
    one, other = Curriculum(PROBLEMS, (0.2, 0.8)), Curriculum(PROBLEMS, (0.2, 0.8))
    one.measured(PROBLEMS[:3], [group(False), group(True, False), group(True)])
    other.load_state_dict(one.state_dict())
    assert one.draw(random.Random(1), 20) == other.draw(random.Random(1), 20)
    one.measured(PROBLEMS[6:7], [group(True)])
    assert 6 not in other.shares

"""metrics.py: numbers worked by hand, enumeration, and the coverage of the intervals."""

from itertools import combinations

import numpy as np
import pytest

from minir1.metrics import (
    auc,
    auc_within,
    bootstrap,
    calibration,
    maj_at_k,
    majority,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    pass_at_k,
    seed_interval,
    share_interval,
    with_interval,
)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)  # 1 - C(3,3)/C(5,3) = 1 - 1/10
    assert pass_at_k(5, 3, 3) == 1.0  # only two are wrong
    assert pass_at_k(5, 0, 5) == 0.0


def test_pass_at_k_takes_counts_alone():
    with pytest.raises(ValueError, match="must be integers, not int64 and float64"):
        pass_at_k(4, 1.5, 2)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)


def test_pass_at_k_over_problems_and_large_numbers():
    assert pass_at_k([4, 5, 5], [1, 2, 0], 2) == pytest.approx([0.5, 0.7, 0.0])
    assert pass_at_k(16, np.array([0, 4, 16]), 1) == pytest.approx([0, 0.25, 1])
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), ([8, 4], [1, 1], 5)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_majority():
    assert majority(["7", "7", "8"], [True, True, False]) == 1.0
    assert majority(["7", "8", "8"], [True, False, False]) == 0.0
    assert majority(["7", "8"], [True, False]) == 0.5
    assert majority(["7", "8", "9"], [False, True, False]) == pytest.approx(1 / 3)
    assert majority(["7", "7.0", "8", "8"], [True, True, False, False]) == 0.0  # compares texts
    assert majority([None, None, "7"], [False, False, True]) == 1.0  # no answer has no vote
    assert majority([None, None], [False, False]) == 0.0
    assert majority([], []) == 0.0
    assert majority(["7", "7", "8"], [True, False, False]) == 0.5  # one of the two 7s is malformed
    with pytest.raises(ValueError, match="2 answers but 1"):
        majority(["7", "8"], [True])


def test_maj_at_k_takes_disjoint_groups():
    answers = ["7", "7", "8", "8", "8", None, "7"]
    right = [answer == "7" for answer in answers]
    assert maj_at_k(answers, right, 3) == 0.5  # 7 7 8 right, 8 8 None wrong, the last left out
    assert maj_at_k(answers, right, 1) == pytest.approx(3 / 7)
    assert maj_at_k(answers, right, 7) == 0.5  # three against three
    with pytest.raises(ValueError, match="8"):
        maj_at_k(answers, right, 8)
    with pytest.raises(ValueError, match="verdicts"):
        maj_at_k(answers, right[:-1], 1)


def test_bootstrap_matches_the_normal_interval():
    values = np.random.default_rng(1).normal(0.3, 1.0, size=400)
    mean, low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.015)
    assert bootstrap(values) == (mean, low, high) != bootstrap(values, seed=1)
    narrow = bootstrap(values, level=0.5)
    assert low < narrow[1] < narrow[2] < high


def test_bootstrap_covers():
    draw = np.random.default_rng(0)
    trials = [bootstrap(draw.random(60) < 0.3, resamples=200) for _ in range(200)]
    assert 0.89 <= np.mean([low <= 0.3 <= high for _, low, high in trials]) <= 0.99


def test_bootstrap_edges():
    assert bootstrap([0.5]) == (0.5, 0.5, 0.5)
    for bad in ([], [[0.1, 0.2]], [0.1, np.nan]):
        with pytest.raises(ValueError):
            bootstrap(bad)
    with pytest.raises(ValueError, match="level is 95"):
        bootstrap([0.1, 0.2], level=95)


def test_paired_bootstrap_cancels_the_hardness_of_problems():
    draw = np.random.default_rng(2)
    hardness = draw.random(200)
    a, b = hardness + 0.05, hardness + draw.normal(0, 0.05, 200)
    mean, low, high = paired_bootstrap(a, b)
    assert mean == pytest.approx((a - b).mean()) and 0 < low < 0.05 < high
    assert bootstrap(a)[1] < bootstrap(b)[2]  # the separate intervals overlap
    assert paired_bootstrap(a, a) == (0, 0, 0)
    with pytest.raises(ValueError, match="same problems"):
        paired_bootstrap(a, b[:-1])


def test_seed_interval_by_hand():
    # s = 0.1, n = 3: 4.303 · 0.1 / √3 = 0.24843
    assert seed_interval([0.4, 0.5, 0.6]) == pytest.approx((0.5, 0.5 - 0.24843, 0.5 + 0.24843), abs=1e-4)
    # s² = 10/4 for 1..5: 2.776 · √2.5 / √5 = 1.96293
    assert seed_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - 1.96293, 3 + 1.96293), abs=1e-4)
    mean, low, high = seed_interval(list(range(40)))
    assert low < mean == 19.5 < high
    with pytest.raises(ValueError, match="at least 3 seeds"):
        seed_interval([0.1, 0.2])


@pytest.mark.parametrize("n", [3, 10])
def test_seed_interval_covers(n):
    draws = np.random.default_rng(n).normal(size=(2000, n))
    covered = np.mean([low <= 0 <= high for _, low, high in map(seed_interval, draws)])
    assert covered == pytest.approx(0.95, abs=0.015)  # 3 deviations of √(0.95 · 0.05 / 2000)


def test_intervals_as_text():
    assert with_interval(0.842, 0.801, 0.883) == "84.2% [80.1, 88.3]"
    assert with_interval(1.5, -1.0, 4.0, "+.1f") == "+1.5 [-1.0, +4.0]"
    assert over_seeds([0.78, 0.80, 0.82]) == "80.0% [75.0, 85.0]"  # ± 4.303·2/√3
    assert over_seeds([0.5, 0.6]) == "55.0%"  # no interval of two
    assert over_seeds([0.9, 1.0, 0.95]) == "95.0% [82.6, 100.0]"
    assert over_seeds([0.0, 0.0, 0.3]).startswith("10.0% [0.0, ")
    assert over_seeds([0.0, 0.1, 0.8], ".2f").startswith("0.30 [-0.78, ")  # no share
    assert over_seeds([0.0, 0.1, 0.8], ".2f", least=0).startswith("0.30 [0.00, ")


def test_mcnemar_by_hand():
    """Five problems that one solves alone, one that the other does: p = 2 (C(6,0) + C(6,1)) / 2^6 = 14/64."""
    a, b = [True] * 5 + [False] + [True, False], [False] * 5 + [True] + [True, False]
    assert mcnemar(a, b) == (5, 1, pytest.approx(14 / 64)) and mcnemar(b, a) == (1, 5, pytest.approx(14 / 64))
    assert mcnemar([True, False], [True, False]) == (0, 0, 1.0)
    assert mcnemar([True] * 2000, [False] * 2000)[2] < 1e-300  # no overflow
    assert mcnemar(np.ones(100) > 0, np.zeros(100) > 0) == mcnemar([True] * 100, [False] * 100)
    with pytest.raises(ValueError, match="must hold the same problems, got 1 and 2"):
        mcnemar([True], [True, False])


def test_mcnemar_rejects_equal_policies_at_most_as_often_as_it_says():
    rng = np.random.default_rng(0)
    ps = [mcnemar(*(rng.random((2, 60)) < 0.5))[2] for _ in range(400)]
    assert np.mean(np.array(ps) <= 0.05) <= 0.07


def test_a_share_of_all_or_none_is_no_certainty():
    """0.025^(1/3) = 0.2924, and between the ends the bootstrap."""
    assert share_interval([1.0] * 3) == (1.0, pytest.approx(0.2924, abs=1e-4), 1.0)
    assert share_interval([0.0] * 3) == (0.0, 0.0, pytest.approx(0.7076, abs=1e-4))
    assert share_interval([0.0] * 3000)[2] == pytest.approx(3.689 / 3000, rel=1e-3)  # -ln 0.025 = 3.689
    assert share_interval([0.0, 1.0, 1.0], seed=4) == bootstrap([0.0, 1.0, 1.0], seed=4)


def test_auc_by_hand_and_by_pairs():
    assert auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert auc([1, 1, 1], [True, False, True]) == 0.5  # ties
    assert auc([3, 2, 1], [True, True, False]) == 1.0 and auc([1, 2, 3], [True, True, False]) == 0.0
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 5, 40), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[right] for b in scores[~right]]
    assert auc(scores, right) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc([1, 2], [True, True]))
    for scores, right in (([1, np.nan], [True, False]), ([1], [True, False])):
        with pytest.raises(ValueError, match="without NaN"):
            auc(scores, right)


def test_auc_within_groups_by_hand():
    scores, right = [0.9, 0.1, 0.2, 0.8, 0.5], [True, False, True, False, True]
    assert auc_within(scores, right, [*"aabbb"]) == pytest.approx((1 * 1.0 + 2 * 0.0) / 3)  # b: 0.2 and 0.5 below 0.8
    assert auc_within(scores, right, [*"aaaaa"]) == pytest.approx(auc(scores, right))
    assert np.isnan(auc_within(scores, right, [*"abcde"]))


def test_calibration_by_hand():
    found = calibration([0.1, 0.15, 0.9, 1.0], [False, True, True, True], bins=2)
    assert found == {0: (2, 0.125, 0.5), 1: (2, 0.95, 1.0)}
    assert calibration([0.5], [True]) == {5: (1, 0.5, 1.0)}
    with pytest.raises(ValueError, match="in 0 … 1"):
        calibration([1.2], [True])

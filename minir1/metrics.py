"""How good is a policy, and how sure are we: pass@k, maj@k, and intervals over problems and seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

# The 97.5 % quantile of Student's t for 2, 3, … 20 degrees of freedom (any statistics book).
T_QUANTILE = (
    *(4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201),
    *(2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


def pass_at_k(n, c, k: int) -> np.ndarray:
    """The chance that one of k samples is right, estimated without bias from c right ones among n.

        pass@k = 1 - C(n - c, k) / C(n, k)

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1; computed as
    1 - Π_{j<k} (n - c - j) / (n - j), which neither overflows nor cancels.

    n, c: integers, or arrays of them [P] (one entry per problem) -> float64 [P].
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    n, c = np.broadcast_arrays(n, c)
    if not (np.issubdtype(n.dtype, np.integer) and np.issubdtype(c.dtype, np.integer)):
        raise ValueError(f"n and c must be integers, not {n.dtype} and {c.dtype}")
    if np.any(c < 0) or np.any(c > n):
        raise ValueError(f"need 0 <= c <= n for every problem, got c={c.tolist()} of n={n.tolist()}")
    if k < 1 or np.any(n < k):
        raise ValueError(f"k is {k}; allowed is 1 to the fewest samples of a problem, {n.min()}")
    all_wrong = np.ones(n.shape)
    for j in range(k):
        all_wrong *= np.maximum(n - c - j, 0) / (n - j)
    return 1.0 - all_wrong


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """The chance that the most frequent answer is right, a tie broken by a fair draw; in [0, 1].

    `answers` are the final answers to one problem and `right` their verdicts. None is no answer and has no vote;
    without votes the result is 0. Where equal answers have unequal verdicts (a malformed text with the right number,
    say), one of their texts is drawn as well. Raises ValueError if the lengths differ.
    """
    if len(answers) != len(right):
        raise ValueError(f"{len(answers)} answers but {len(right)} verdicts")
    votes = Counter(answer for answer in answers if answer is not None)
    good = Counter(answer for answer, ok in zip(answers, right) if answer is not None and ok)
    winners = [answer for answer in votes if votes[answer] == max(votes.values())]
    return sum(good[answer] / votes[answer] for answer in winners) / max(1, len(winners))


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """maj@k of one problem from n >= k samples: the mean of `majority` over the n // k disjoint groups of k.

        maj@k = P(argmax_a Σ_{i<=k} 1[a_i = a] is right)

    Self-consistency, Wang et al. 2022 (cons@64 in DeepSeek-R1). The last n mod k samples are left out.
    Raises ValueError unless 1 <= k <= n.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; allowed is 1 to the number of samples, {n}")
    if n != len(right):
        raise ValueError(f"{n} answers but {len(right)} verdicts")
    starts = range(0, n - k + 1, k)
    return sum(majority(answers[start : start + k], right[start : start + k]) for start in starts) / len(starts)


def bootstrap(
    values_per_problem, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high): the mean over problems and its percentile bootstrap interval.

        [q_0.025, q_0.975] of x̄* = 1/P Σ_p x_{i_p},  i_p drawn with replacement from the P problems  (at level 0.95)

    Problems are redrawn (Efron 1979), since they, not the samples of one, are the independent draws.
    values_per_problem: floats [P], for example each problem's pass@1. Equal values give a point, however few.
    Raises ValueError for no values, a shape other than [P], or a value that is not finite.
    """
    values = np.asarray(values_per_problem, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"need finite values of shape [P], P >= 1; got shape {values.shape}: {values}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; allowed is between 0 and 1")
    draw, P = np.random.default_rng(seed), values.size
    blocks = [min(20, resamples - done) for done in range(0, resamples, 20)]  # vectorised, yet within the cache
    means = np.concatenate([values[draw.integers(P, size=(count, P))].mean(1) for count in blocks])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def share_interval(shares, *, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of shares in 0 … 1, one per problem, float [P]: as `bootstrap`, but never a certainty.

    Where all P are 0, or all 1, the bootstrap redraws the same again and gives a point. The exact interval (Clopper and
    Pearson 1934) then ends at the share at which P equal results have a probability of 2.5 %: 0.025^(1/P) below ones,
    1 - 0.025^(1/P) above zeros.
    """
    P, (mean, low, high) = len(shares), bootstrap(shares, seed=seed)
    if mean in (0, 1):
        low, high = (0.025 ** (1 / P), 1.0) if mean else (0.0, 1 - 0.025 ** (1 / P))
    return mean, low, high


def paired_bootstrap(a, b, *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of a - b on the same problems: floats [P] each, entry p of both the same problem.

    Much narrower than two separate intervals, since what makes a problem hard cancels. The difference is significant at
    1 - level if the interval excludes 0.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"the two must hold the same problems, got shapes {a.shape} and {b.shape}")
    return bootstrap(a - b, seed=seed, resamples=resamples, level=level)


def auc(scores, right) -> float:
    """The chance that a right one of two answers, one right and one wrong, has the higher score; ties count half.

    The area under the ROC curve, by ranks (Mann and Whitney 1947). scores: floats [N]; right: bools [N]. NaN unless
    both kinds are there.
    """
    scores, right = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool)
    if scores.shape != right.shape or scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(f"scores of shape {scores.shape}, right of {right.shape}: [N] both, without NaN")
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[inverse]  # from 1, the mean over ties
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        return float("nan")
    return float((rank[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_within(scores, right, groups) -> float:
    """As `auc`, of pairs of answers in the same group alone, such as those to one problem. NaN without such pairs.

    groups: [N], of any values. A score that only knows how hard a problem is has 0.5.
    """
    scores, right, groups = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool), np.asarray(groups)
    wins = pairs = 0.0
    for group in np.unique(groups):
        of = groups == group
        count = int(right[of].sum()) * int((~right[of]).sum())
        if count:
            wins, pairs = wins + count * auc(scores[of], right[of]), pairs + count
    return wins / pairs if pairs else float("nan")


def calibration(confidence, right, bins: int = 10) -> dict[int, tuple[int, float, float]]:
    """Bin -> (count, mean confidence, share right) of answers; bins of equal width in 0 … 1, empty ones left out.

    confidence: floats [N] in 0 … 1; right: bools [N]. Σ count/N · |confidence - share| is the expected calibration
    error (arXiv:1706.04599, equation 3).
    """
    confidence, right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    if confidence.shape != right.shape or not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidence of shape {confidence.shape}, right of {right.shape}: [N] both, in 0 … 1")
    of = np.minimum((confidence * bins).astype(int), bins - 1)
    means = lambda b: (int((of == b).sum()), float(confidence[of == b].mean()), float(right[of == b].mean()))
    return {int(b): means(b) for b in np.unique(of)}


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int, float]:
    """(only a, only b, p): problems that one solves and the other does not, and the exact two-sided test of equality.

        p = min(1, 2 · Σ_{i <= min(only a, only b)} C(m, i) / 2^m),  m = only a + only b

    McNemar 1947: problems that both or neither solve say nothing about the difference. a, b: whether each problem is
    solved, the same problems in the same order. ValueError if the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"the two must hold the same problems, got {len(a)} and {len(b)}")
    pairs = [(bool(x), bool(y)) for x, y in zip(a, b)]  # numpy's would overflow in 2^m
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    m = only_a + only_b
    tail = sum(math.comb(m, i) for i in range(min(only_a, only_b) + 1))
    return only_a, only_b, min(1.0, 2 * tail / 2**m)


def seed_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean over seeds and its 95 % interval.

        mean ± t_{0.975, n-1} · s / √n      (Student 1908; s with n - 1)

    Beyond 21 seeds the quantile of 21 is used, which is slightly too wide.
    Raises ValueError for fewer than three values, or one that is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size < 3 or not np.isfinite(x).all():
        raise ValueError(f"need finite results of at least 3 seeds, got {values!r}")
    quantile = T_QUANTILE[min(x.size - 3, len(T_QUANTILE) - 1)]
    half = quantile * x.std(ddof=1) / np.sqrt(x.size)
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def with_interval(mean: float, low: float, high: float, form: str = ".1%") -> str:
    """84.2% [80.1, 88.3]"""
    return f"{mean:{form}} [{f'{low:{form}}'.rstrip('%')}, {f'{high:{form}}'.rstrip('%')}]"


def over_seeds(values: Sequence[float], form: str = ".1%", least: float = -np.inf, most: float = np.inf) -> str:
    """The mean over seeds and, from three on, its interval (`seed_interval`).

    The interval is clipped to what is possible: 0 … 1 for a share (a form in %), least … most for other quantities.
    """
    if len(values) < 3:
        return f"{sum(values) / len(values):{form}}"
    mean, low, high = seed_interval(values)
    return with_interval(mean, *np.clip((low, high), *((0, 1) if form.endswith("%") else (least, most))), form)

"""How good is a policy, and how sure are we: pass@k, maj@k, and intervals over problems and seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minir1 import rewards
from minir1.model.transformer import Transformer
from minir1.rollout import BUDGET, EOS, answers_of, collect
from minir1.tasks import Problem, Verdict
from minir1.tokenizer import Tokenizer

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

    n, c: integers, or arrays of them [P] (one entry a problem) -> float64 [P].
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    n, c = np.broadcast_arrays(np.asarray(n, dtype=np.int64), np.asarray(c, dtype=np.int64))
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

    `answers` are the final answers to one problem and `right` their verdicts. None is no answer:
    it has no vote, and if nobody answers the result is 0. Where equal answers have unequal verdicts
    (a malformed text with the right number, say), one of their texts is drawn as well.
    Raises ValueError when the lengths differ.
    """
    if len(answers) != len(right):
        raise ValueError(f"{len(answers)} answers but {len(right)} verdicts")
    votes = Counter(answer for answer in answers if answer is not None)
    good = Counter(answer for answer, ok in zip(answers, right) if answer is not None and ok)
    winners = [answer for answer in votes if votes[answer] == max(votes.values())]
    return sum(good[answer] / votes[answer] for answer in winners) / max(1, len(winners))


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """maj@k of one problem from n >= k samples: the mean of `majority` over the n // k disjoint groups of k.

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

    Problems are redrawn with replacement (Efron 1979), for they, not the samples of one, are the
    independent draws. values_per_problem: floats [P], for example each problem's pass@1. Where all
    values are equal the interval is a point, however few they are.
    Raises ValueError for no values, a shape other than [P], or a value that is not finite.
    """
    values = np.asarray(values_per_problem, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"need finite values of shape [P], P >= 1; got shape {values.shape}: {values}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; allowed is between 0 and 1")
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(values.size, size=values.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def paired_bootstrap(a, b, *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of a - b on the same problems: floats [P] each, entry p of both the same problem.

    Much narrower than two separate intervals, since what makes a problem hard cancels. The
    difference is significant at 1 - level where the interval leaves out 0.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"the two must hold the same problems, got shapes {a.shape} and {b.shape}")
    return bootstrap(a - b, seed=seed, resamples=resamples, level=level)


def seed_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean over seeds and its 95 % interval.

        mean ± t_{0.975, n-1} · s / √n      (Student 1908; s with n - 1)

    Past 21 seeds the quantile of 21 is used, which is slightly too wide.
    Raises ValueError for fewer than three values, of which no claim is made, or one that is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size < 3 or not np.isfinite(x).all():
        raise ValueError(f"need finite results of at least 3 seeds, got {values!r}")
    quantile = T_QUANTILE[min(x.size - 3, len(T_QUANTILE) - 1)]
    half = quantile * x.std(ddof=1) / np.sqrt(x.size)
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


# ---- sampling answers and counting what they do ----------------------------------------------

NO_THINK = "<think></think><answer>"  # an empty thinking, as R1 is made to answer at once


@dataclass(frozen=True)
class Answer:
    """One sampled answer to one problem."""

    text: str  # with the forced beginning, if any, and without the end token
    tokens: int  # sampled, the end token included
    truncated: bool  # the budget ended it
    right: bool
    form: bool
    entropy: float = 0.0  # mean over its tokens, nats
    unjudged: bool = False  # the verifier itself failed: not right, but not known to be wrong either


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    verify: Callable[..., Verdict],
    *,
    answers: int,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    forced: str = "",
    rows: int = 1024,
) -> list[list[Answer]]:
    """`answers` judged answers to each problem, at most `rows` rows at a time. ValueError for no problems.

    forced: what every answer begins with, such as NO_THINK; an empty thinking is then no fault of form. temperature 0
    is greedy.
    """
    if not problems:
        raise ValueError("problems: need at least one")
    judged = []
    at_once = max(1, rows // max(1, answers))
    for start in range(0, len(problems), at_once):
        part = problems[start : start + at_once]
        prompts = [tokenizer.encode(tokenizer.chat(p.prompt) + forced) for p in part]
        ids = torch.arange(start * answers, (start + len(part)) * answers)
        sampling = {"answers": answers, "max_tokens": max_tokens, "temperature": temperature, "seed": seed, "rows": ids}
        rollout = collect(model, prompts, stop=tokenizer.eos, **sampling)
        judged += judge_rollout(rollout, tokenizer, part, verify, forced)
    return judged


def judge_rollout(rollout, tokenizer, problems, verify, forced: str = "") -> list[list[Answer]]:
    """The answers of a rollout, [P][G], judged by `verify(problem, text)`.

    Where the answers were forced to begin with an empty thinking, it is told so: `allow_empty_think=True`.
    """
    tokens = answers_of(rollout)
    spread = (rollout.entropy.sum(1) / rollout.mask.sum(1).clamp(min=1)).tolist()
    grid: list[list[Answer]] = [[] for _ in problems]
    for row, p, stop, nats in zip(tokens, rollout.group.tolist(), rollout.stop.tolist(), spread):
        text = forced + tokenizer.decode(row[:-1] if stop == EOS else row)  # a PAD amid the answer stays visible
        verdict = verify(problems[p], text, **({"allow_empty_think": True} if forced else {}))
        right, unjudged = verdict.status == "right", verdict.status == "unjudged"
        form = verdict.scores.get("form", 0.0) > 0
        grid[p].append(Answer(text, len(row), stop == BUDGET, right, form, nats, unjudged))
    return grid


def summary(problems: Sequence[Problem], grid: list[list[Answer]], behaviour=None, seed: int = 0) -> dict[str, float]:
    """Flat figures over P problems with n answers each, with bootstrap intervals over problems for pass@1.

    pass@1 and pass@1_low, _high; pass@n and maj@n (unless n = 1); form; pass@1_formed (among well-formed answers);
    length (tokens); truncated; unjudged; entropy; and, given the task's `behaviour(problem, text)`: tries, said_yes,
    false_yes (share of the answers that claim a success that is none), arithmetic_error (of the sums), repeats (of the
    tries).
    Raises ValueError for no problems.
    """
    if not grid:
        raise ValueError("no problems, nothing to sum up")
    n = len(grid[0])
    right = np.array([[a.right for a in row] for row in grid], dtype=float)
    mean, low, high = bootstrap(right.mean(1), seed=seed)
    flat = [a for row in grid for a in row]
    formed = [a.right for a in flat if a.form]
    values = {"pass@1": mean, "pass@1_low": low, "pass@1_high": high}
    if n > 1:
        values[f"pass@{n}"] = float(pass_at_k(n, right.sum(1).astype(int), n).mean())
        votes = [[final_answer(a.text) for a in row] for row in grid]
        values[f"maj@{n}"] = float(np.mean([maj_at_k(v, [a.right for a in row], n) for v, row in zip(votes, grid)]))
    values |= {
        "form": float(np.mean([a.form for a in flat])),
        "pass@1_formed": float(np.mean(formed)) if formed else 0.0,
        "length": float(np.mean([a.tokens for a in flat])),
        "truncated": float(np.mean([a.truncated for a in flat])),
        "unjudged": float(np.mean([a.unjudged for a in flat])),
        "entropy": float(np.mean([a.entropy for a in flat])),
    }
    return values | (habits(problems, grid, behaviour) if behaviour else {})


def habits(problems: Sequence[Problem], grid: list[list[Answer]], behaviour) -> dict[str, float]:
    """What the thinking does, averaged over answers: see `summary`."""
    counts = [behaviour(problem, a.text) for problem, row in zip(problems, grid) for a in row]

    def total(key: str) -> int:
        return sum(c[key] for c in counts)

    return {
        "tries": total("tries") / len(counts),
        "said_yes": total("said_yes") / len(counts),
        "false_yes": sum(c["false_yes"] > 0 for c in counts) / len(counts),
        "arithmetic_error": total("arithmetic_errors") / max(1, total("steps")),
        "repeats": total("repeats") / max(1, total("tries")),
    }


def final_answer(text: str) -> str | None:
    """What a majority vote compares: the answer without white space."""
    found = rewards.answer(text)
    return None if found is None else "".join(found.split())

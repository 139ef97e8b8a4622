"""Answers sampled to a task's problems, judged by its verifier, and summed up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minir1 import rewards
from minir1.metrics import bootstrap, maj_at_k, pass_at_k
from minir1.model.transformer import Transformer
from minir1.rollout import BUDGET, EOS, answers_of, collect
from minir1.tasks import Problem, Verdict
from minir1.tokenizer import Tokenizer

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

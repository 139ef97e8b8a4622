"""Answers sampled to a task's problems, judged by its verifier, and summed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minir1 import rewards, templates
from minir1.log import progress
from minir1.metrics import bootstrap, maj_at_k, paired_bootstrap, pass_at_k
from minir1.model.transformer import Transformer
from minir1.rollout import BUDGET, Rollout, answers_of, collect
from minir1.tasks import Problem, Task
from minir1.tokenizer import Tokenizer

NO_THINK = "<think></think><answer>"  # empty thinking: the model must answer at once


@dataclass(frozen=True)
class Answer:
    """One sampled answer to one problem."""

    text: str  # with what the template opened and the forced beginning, if any; without the end token
    tokens: int  # sampled, the end token included
    truncated: bool  # ended by the token budget
    right: bool
    format: bool  # earns the format reward
    entropy: float = 0.0  # mean over its tokens, nats
    unjudged: bool = False  # the verifier itself failed: not right, but not known to be wrong either


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    *,
    answers: int,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    template: str = "chat",
    forced: str = "",
    rows_at_once: int = 512,
    label: str = "",
) -> list[list[Answer]]:
    """`answers` judged answers to each problem: [P][answers].

    Temperature 0 is greedy. Every answer begins with `forced` and continues from there (NO_THINK measures what the
    weights know without thinking). At most `rows_at_once` answers are drawn together; the result does not depend on
    it, since each row has its own noise. With a label, a progress bar counts the problems.
    """
    step = max(1, rows_at_once // max(1, answers))
    grid = []
    with progress(len(problems), label) as advance:
        for start in range(0, len(problems), step):
            part = problems[start : start + step]
            rollout = collect(
                model,
                templates.encode(tokenizer, part, template, forced),
                answers=answers,
                max_tokens=max_tokens,
                temperature=temperature,
                stop=tokenizer.stops,
                seed=seed,
                rows=torch.arange(start * answers, (start + len(part)) * answers),
            )
            grid += judge_rollout(rollout, tokenizer, task, part, template, forced)
            advance(len(part))
    return grid


def judge_rollout(
    rollout: Rollout,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    template: str = "chat",
    forced: str = "",
) -> list[list[Answer]]:
    """The answers of a rollout to `problems`, judged: [P][G]. Empty thinking is well formed only if it was forced."""
    entropy = (rollout.entropy.sum(1) / rollout.mask.sum(1).clamp(min=1)).tolist()
    begun = [templates.begun(templates.prompt(tokenizer, p.prompt, template), forced) for p in problems]
    grid: list[list[Answer]] = [[] for _ in problems]
    for row, p, stop, nats in zip(answers_of(rollout), rollout.group.tolist(), rollout.stop.tolist(), entropy):
        text = begun[p] + tokenizer.decode(row if stop == BUDGET else row[:-1])  # a PAD inside the answer stays visible
        status = task.verify(problems[p], text).status
        formed = rewards.format_reward(text, allow_empty_think=bool(forced) or "</think>" in begun[p]) > 0
        grid[p].append(Answer(text, len(row), stop == BUDGET, status == "right", formed, nats, status == "unjudged"))
    return grid


def unjudged_to_mean(rewards: Tensor, answers: list[list[Answer]]) -> Tensor:
    """An answer whose verifier failed gets the mean reward of the judged ones of its group, so that it is neither
    praised nor blamed; rewards: fp32 [P, G]. If none of a group was judged, all keep the reward of a wrong answer."""
    judged = torch.tensor([[not a.unjudged for a in group] for group in answers])
    mean = (rewards * judged).sum(1, keepdim=True) / judged.sum(1, keepdim=True).clamp(min=1)
    return torch.where(judged | ~judged.any(1, keepdim=True), rewards, mean)


def rights(grid: list[list[Answer]]) -> np.ndarray:
    """The share of right answers of each problem, float64 [P]."""
    return np.array([[a.right for a in row] for row in grid], dtype=float).mean(1)


def summary(task: Task, problems: Sequence[Problem], grid: list[list[Answer]], seed: int = 0) -> dict[str, float]:
    """Flat figures over P problems with n answers each; bootstrap intervals over problems for pass@1.

    pass@1 and pass@1_low, _high; pass@n and maj@n (unless n = 1); format; pass@1_formed (among well-formed answers);
    length (tokens); truncated; unjudged; entropy; and what the task counts in the thinking (`behaviour`).
    ValueError for no problems.
    """
    if not grid:
        raise ValueError("no problems, nothing to sum up")
    n = len(grid[0])
    right = np.array([[a.right for a in row] for row in grid], dtype=float)
    mean, low, high = bootstrap(right.mean(1), seed=seed)
    flat = [a for row in grid for a in row]
    formed = [a.right for a in flat if a.format]
    values = {"pass@1": mean, "pass@1_low": low, "pass@1_high": high}
    if n > 1:
        values[f"pass@{n}"] = float(pass_at_k(n, right.sum(1).astype(int), n).mean())
        votes = [[task.final(problem, a.text) for a in row] for problem, row in zip(problems, grid)]
        values[f"maj@{n}"] = float(np.mean([maj_at_k(v, [a.right for a in row], n) for v, row in zip(votes, grid)]))
    values |= {
        "format": float(np.mean([a.format for a in flat])),
        "pass@1_formed": float(np.mean(formed)) if formed else 0.0,
        "length": float(np.mean([a.tokens for a in flat])),
        "truncated": float(np.mean([a.truncated for a in flat])),
        "unjudged": float(np.mean([a.unjudged for a in flat])),
        "entropy": float(np.mean([a.entropy for a in flat])),
    }
    counts = behaviour(task, problems, grid)
    if taken := sorted(counts.keys() & values.keys()):
        raise ValueError(f"task {task.name}: its behaviour reports {', '.join(taken)}, which names another figure here")
    return values | counts


def behaviour(task: Task, problems: Sequence[Problem], grid: list[list[Answer]]) -> dict[str, float]:
    """What the task counts in the thinking: the mean of each count over the answers that have it, or where the task
    says so (`rates`) the ratio of two sums. Empty for a task without behaviour."""
    if task.behaviour is None:
        return {}
    counts = [task.behaviour(problem, a.text) for problem, row in zip(problems, grid) for a in row]
    names = list(dict.fromkeys(name for count in counts for name in count))
    total = {name: sum(count.get(name, 0) for count in counts) for name in names}
    answers = {name: sum(name in count for count in counts) for name in names}
    return {name: total[name] / max(1, total[task.rates[name]] if name in task.rates else answers[name])
            for name in names}


def baselines(task: Task, problems: Sequence[Problem], grid: list[list[Answer]]) -> dict[str, float]:
    """The chance that each of the task's baselines solves a problem with as much work as the answer shows.

    For a baseline NAME: NAME, NAME_low, NAME_high over problems; over_NAME, over_NAME_low, over_NAME_high, the policy
    minus the baseline, paired over problems. Empty for a task without baselines.
    """
    if task.baselines is None:
        return {}
    values = {}
    chances = [[task.baselines(problem, a.text) for a in row] for problem, row in zip(problems, grid)]
    for name in dict.fromkeys(name for row in chances for one in row for name in one):
        has = [p for p, row in enumerate(chances) if all(name in one for one in row)]
        chance = np.array([np.mean([one[name] for one in chances[p]]) for p in has])
        above = paired_bootstrap(rights(grid)[has], chance)
        for key, interval in ((name, bootstrap(chance)), (f"over_{name}", above)):
            values |= dict(zip((key, f"{key}_low", f"{key}_high"), interval))
    return values


def by_difficulty(task: Task, problems: Sequence[Problem], grid: list[list[Answer]]) -> dict[str, float]:
    """`summary` of each of the task's groups of problems, KEY_GROUP. Empty for a task without difficulty."""
    if task.difficulty is None:
        return {}
    groups = [task.difficulty(problem) for problem in problems]
    values = {}
    for group in dict.fromkeys(groups):
        part = [(p, row) for p, row, name in zip(problems, grid, groups) if name == group != ""]
        if part:
            values |= {f"{key}_{group}": value for key, value in summary(task, *map(list, zip(*part))).items()}
    return values

"""Answers sampled to a task's problems, judged by its verifier, and summed up."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread

import numpy as np
import torch
from torch import Tensor

from minir1 import rewards, tasks, templates
from minir1.distributed import exchanged, my_share
from minir1.log import progress
from minir1.metrics import bootstrap, maj_at_k, paired_bootstrap, pass_at_k, share_interval
from minir1.model.transformer import Transformer
from minir1.rollout import BUDGET, Rollout, answers_of, collect
from minir1.tasks import Problem, Task, Verdict
from minir1.tokenizer import Tokenizer
from minir1.workers import raised_at

EASE = ("easy", "middle", "medium", "hard")  # groups of these names in this order, before all others
RESERVED = ("low", "high", "formed", "consistency")  # others' keys end so: pass@1_low, language_consistency
NO_THINK = "<think></think><answer>"  # empty thinking: the model must answer at once


@dataclass(frozen=True)
class Answer:
    """One sampled answer to one problem."""

    text: str  # with what the template opened and the forced beginning, if any; without the end token
    tokens: int  # sampled, the end token included
    truncated: bool  # by the token budget
    right: bool
    format: bool  # earns the format reward
    entropy: float = 0.0  # mean over its tokens, nats
    unjudged: bool = False  # the verifier itself failed: not right, but not known to be wrong either
    reason: str = ""  # the verifier's, in words
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)  # the verifier's rewards by name

    @property
    def judged_right(self) -> bool | None:
        """Whether it is right; None if it could not be judged."""
        return None if self.unjudged else self.right


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    *,
    answers: int,
    label: str = "",
    **sampling,
) -> list[list[Answer]]:
    """`answers` judged answers to each problem: [P][answers]; **sampling as for `sample_batches`.

    With a label, a progress bar counts the problems.
    """
    grid: list[list[Answer]] = [[] for _ in problems]
    with progress(len(problems), label) as advance:
        for indices, part in sample_batches(model, tokenizer, task, problems, answers=answers, **sampling):
            for p, group in zip(indices, part):
                grid[p] = group
            advance(len(part))
    return grid


def sample_batches(
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
    shots: Sequence[Sequence[Problem]] = (),
    rows_at_once: int = 512,
    skip: Sequence[int] = (),
) -> Iterator[tuple[list[int], list[list[Answer]]]]:
    """Batches of judged answers, longest prompts first: (indices of the problems, their answers [P'][answers]).

    Temperature 0 is greedy. Every answer begins with `forced` and continues from there (NO_THINK measures what the
    weights know without thinking). shots: per problem, solved ones that its prompt shows first. skip: indices to leave
    out. At most `rows_at_once` answers, but all of at least one problem, are drawn together; the answers depend neither
    on that nor on `skip`, since each row has its own noise. A batch is judged while the next one is sampled.
    """
    prompts = templates.encode(tokenizer, problems, template, forced, shots)
    todo = sorted(set(range(len(problems))) - set(skip), key=lambda p: -len(prompts[p]))
    step = max(1, rows_at_once // max(1, answers))
    judging = None
    for start in range(0, len(todo), step):
        indices = todo[start : start + step]
        rollout = collect(
            model,
            [prompts[p] for p in indices],
            answers=answers,
            max_tokens=max_tokens,
            temperature=temperature,
            stop=tokenizer.stops,
            seed=seed,
            rows=torch.tensor([p * answers + i for p in indices for i in range(answers)]),
        )
        if judging:
            yield judging[0], judging[1].result()
        part, shown = [problems[p] for p in indices], [shots[p] for p in indices] if shots else ()
        judging = indices, beside(judge_rollout, rollout, tokenizer, task, part, template, forced, shown)
    if judging:
        yield judging[0], judging[1].result()


def judge_rollout(
    rollout: Rollout,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    template: str = "chat",
    forced: str = "",
    shots: Sequence[Sequence[Problem]] = (),
) -> list[list[Answer]]:
    """The answers of a rollout to `problems`, judged: [P][G]. Empty thinking is well formed only if it was forced."""
    entropy = (rollout.entropy.sum(1) / rollout.mask.sum(1).clamp(min=1)).tolist()
    shown = shots or [()] * len(problems)
    asked = [templates.prompt(tokenizer, p.prompt, template, s) for p, s in zip(problems, shown)]
    begun = [templates.begun(text, forced) for text in asked]
    rows, groups, stops = answers_of(rollout), rollout.group.tolist(), rollout.stop.tolist()
    texts, unfinished = [], []
    for row, p, stop in zip(rows, groups, stops):
        text = begun[p] + tokenizer.decode(row if stop == BUDGET else row[:-1])  # a PAD inside the answer stays visible
        texts.append(templates.finished(text, template, shown[p]))
        unfinished.append(stop == BUDGET and texts[-1] == text)  # an answer with another question after it was finished
    verdicts = judge(task, [(problems[p], text) for p, text in zip(groups, texts)])
    grid: list[list[Answer]] = [[] for _ in problems]
    for row, p, truncated, nats, text, verdict in zip(rows, groups, unfinished, entropy, texts, verdicts):
        formed = rewards.format_reward(text, allow_empty_think=bool(forced) or "</think>" in begun[p]) > 0
        right, unjudged = verdict.status == "right", verdict.status == "unjudged"
        judged = (unjudged, verdict.reason, verdict.scores)
        grid[p].append(Answer(text, len(row), truncated, right, formed, nats, *judged))
    return grid


def beside(function: Callable, *args) -> Future:
    """Run a function in a thread, beside what the caller does next; `.result()` waits for what it returns or raises.

    A daemon thread, unlike those of an executor: after Ctrl-C or an error the process ends without waiting for it.
    """
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # raised again by `.result()`
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def judge(task: Task, asked: Sequence[tuple[Problem, str]]) -> list[Verdict]:
    """The verdict of each (problem, text), in order; as many at once as there are cores. Each rank judges every W-th.

    A verifier that raises loses this one answer, which is then unjudged. The reason is the error, with its line in the
    file of the task.
    """
    own = my_share(asked)
    todo = iter(enumerate(own))  # shared by the threads
    verdicts: list[Verdict | None] = [None] * len(own)

    def work() -> None:
        for i, pair in todo:
            try:
                verdicts[i] = task.verify(*pair)
            except Exception as error:  # whatever a user's verifier may raise
                verdicts[i] = Verdict("unjudged", {}, repr(error) + _place(error))

    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this rank
    for thread in [beside(work) for _ in range(min(len(own), max(1, cores)))]:
        thread.result()
    every = exchanged(verdicts, in_thread=True)
    return [every[i % len(every)][i // len(every)] for i in range(len(asked))]


def _place(error: Exception) -> str:
    """The innermost line of the verifier's file that an error went through, as " at FILE:LINE"; "" if there is none."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    outside = [file for file in files if file not in (__file__, tasks.__file__)]
    return raised_at(error, outside[0]) if outside else ""


def unjudged_to_mean(rewards: Tensor, answers: list[list[Answer]]) -> Tensor:
    """An answer whose verifier failed gets the mean reward of the judged ones of its group, or, if there are none, of
    the batch, so that it is neither praised nor blamed. rewards: fp32 [P, G]."""
    judged = torch.tensor([[not a.unjudged for a in group] for group in answers])
    known = rewards.double() * judged  # in fp32 the mean of equal rewards need not round to themselves
    mean = lambda dims: known.sum(dims, keepdim=True) / judged.sum(dims, keepdim=True).clamp(min=1)
    filled = torch.where(judged.any(1, keepdim=True), mean(1), mean((0, 1)))
    return torch.where(judged, rewards, filled.to(rewards.dtype))


def any_judged(answers: list[list[Answer]]) -> bool:
    """Whether at least one answer could be judged; otherwise no reward is known."""
    return not all(a.unjudged for group in answers for a in group)


def rights(grid: list[list[Answer]]) -> np.ndarray:
    """The share of right answers among the judged ones of each problem, float64 [P]; NaN where none was judged."""
    return np.array([np.mean([a.right for a in row if not a.unjudged] or [np.nan]) for row in grid])


def summary(
    task: Task, problems: Sequence[Problem], grid: list[list[Answer]], seed: int = 0, ks: Sequence[int] | None = None
) -> dict[str, float]:
    """Flat figures over P problems with n answers each; accuracies with bootstrap intervals over problems.

    pass@1, and pass@k and maj@k for each k in `ks` above 1 (None: n), each with _low and _high; format; pass@1_formed
    (among well-formed answers, 0 without any); length (tokens); truncated; unjudged; entropy; and what the task counts
    in the thinking (`behaviour`). Unjudged answers count in no accuracy, and problems with fewer than k judged ones in
    none at k.
    ValueError for no problems and a k above n; RuntimeError if no answer was judged.
    """
    if not grid:
        raise ValueError("no problems, nothing to sum up")
    n = len(grid[0])
    if ks and max(ks) > n:
        raise ValueError(f"k = {max(ks)}: needs as many answers per problem, but there are {n}")
    flat = [a for row in grid for a in row]
    if not any_judged(grid):
        raise RuntimeError(f"none of {len(flat)} answers could be judged: {flat[0].reason or 'no reason given'}")
    known = [(problem, [a for a in row if not a.unjudged]) for problem, row in zip(problems, grid)]
    formed = [a.right for _, row in known for a in row if a.format]
    values = _with_interval("pass@1", [np.mean([a.right for a in row]) for _, row in known if row], seed)
    for k in [k for k in ks or [n] if k > 1]:
        enough = [(problem, row) for problem, row in known if len(row) >= k]
        if enough:
            counts = np.array([(len(row), sum(a.right for a in row)) for _, row in enough])
            values |= _with_interval(f"pass@{k}", pass_at_k(*counts.T, k), seed)
            values |= _with_interval(f"maj@{k}", [majority_vote(task, *one, k) for one in enough], seed)
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


def _with_interval(name: str, per_problem: Sequence[float], seed: int) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), share_interval(per_problem, seed=seed)))


def majority_vote(task: Task, problem: Problem, row: list[Answer], k: int) -> float:
    """maj@k of one problem; equivalent answers are one vote, under the text of the first of them."""
    votes: list[str | None] = []
    for vote in (task.final(problem, a.text) for a in row):
        equal = (v for v in dict.fromkeys(votes) if None not in (v, vote) and task.same(problem, v, vote))
        votes.append(next(equal, vote))
    return maj_at_k(votes, [a.right for a in row], k)


def behaviour(task: Task, problems: Sequence[Problem], grid: list[list[Answer]]) -> dict[str, float]:
    """What the task counts in the thinking: the mean of each count over the answers that have it, or where the task
    says so (`rates`) the ratio of two sums. Empty for a task without behaviour."""
    if task.behaviour is None:
        return {}
    counts = [task.behaviour(problem, a.text) for problem, row in zip(problems, grid) for a in row]
    names = list(dict.fromkeys(name for count in counts for name in count))
    total = {name: sum(count.get(name, 0) for count in counts) for name in names}
    answers = {name: sum(name in count for count in counts) for name in names}
    return {
        name: total[name] / max(1, total[task.rates[name]] if name in task.rates else answers[name]) for name in names
    }


def readability(
    problems: Sequence[Problem], grid: list[list[Answer]], groups: Mapping[str, Sequence[int]] | None = None
) -> dict[str, float]:
    """How readable the thinking is, by the functions of `minir1.rewards`, as means over the answers.

    language_consistency (with the language of the problem; over the problems for whose language a script is known, left
    out if there are none), repetition, tidiness, reflections, and words, the length in words, numbers and signs. For
    each of the groups, name -> indices of problems, also KEY_GROUP.
    """
    each = [[_readable(problem.language, a.text) for a in row] for problem, row in zip(problems, grid)]
    values = _means(each)
    for name, indices in (groups or {}).items():
        values |= {f"{key}_{name}": value for key, value in _means([each[p] for p in indices]).items()}
    return values


def _readable(language: str, text: str) -> dict[str, float]:
    known = language in rewards.LANGUAGES
    values = {"language_consistency": rewards.language_consistency(text, language)} if known else {}
    values |= {name: getattr(rewards, name)(text) for name in ("repetition", "tidiness", "reflections")}
    return values | {"words": rewards.length(text)}


def _means(each: list[list[dict[str, float]]]) -> dict[str, float]:
    """The mean of each key over the answers that have it."""
    flat = [one for row in each for one in row]
    names = dict.fromkeys(name for one in flat for name in one)
    return {name: float(np.mean([one[name] for one in flat if name in one])) for name in names}


def baselines(task: Task, problems: Sequence[Problem], grid: list[list[Answer]]) -> dict[str, float]:
    """The chance that each of the task's baselines solves a problem with as much work as the answer shows.

    For a baseline NAME: NAME, NAME_low, NAME_high over problems; over_NAME, over_NAME_low, over_NAME_high, the policy
    minus the baseline, paired over problems. Empty for a task without baselines.
    """
    if task.baselines is None:
        return {}
    values, share = {}, rights(grid)
    chances = [[task.baselines(problem, a.text) for a in row] for problem, row in zip(problems, grid)]
    for name in dict.fromkeys(name for row in chances for one in row for name in one):
        has = [p for p, row in enumerate(chances) if all(name in one for one in row) and not np.isnan(share[p])]
        if has:
            chance = np.array([np.mean([one[name] for one in chances[p]]) for p in has])
            above = paired_bootstrap(share[has], chance)
            for key, interval in ((name, bootstrap(chance)), (f"over_{name}", above)):
                values |= dict(zip((key, f"{key}_low", f"{key}_high"), interval))
    return values


def groups_of(task: Task, problems: Sequence[Problem]) -> dict[str, list[int]]:
    """The groups in which problems are reported, name -> indices: by difficulty (the task's, else the level), subject,
    language, and in a mixture by task. Where all are in one group, there is none. ValueError for names in RESERVED."""
    levels = ["" if p.level == "default" else f"level {p.level}" for p in problems]
    names = [task.difficulty and task.difficulty(p) or level for p, level in zip(problems, levels)]
    groups: dict[str, list[int]] = {}
    for labels in (names, *([getattr(p, key) for p in problems] for key in ("subject", "language", "task"))):
        if len(set(labels)) > 1:
            for name in [name for name in EASE if name in labels] + sorted(set(labels) - {"", *EASE}):
                groups[name] = [i for i, label in enumerate(labels) if label == name]
    if taken := [name for name in RESERVED if name in groups]:
        raise ValueError(f"task {task.name}: a group {taken[0]!r} of problems; its figures would have others' names")
    return groups


def by_group(
    task: Task, problems: Sequence[Problem], grid: list[list[Answer]], seed: int = 0, ks: Sequence[int] | None = None
) -> dict[str, float]:
    """`summary` of each group of problems (`groups_of`) that has a judged answer: KEY_GROUP."""
    values = {}
    for name, indices in groups_of(task, problems).items():
        part = [grid[p] for p in indices]
        if any_judged(part):
            figures = summary(task, [problems[p] for p in indices], part, seed, ks)
            values |= {f"{key}_{name}": value for key, value in figures.items()}
    return values

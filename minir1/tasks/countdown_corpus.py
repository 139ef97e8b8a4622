"""The synthetic corpus on which the tiny base is pre-trained: people of all sorts at work on Countdown.

Some search in order, some at random; some are patient, most give up; some answer at once, some forget the tags. Nobody
says which habit is the good one: finding out is what reinforcement learning is for. Only problems of the train split
occur.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields

from minir1.tasks import Problem, countdown

WORDS = ("User:", "\nAssistant:", "make ", " from ", " yes\n", " no\n")


@dataclass(frozen=True)
class Mix:
    """Shares of the documents. Those of a kind of document sum to at most 1; the rest is named last."""

    facts: float = 0.10  # sums alone, the rest is countdown
    untagged: float = 0.08  # of countdown: no <think> and <answer>
    at_once: float = 0.15  # of countdown: an empty thinking, then an answer
    at_once_right: float = 0.25  # of these: the answer is right
    orderly: float = 0.3  # of the searches: tries in the order of `countdown.tries`
    forgetful: float = 0.3  # of the searches: tries at random, repeats and all; the rest is at random without repeats
    patient: float = 0.35  # of the searches: goes on until solved; the rest gives up
    give_up: float = 0.3  # chance of giving up after each failed try
    false_yes: float = 0.01  # of the failed tries: called a success, which ends the search
    sloppy: float = 0.01  # of the sums in thinking: a wrong result (then the chain ends in `no`)

    def __post_init__(self):
        for f in fields(self):
            if not 0 <= getattr(self, f.name) <= 1:
                raise ValueError(f"Mix.{f.name} = {getattr(self, f.name)}: a share in 0 … 1")


def documents(level: str, seed: int, mix: Mix = Mix()) -> Iterator[str]:
    """An endless stream of documents (without an end token); the same for the same arguments."""
    rng = random.Random(f"corpus {level} {seed}")
    train = [p for p in countdown.problems(level) if countdown.split(p) == "train"]
    limit = countdown.level_of(level)
    while True:
        yield facts(rng, limit) if rng.random() < mix.facts else worked(rng, rng.choice(train), mix)


def facts(rng: random.Random, level: countdown.Level, count: int = 8) -> str:
    """`7+5=12`, one a line."""
    lines = []
    while len(lines) < count:
        a, b = rng.randint(1, level.value), rng.randint(1, level.value)
        a, b, op = max(a, b), min(a, b), rng.choice(level.operators)
        if op == "*":  # few products are small enough: draw among those
            b = rng.randint(1, max(1, level.value // a))
            a, b = max(a, b), min(a, b)
        c = {"+": a + b, "-": a - b, "*": a * b}[op]
        if 1 <= c <= level.value:
            lines.append(f"{a}{op}{b}={c}\n")
    return "".join(lines)


def worked(rng: random.Random, problem: Problem, mix: Mix) -> str:
    """One problem, asked and answered."""
    everything = countdown.tries(countdown.parse(problem)[0], problem.level)
    if rng.random() < mix.at_once:
        solved = rng.random() < mix.at_once_right
        thinking, last = "", rng.choice(countdown.solutions(problem) if solved else everything)
    else:
        thinking, last = search(rng, problem, everything, mix)
    question = f"User:{problem.prompt}\nAssistant:"
    if thinking and rng.random() < mix.untagged:
        return f"{question}{thinking}{countdown.expression(last)}"
    return f"{question}<think>{thinking}</think><answer>{countdown.expression(last)}</answer>"


def search(rng: random.Random, problem: Problem, everything, mix: Mix) -> tuple[str, countdown.Try]:
    """Tries, one a line with the target and a verdict, `11-3=8,8*3=24:24 yes`; and the last of them."""
    target = countdown.parse(problem)[1]
    habit = rng.random()
    if habit < mix.orderly:
        order = iter(everything)
    elif habit < mix.orderly + mix.forgetful:
        order = iter(lambda: rng.choice(everything), None)
    else:
        order = iter(rng.sample(everything, len(everything)))
    patient = rng.random() < mix.patient
    lines = []
    for t in order:
        if rng.random() < mix.sloppy * len(t):
            lines.append(f"{slip(rng, t)}:{target} no\n")
        elif countdown.value_of(t) == target or rng.random() < mix.false_yes:
            lines.append(f"{countdown.try_text(t)}:{target} yes\n")
            break
        else:
            lines.append(f"{countdown.try_text(t)}:{target} no\n")
        if not patient and rng.random() < mix.give_up:
            break
    return "".join(lines), t


def slip(rng: random.Random, t: countdown.Try) -> str:
    """The try with its last result wrong by a little."""
    a, op, b, c = t[-1]
    wrong = max(1, c + rng.choice((-2, -1, 1, 2)))
    return countdown.try_text((*t[:-1], (a, op, b, wrong if wrong != c else c + 1)))

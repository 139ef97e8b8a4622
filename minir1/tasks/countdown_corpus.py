"""The synthetic corpus on which the tiny base is pre-trained: worked Countdown problems in various styles.

Some texts search in order, some at random; some search until solved, most give up; some answer at once, some lack the
tags. Nothing marks the better habits: reinforcement learning must find them. Only problems of the train split occur,
and unsolvable problems with their numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice

from minir1.tasks import Problem, countdown_search
from minir1.tasks.countdown_search import Level, Try

WORDS = ("User:", "\nAssistant:", "make ", " from ", " yes\n", " no\n")


@dataclass(frozen=True)
class Mix:
    """Shares of the documents."""

    facts: float = 0.16  # sums only; the rest is countdown
    checked: float = 0.7  # of these: compared with a target, which half of them reach
    impossible: float = 0.06  # of countdown: no try reaches the target, and all are tried in order
    untagged: float = 0.08  # of the searches: no <think> and <answer>
    at_once: float = 0.15  # of the solvable: empty thinking, then an answer
    at_once_right: float = 0.25  # of these: the answer is right
    orderly: float = 0.5  # of the searches: tries in the order of `tries`
    forgetful: float = 0.15  # of the searches: tries at random with repeats; the rest is at random without
    patient: float = 0.2  # of the searches: until solved; the rest gives up
    give_up: float = 0.8  # chance of giving up after each failed try
    false_yes: float = 0.002  # of the failed tries: verdict yes, which ends the search
    sloppy: float = 0.003  # of the sums in thinking: a wrong result (the verdict then is no)
    longest: int = 27  # tries at most: all that three numbers can have, few of those of four

    def __post_init__(self):
        for f in fields(self):
            if f.name != "longest" and not 0 <= getattr(self, f.name) <= 1:
                raise ValueError(f"Mix.{f.name} = {getattr(self, f.name)}: a share in 0 … 1")
        if self.longest < 1:
            raise ValueError(f"Mix.longest = {self.longest}: at least one try")
        if self.orderly + self.forgetful > 1 + 1e-9:
            raise ValueError(f"Mix.orderly + Mix.forgetful = {self.orderly + self.forgetful}: shares of one whole")


def mix_of(shares: Mapping[str, float]) -> Mix:
    """`Mix` with some shares changed. ValueError for a name that it does not have."""
    names = [f.name for f in fields(Mix)]
    if unknown := sorted(shares.keys() - set(names)):
        raise ValueError(f"the mix has no {', '.join(unknown)}; it has {', '.join(names)}")
    return Mix(**shares)


def documents(train: Sequence[Problem], level: str, seed: int, mix: Mix = Mix()) -> Iterator[str]:
    """An endless stream of documents (without an end token), the same for the same arguments."""
    rng = random.Random(f"corpus {level} {seed}")
    limit = countdown_search.level_of(level)
    while True:
        if rng.random() < mix.facts:
            yield facts(rng, limit, checked=rng.random() < mix.checked)
        else:
            yield worked(rng, rng.choice(train), mix)


def probes(problems: Sequence[Problem]) -> list[list[tuple[str, str]]]:
    """For each problem a text in pieces (text, label), to measure what reinforcement learning will build on.

    The text shows up to five tries, the last a solution. The label is `sums` for the result of a step, `yes` or `no`
    for the verdict, and "" for pieces that the model need not predict.
    """
    rng = random.Random(0)
    texts = []
    for problem in problems:
        target = countdown_search.parse(problem)[1]
        everything = countdown_search.tries(countdown_search.parse(problem)[0], problem.level)
        chosen = rng.sample(everything, min(4, len(everything))) + [rng.choice(countdown_search.solutions(problem))]
        pieces = [(f"User:{problem.prompt}\nAssistant:<think>", "")]
        for t in chosen:
            for i, (a, op, b, c) in enumerate(t):
                pieces += [(f"{',' if i else ''}{a}{op}{b}=", ""), (str(c), "sums")]
            verdict = "yes" if countdown_search.value_of(t) == target else "no"
            pieces += [(f":{target}", ""), (f" {verdict}\n", verdict)]
        texts.append(pieces)
    return texts


def facts(rng: random.Random, level: Level, checked: bool, count: int = 8) -> str:
    """`7+5=12`, one per line; or checked against a target, `7+5=12:12 yes` and `7+5=12:19 no`, equally often.

    In the searches most tries fail: from them alone the base learns the verdict late or never.
    """
    lines = []
    while len(lines) < count:
        a, b = rng.randint(1, level.value), rng.randint(1, level.value)
        a, b, op = max(a, b), min(a, b), rng.choice(level.operators)
        if op == "*":  # few products are small enough: draw among those
            b = rng.randint(1, max(1, level.value // a))
            a, b = max(a, b), min(a, b)
        c = {"+": a + b, "-": a - b, "*": a * b}[op]
        if not 1 <= c <= level.value:
            continue
        if checked:
            target = c if rng.random() < 0.5 else rng.choice([t for t in range(level.low, level.high + 1) if t != c])
            lines.append(f"{a}{op}{b}={c}:{target} {'yes' if c == target else 'no'}\n")
        else:
            lines.append(f"{a}{op}{b}={c}\n")
    return "".join(lines)


def worked(rng: random.Random, problem: Problem, mix: Mix) -> str:
    """One problem, asked and answered."""
    numbers, target = countdown_search.parse(problem)
    everything = countdown_search.tries(numbers, problem.level)
    if rng.random() < mix.impossible:
        target = unreachable(rng, everything, countdown_search.level_of(problem.level)) or target
        mix = replace(mix, at_once=0.0, orderly=1.0, forgetful=0.0, patient=1.0)
    solved = [t for t in everything if countdown_search.value_of(t) == target]
    if rng.random() < mix.at_once:
        right = solved and rng.random() < mix.at_once_right
        thinking, last = "", rng.choice(solved if right else everything)
    else:
        thinking, last = search(rng, target, everything, mix)
    question = f"User:make {target} from {','.join(map(str, numbers))}\nAssistant:"
    if thinking and rng.random() < mix.untagged:
        return f"{question}{thinking}{countdown_search.expression(last)}"
    return f"{question}<think>{thinking}</think><answer>{countdown_search.expression(last)}</answer>"


def unreachable(rng: random.Random, everything: Sequence[Try], level: Level) -> int | None:
    """A target that no try reaches, or None if there is none."""
    reached = {countdown_search.value_of(t) for t in everything}
    free = [target for target in range(level.low, level.high + 1) if target not in reached]
    return rng.choice(free) if free else None


def search(rng: random.Random, target: int, everything: Sequence[Try], mix: Mix) -> tuple[str, Try]:
    """Tries, one per line with the target and a verdict, `11-3=8,8*3=24:24 yes`; and the last of them."""
    habit = rng.random()
    if habit < mix.orderly:
        order = iter(everything)
    elif habit < mix.orderly + mix.forgetful:
        order = (rng.choice(everything) for _ in everything)
    else:
        order = iter(rng.sample(everything, len(everything)))
    patient = rng.random() < mix.patient
    lines = []
    for t in islice(order, mix.longest):
        verdict = "no"
        if rng.random() < mix.sloppy * len(t):
            steps = slip(rng, t)
        else:
            steps = countdown_search.try_text(t)
            if countdown_search.value_of(t) == target or rng.random() < mix.false_yes:
                verdict = "yes"
        lines.append(f"{steps}:{target} {verdict}\n")
        if verdict == "yes" or (not patient and rng.random() < mix.give_up):
            break
    return "".join(lines), t


def slip(rng: random.Random, t: Try) -> str:
    """The try with its last result wrong by a little."""
    a, op, b, c = t[-1]
    wrong = max(1, c + rng.choice((-2, -1, 1, 2)))
    return countdown_search.try_text((*t[:-1], (a, op, b, wrong if wrong != c else c + 1)))

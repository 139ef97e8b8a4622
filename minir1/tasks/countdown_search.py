"""Countdown's tries: all chains of steps from some numbers, and the chance that a random search solves a problem.

A *try* is a chain of n-1 steps for n numbers, each combining two available values into one, as the model writes it in
its thinking: `11-3=8,8*3=24`. All tries can be listed, so difficulty and the chance of a random search are exact.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

from minir1.tasks import Problem

Step = tuple[int, str, int, int]  # a, operator, b, c: a op b = c, with a >= b
Try = tuple[Step, ...]


@dataclass(frozen=True)
class Level:
    """Which problems exist."""

    numbers: int = 3  # how many numbers
    largest: int = 12  # each number is in 1..largest
    value: int = 30  # every result, intermediate or final, is in 1..value
    low: int = 10  # smallest target
    high: int = 30  # largest target
    operators: str = "+-*"


LEVELS = {
    "default": Level(),
    "wide": Level(largest=20, value=99, high=99),
    "four": Level(numbers=4),
}

PROMPT = re.compile(r"make ([1-9][0-9]*) from ([1-9][0-9]*(?:,[1-9][0-9]*)*)")


def level_of(level: str | Level) -> Level:
    """The level itself, or the one of that name. ValueError for an unknown name."""
    if isinstance(level, Level):
        return level
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; allowed: {', '.join(LEVELS)}")
    return LEVELS[level]


def parse(problem: Problem) -> tuple[tuple[int, ...], int]:
    """(numbers in the order of the prompt, target). ValueError if the prompt is not one of countdown."""
    match = PROMPT.fullmatch(problem.prompt)
    if not match:
        raise ValueError(f"not a countdown prompt: {problem.prompt!r}; such as 'make 24 from 11,3,3'")
    return tuple(int(n) for n in match[2].split(",")), int(match[1])


@lru_cache(maxsize=None)
def tries(numbers: tuple[int, ...], level: str | Level = "default") -> tuple[Try, ...]:
    """Every legal try, each text once, in a systematic order.

    Depth first: pairs in the order of the numbers, operators in the order of the level, and the result of a step before
    the remaining values. Chains without a legal next step are no tries. With four numbers, two independent steps count
    as two tries, one for each order.
    """
    level = level_of(level)
    if len(numbers) == 1:
        return ((),)
    chains: dict[Try, None] = {}  # a dict, because it drops duplicates and keeps the order
    for i, j in combinations(range(len(numbers)), 2):
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for step in _steps(max(numbers[i], numbers[j]), min(numbers[i], numbers[j]), level):
            for tail in tries((step[3], *rest), level):
                chains[(step, *tail)] = None
    return tuple(chains)


@lru_cache(maxsize=None)
def _steps(a: int, b: int, level: Level) -> tuple[Step, ...]:
    """The legal steps from a >= b; cached so that all tries share these tuples."""
    steps = [(a, op, b, apply(a, op, b)) for op in level.operators]
    return tuple(step for step in steps if 1 <= step[3] <= level.value)


def apply(a: int, op: str, b: int) -> int:
    """a op b. ValueError for an unknown operator."""
    if op not in ("+", "-", "*"):
        raise ValueError(f"unknown operator {op!r}; allowed: + - *")
    return a + b if op == "+" else a - b if op == "-" else a * b


def value_of(t: Try) -> int:
    """The final result of a try."""
    return t[-1][3]


def try_text(t: Try) -> str:
    """`11-3=8,8*3=24`: the larger operand first, so that equal tries are equal texts."""
    return ",".join(f"{a}{op}{b}={c}" for a, op, b, c in t)


def expression(t: Try) -> str:
    """`(11-3)*3`: the try as one expression, each inner step in parentheses, operands as in the steps."""
    made: dict[int, list[str]] = {}  # value -> expressions of it not yet used; other operands are given numbers
    whole = ""
    for a, op, b, c in t:
        left, right = (made[v].pop() if made.get(v) else str(v) for v in (a, b))
        whole = f"{left}{op}{right}"
        made.setdefault(c, []).append(f"({whole})")
    return whole


# Random search, the baseline for any policy. It makes no mistake: every sum is right, every try is legal, and every
# solution is recognised. A model has to learn all three.


@lru_cache(maxsize=None)
def solutions(problem: Problem) -> tuple[Try, ...]:
    """The tries that reach the target, in the order of `tries`."""
    numbers, target = parse(problem)
    return tuple(t for t in tries(numbers, problem.level) if value_of(t) == target)


def expected_tries(problem: Problem) -> float:
    """The expected number of tries that a random search needs: tries / solutions.

    Uniform over the distinct legal tries, with replacement: geometric with p = solutions / tries.
    """
    return _total(problem) / len(solutions(problem))


def random_search(problem: Problem, k: float) -> float:
    """The chance that k uniform tries, with replacement, include a solution: 1 - (1 - s/n)^k."""
    if k < 0:
        raise ValueError(f"k = {k} tries; allowed: k >= 0")
    return 1 - (1 - len(solutions(problem)) / _total(problem)) ** k


def random_search_distinct(problem: Problem, k: float) -> float:
    """The chance that k different uniform tries include a solution: 1 - C(n-s, k) / C(n, k).

    Hypergeometric, without replacement; a fractional k is rounded down, one above n counts as n.
    """
    if k < 0:
        raise ValueError(f"k = {k} tries; allowed: k >= 0")
    n, s = _total(problem), len(solutions(problem))
    k = min(int(k), n)
    return 1 - comb(n - s, k) / comb(n, k)


def _total(problem: Problem) -> int:
    return len(tries(parse(problem)[0], problem.level))

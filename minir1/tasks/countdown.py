"""Countdown: make the target from the numbers, each used exactly once.

`make 24 from 11,3,3` is solved by `(11-3)*3`. A problem is a multiset of numbers and a target that some try reaches
with every intermediate value in 1..`Level.value` (tries and levels: countdown_search.py). The variants are the levels.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement

from minir1 import rewards
from minir1.tasks import Problem, Verdict, countdown_corpus, share, spread
from minir1.tasks.countdown_behaviour import attempts, behaviour  # noqa: F401 (parts of the task)
from minir1.tasks.countdown_search import (
    LEVELS,
    PROMPT,
    Try,
    apply,
    expected_tries,
    expression,
    level_of,
    parse,
    random_search,
    random_search_distinct,
    tries,
    value_of,
)

SPLITS = ("train", "validation", "test", "unseen")
VARIANTS = tuple(LEVELS)
DATA = None  # problems are generated
RATES = {"arithmetic_errors": "steps", "illegal": "tries", "repeats": "tries"}

UNSEEN, TEST, VALIDATION = 0.12, 0.28, 0.15  # shares: of all multisets; of the remaining problems
MAX_CHARS, MAX_DEPTH = 200, 20  # limits on an expression, the former also on a question that somebody types
LISTED = 4  # numbers of such a question whose tries are all listed
PRIORITY = {"+": 1, "-": 1, "*": 2, "/": 2}
TOKEN = re.compile(r"[ \t\r\n]*(?:(0|[1-9][0-9]*)|(.))", re.DOTALL)  # a number, or any other character


def problems(split: str, data: None = None, variant: str = "default") -> list[Problem]:
    """The problems of one split, in the order of `all_problems`. ValueError for an unknown split or variant."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    return [problem for problem in all_problems(variant) if split_of(problem) == split]


@lru_cache(maxsize=None)
def all_problems(variant: str = "default") -> tuple[Problem, ...]:
    """Every solvable problem of the level, ordered by sorted numbers, then target.

    The reference is the first solution in the order of `tries`. ValueError for an unknown level.
    """
    level = level_of(variant)
    listed = []
    for multiset in combinations_with_replacement(range(1, level.largest + 1), level.numbers):
        numbers = _shuffle(multiset)
        first: dict[int, Try] = {}
        for t in tries(numbers, level):
            first.setdefault(value_of(t), t)
        for target in sorted(first):
            if level.low <= target <= level.high:
                prompt = f"make {target} from {','.join(map(str, numbers))}"
                listed.append(Problem(prompt, expression(first[target]), level=variant))
    return tuple(listed)


def _shuffle(multiset: tuple[int, ...]) -> tuple[int, ...]:
    """A stable order for the prompt that carries no information about the solution."""
    order = sorted(range(len(multiset)), key=lambda i: share(f"order {multiset} {i}"))
    return tuple(multiset[i] for i in order)


def split_of(problem: Problem) -> str:
    """"train", "validation", "test" or "unseen", by a stable hash.

    `unseen` holds out whole multisets of numbers, for any target; the others are split by numbers and target. The order
    of the numbers and the level do not matter, so a problem held out in one level is held out in all.
    """
    numbers, target = parse(problem)
    key = "split " + ",".join(str(n) for n in sorted(numbers))
    if share(key) < UNSEEN:
        return "unseen"
    part = share(f"{key}={target}")
    if part < TEST:
        return "test"
    return "validation" if part < TEST + VALIDATION else "train"


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the only answer uses each number exactly once and makes the target.

    Scores: `accuracy`, 0 or 1. Intermediate values may leave the range of the level, which only defines the problems.
    No text raises an error, and nothing is ever unjudged.
    """
    numbers, target = parse(problem)
    try:
        value, used = evaluate_expression(rewards.answer(text) or "")
    except ValueError:  # no answer is no expression either
        value, used = None, []
    right = value == target and sorted(used) == sorted(numbers)
    return Verdict("right" if right else "wrong", {"accuracy": float(right)})


def evaluate_expression(text: str, operators: str = "+-*") -> tuple[int | Fraction, list[int]]:
    """(value, numbers used) of an expression of integers, `operators` and parentheses; `/` divides exactly.

    Only ASCII digits without leading zeros; no sign, no implicit multiplication; white space between tokens. `*` and
    `/` bind closer; all operators group to the left. Intermediate values are not restricted. Two stacks instead of
    recursion or eval, so that no text can do harm. ValueError for anything else, a division by zero, and beyond 200
    characters or 20 open parentheses.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"expression of {len(text)} characters; allowed: {MAX_CHARS}")
    values: list[int] = []
    numbers: list[int] = []
    pending: list[str] = []  # operators and open parentheses
    after_value = False
    for number, symbol in TOKEN.findall(text.strip(" \t\r\n")):
        if number and not after_value:
            values.append(int(number))
            numbers.append(int(number))
            after_value = True
        elif symbol == "(" and not after_value and pending.count("(") < MAX_DEPTH:
            pending.append("(")
        elif symbol == ")" and after_value and "(" in pending:
            _reduce(values, pending, 1)
            pending.pop()
        elif symbol and symbol in operators and after_value:
            _reduce(values, pending, PRIORITY[symbol])
            pending.append(symbol)
            after_value = False
        else:
            raise ValueError(f"{number or symbol!r} is out of place in {text!r}")
    if not after_value or "(" in pending:
        raise ValueError(f"the expression {text!r} is not complete")
    _reduce(values, pending, 1)
    return values[0], numbers


def _reduce(values: list[int], pending: list[str], priority: int) -> None:
    """Apply, in place, the operators after the last open parenthesis that bind at least as closely as `priority`."""
    while pending and pending[-1] != "(" and PRIORITY[pending[-1]] >= priority:
        b, a = values.pop(), values.pop()
        op = pending.pop()
        if op == "/" and b == 0:
            raise ValueError(f"{a} / 0")
        values.append(Fraction(a) / b if op == "/" else apply(a, op, b))


def recognise(question: str, variant: str = "default") -> Problem | None:
    """The problem of a text such as `make 24 from 11,3,3`, also of one that no split has; None for another text.

    The reference is "" where no try of the level reaches the target, or there are too many numbers to list the tries.
    """
    question = question.strip()
    if len(question) > MAX_CHARS or not PROMPT.fullmatch(question):
        return None
    numbers, target = parse(problem := Problem(question, "", level=variant))
    listed = tries(numbers, variant) if len(numbers) <= LISTED else ()
    return replace(problem, reference=next((expression(t) for t in listed if value_of(t) == target), ""))


def difficulty(problem: Problem) -> str:
    """easy | middle | hard: a random search needs under 6, under 12, or more tries on average."""
    needed = expected_tries(problem)
    return "easy" if needed < 6 else "middle" if needed < 12 else "hard"


def baselines(problem: Problem, text: str) -> dict[str, float]:
    """The chance that a random search solves the problem with as many tries as the text, but at least one.

    `search` draws with replacement, `search_without_repeats` without.
    """
    k = max(1, behaviour(problem, text)["tries"])
    return {"search": random_search(problem, k), "search_without_repeats": random_search_distinct(problem, k)}


def documents(seed: int, variant: str = "default", **mix: float) -> Iterator[str]:
    """The synthetic corpus, of train problems only; mix: changed shares of `countdown_corpus.Mix`."""
    return countdown_corpus.documents(problems("train", variant=variant), variant, seed, countdown_corpus.mix_of(mix))


def vocabulary(variant: str = "default") -> tuple[tuple[str, ...], int]:
    """The words of the corpus and the largest number that the level can show."""
    level = level_of(variant)
    return countdown_corpus.WORDS, max(100, level.value, level.high)


def probes(variant: str = "default") -> list[list[tuple[str, str]]]:
    """Tries of 100 validation problems, whose results and verdicts the model must predict."""
    return countdown_corpus.probes(spread(problems("validation", variant=variant), 100))

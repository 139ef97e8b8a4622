"""Countdown: make the target from the numbers, each used exactly once.

`make 24 from 11,3,3` is solved by `(11-3)*3`. Small enough to list every problem, every try and every
solution, so difficulty and the chance of a random search are exact and not estimated.

A *try* is a chain of n-1 steps for n numbers, each combining two of the values at hand into one, as
the model writes it in its thinking: `11-3=8,8*3=24`. A problem is a multiset of numbers and a target
which some try reaches with every value on the way in 1..`Level.value`.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, combinations_with_replacement
from math import comb

from minir1 import rewards
from minir1.tasks import Problem, Verdict

Step = tuple[int, str, int, int]  # a, operator, b, c: a op b = c, with a >= b
Try = tuple[Step, ...]


@dataclass(frozen=True)
class Level:
    """Which problems exist."""

    numbers: int = 3  # how many numbers
    largest: int = 12  # each number is in 1..largest
    value: int = 30  # every result, on the way and at the end, is in 1..value
    low: int = 10  # smallest target
    high: int = 30  # largest target
    operators: str = "+-*"


LEVELS = {
    "default": Level(),
    "wide": Level(largest=20, value=99, high=99),
    "four": Level(numbers=4),
}

UNSEEN, TEST, VALIDATION = 0.12, 0.28, 0.15  # shares: of all multisets; of the remaining problems
MAX_CHARS, MAX_DEPTH = 200, 20  # limits on an expression
PRIORITY = {"+": 1, "-": 1, "*": 2}
TOKEN = re.compile(r"[ \t\r\n]*(?:(0|[1-9][0-9]*)|([-+*()]))")
STEP = r"[0-9]{1,9}[-+*][0-9]{1,9}=[0-9]{1,9}"
LINE = re.compile(rf"({STEP}(?:,{STEP})*)(?::[0-9]{{1,9}})? (yes|no)")
PROMPT = re.compile(r"make ([1-9][0-9]*) from ([1-9][0-9]*(?:,[1-9][0-9]*)*)")


# Problems and their splits


@lru_cache(maxsize=None)
def problems(level_name: str = "default") -> tuple[Problem, ...]:
    """Every solvable problem of the level, ordered by sorted numbers, then target.

    The reference is the first solution in the order of `tries`. ValueError for an unknown level.
    """
    level = level_of(level_name)
    found = []
    for multiset in combinations_with_replacement(range(1, level.largest + 1), level.numbers):
        numbers = _shuffle(multiset)
        first: dict[int, Try] = {}
        for t in tries(numbers, level):
            first.setdefault(value_of(t), t)
        for target in sorted(first):
            if level.low <= target <= level.high:
                found.append(Problem(_prompt(numbers, target), expression(first[target]), level=level_name))
    return tuple(found)


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


def split(problem: Problem) -> str:
    """"train", "validation", "test" or "unseen", by a stable hash.

    `unseen` holds out whole multisets of numbers, under any target; the others are split by numbers
    and target. Neither the order of the numbers nor the level counts, so a problem held out in one
    level is held out in all.
    """
    numbers, target = parse(problem)
    key = "split " + ",".join(str(n) for n in sorted(numbers))
    if _share(key) < UNSEEN:
        return "unseen"
    share = _share(f"{key}={target}")
    if share < TEST:
        return "test"
    return "validation" if share < TEST + VALIDATION else "train"


def held_out(level: str, part: str, most: int) -> list[Problem]:
    """Problems of one part of `split`: all, or `most` of them evenly spread. ValueError if that leaves none."""
    found = [p for p in problems(level) if split(p) == part]
    if most < 1 or not found:
        raise ValueError(f"{most} of {len(found)} problems in split {part!r}: need at least one")
    return found if len(found) <= most else [found[i * len(found) // most] for i in range(most)]


def _share(text: str) -> float:
    """A number in [0, 1), the same for the same text on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _shuffle(multiset: tuple[int, ...]) -> tuple[int, ...]:
    """A stable order for the prompt that says nothing about the solution (a sorted one might hint at it)."""
    order = sorted(range(len(multiset)), key=lambda i: _share(f"order {multiset} {i}"))
    return tuple(multiset[i] for i in order)


def _prompt(numbers: tuple[int, ...], target: int) -> str:
    return f"make {target} from {','.join(str(n) for n in numbers)}"


# Tries


@lru_cache(maxsize=None)
def tries(numbers: tuple[int, ...], level: str | Level = "default") -> tuple[Try, ...]:
    """Every legal try, each text once, in a systematic order.

    Depth first: pairs in the order of the numbers, operators in the order of the level, and the result
    of a step stands before the values left over. Chains that end in a dead end (no legal step) are no
    tries. Of four numbers, the same two independent steps in either order are two tries.
    """
    level = level_of(level)
    if len(numbers) == 1:
        return ((),)
    found: dict[Try, None] = {}  # a dict keeps the first of equals and the order
    for i, j in combinations(range(len(numbers)), 2):
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for step in _steps(max(numbers[i], numbers[j]), min(numbers[i], numbers[j]), level):
            for tail in tries((step[3], *rest), level):
                found[(step, *tail)] = None
    return tuple(found)


@lru_cache(maxsize=None)
def _steps(a: int, b: int, level: Level) -> tuple[Step, ...]:
    """The legal steps from a >= b; cached so that all tries share these tuples."""
    steps = [(a, op, b, _apply(a, op, b)) for op in level.operators]
    return tuple(step for step in steps if 1 <= step[3] <= level.value)


def _apply(a: int, op: str, b: int) -> int:
    if op not in PRIORITY:
        raise ValueError(f"unknown operator {op!r}; allowed: + - *")
    return a + b if op == "+" else a - b if op == "-" else a * b


def value_of(t: Try) -> int:
    """What the try arrives at."""
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


# Search, the baseline that any policy has to beat. These count tries only: every sum is right, every
# try legal, and every solution recognised, none of which a model gets for free.


@lru_cache(maxsize=None)
def solutions(problem: Problem) -> tuple[Try, ...]:
    """The tries that reach the target, in the order of `tries`."""
    numbers, target = parse(problem)
    return tuple(t for t in tries(numbers, problem.level) if value_of(t) == target)


def difficulty(problem: Problem) -> float:
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

    Hypergeometric, without replacement; a fractional k is cut to an integer, one above n counts as n.
    """
    if k < 0:
        raise ValueError(f"k = {k} tries; allowed: k >= 0")
    n, s = _total(problem), len(solutions(problem))
    k = min(int(k), n)
    return 1 - comb(n - s, k) / comb(n, k)


def _total(problem: Problem) -> int:
    return len(tries(parse(problem)[0], problem.level))


# Verification


def evaluate_expression(text: str) -> tuple[int, list[int]]:
    """(value, numbers used) of an expression of integers, `+ - *` and parentheses.

    Only ASCII digits without leading zeros; no sign, no implicit multiplication, nothing else; white
    space between tokens. `*` binds closer; all operators group to the left. Values on the way are not
    restricted. Two stacks instead of recursion or eval, so no text can do harm. ValueError for
    anything else, and beyond 200 characters or 20 open parentheses.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"expression of {len(text)} characters; allowed: {MAX_CHARS}")
    values: list[int] = []
    numbers: list[int] = []
    pending: list[str] = []  # operators and open parentheses
    after_value = False
    for number, symbol in _tokens(text.strip(" \t\r\n")):
        if number and not after_value:
            values.append(int(number))
            numbers.append(int(number))
            after_value = True
        elif symbol == "(" and not after_value and pending.count("(") < MAX_DEPTH:
            pending.append("(")
        elif symbol == ")" and after_value and "(" in pending:
            _reduce(values, pending, 1)
            pending.pop()
        elif symbol in PRIORITY and after_value:
            _reduce(values, pending, PRIORITY[symbol])
            pending.append(symbol)
            after_value = False
        else:
            raise ValueError(f"{number or symbol!r} is out of place in {text!r}")
    if not after_value or "(" in pending:
        raise ValueError(f"the expression {text!r} is not complete")
    _reduce(values, pending, 1)
    return values[0], numbers


def _tokens(text: str) -> list[tuple[str, str]]:
    """(number, "") or ("", symbol) for each token. ValueError where none stands."""
    tokens, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if not match:
            raise ValueError(f"{text[at:at + 10]!r} in an expression; allowed: digits + - * ( )")
        tokens.append((match[1] or "", match[2] or ""))
        at = match.end()
    return tokens


def _reduce(values: list[int], pending: list[str], priority: int) -> None:
    """Applies, in place, the operators back to the last open parenthesis that bind at least as close."""
    while pending and pending[-1] != "(" and PRIORITY[pending[-1]] >= priority:
        b, a = values.pop(), values.pop()
        values.append(_apply(a, pending.pop(), b))


def verify(problem: Problem, text: str, allow_empty_think: bool = False) -> Verdict:
    """Right iff the only answer uses each number exactly once and makes the target.

    Scores: `accuracy` (0 or 1, the same as the status) and `form` (`rewards.form`), independent of
    each other. Values on the way may leave the range of the level, which only says which problems are
    asked. Raises on no text, and nothing is ever unjudged.
    """
    accuracy = float(_solves(problem, rewards.answer(text)))
    scores = {"accuracy": accuracy, "form": rewards.form(text, allow_empty_think)}
    return Verdict("right" if accuracy else "wrong", scores)


def _solves(problem: Problem, answer: str | None) -> bool:
    numbers, target = parse(problem)
    if answer is None:
        return False
    try:
        value, used = evaluate_expression(answer)
    except ValueError:
        return False
    return value == target and sorted(used) == sorted(numbers)


# What the thinking does


def behaviour(problem: Problem, text: str) -> dict[str, int | bool]:
    """Counts over the tries in the thinking (the text before the first `</think>`, or all of it).

    A try is a whole line of steps, the target (which may be left out) and a verdict, such as
    `11-3=8,8*3=24:24 yes`; other lines count for nothing. Keys:
      tries, steps        lines that are tries, and their steps
      arithmetic_errors   steps whose result is wrong
      illegal             tries that use a value not at hand or leave one over; the written results
                          count as at hand, so that a wrong sum is not also illegal
      repeats             tries that occurred before, the order of operands of + and * ignored
      said_yes            whether the last try says yes
      false_yes           tries that say yes but are arithmetically wrong, illegal or miss the target
      false_no            tries that say no but are right
    """
    numbers, target = parse(problem)
    counts = dict.fromkeys(("tries", "steps", "arithmetic_errors", "illegal", "repeats"), 0)
    counts |= {"said_yes": False, "false_yes": 0, "false_no": 0}
    seen: set[Try] = set()
    for line in text.partition("</think>")[0].replace("<think>", "\n").split("\n"):
        match = LINE.fullmatch(line.strip())
        if not match:
            continue
        t = _read(match[1])
        errors = sum(_apply(a, op, b) != c for a, op, b, c in t)
        legal = _legal(numbers, t)
        right = legal and not errors and value_of(t) == target
        yes = match[2] == "yes"
        counts["tries"] += 1
        counts["steps"] += len(t)
        counts["arithmetic_errors"] += errors
        counts["illegal"] += not legal
        counts["repeats"] += t in seen
        counts["said_yes"] = yes
        counts["false_yes"] += yes and not right
        counts["false_no"] += right and not yes
        seen.add(t)
    return counts


def _read(steps: str) -> Try:
    """The steps of a matched line, the larger operand of + and * first."""
    t = []
    for step in steps.split(","):
        left, op, right, _, result = re.split("([-+*=])", step)
        a, b, c = int(left), int(right), int(result)
        t.append((a, op, b, c) if op == "-" else (max(a, b), op, min(a, b), c))
    return tuple(t)


def _legal(numbers: tuple[int, ...], t: Try) -> bool:
    """Whether each step uses two values at hand and one value is left at the end."""
    hand = Counter(numbers)
    for a, _, b, c in t:
        hand.subtract((a, b))
        if hand[a] < 0 or hand[b] < 0:
            return False
        hand[c] += 1
    return hand.total() == 1

"""The reasoning puzzles of the world, in neutral text (world_language.py): five kinds, each with its working and check.

    countdown   {make}24{from}11,3,3             try by try: 11-3=8,8*3=24:24{yes}           3*(11-3)
    chain       {compute}5,+3,*2,-4              step by step: 5+3=8{then}8*2=16{then} …     12
    sort        {sort}14,3,9                     14,3,9:3{then}14,9:9{then}14:14{done}       3,9,14
                {compare}14+3{and}9*2            14+3=17{then}9*2=18{done}                   9*2, the larger
    order       {order}A<B,C<A                   A,B,C:A<B,C<A{no}C,A,B:A<B,C<A{yes}         C,A,B
    program     {program}2:7,3:9                 *2:2*2=4,7-4=3,3*2=6,6+3=9:9{yes}           *2+3

Countdown, order and program are searches: a try is proposed, checked and judged. The others are worked off in steps.
All values are in 1..30, so that one set of sums serves all of them. A program is a list of operations on its input,
left to right; it is right if its tests pass: the two pairs of input and output that the question shows, and hidden
ones. Its language is so small that running it needs no sandbox.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import combinations, permutations
from typing import NamedTuple

from minir1.tasks import countdown, countdown_search, share, spread

LARGEST = 30  # of all values
OPERATION = re.compile(r"([-+*])([0-9]{1,2})")
RESULTS = re.compile(r"([0-9]{1,4})([-+*])([0-9]{1,4})=([0-9]{1,6})")  # the sums in a line
HIDDEN = (1, 4, 5)  # further inputs on which a program is tested
NAMES = "ABCDEF"


class Puzzle(NamedTuple):
    """A question in neutral text."""

    kind: str
    question: str
    reference: str
    level: str  # easy | middle | hard
    split: str


class Line(NamedTuple):
    """A line of working, without the word that ends it, and the answer that it leads to."""

    text: str
    answer: str
    good: bool = True  # of a try: it solves the puzzle


def run(program: str, x: int) -> int | None:
    """The output of a program such as `*2+3` for the input x; None for a text that is no program."""
    operations = OPERATION.findall(program)
    if not operations or len(operations) > 8 or "".join(map("".join, operations)) != program:
        return None
    for op, number in operations:
        x = countdown_search.apply(x, op, int(number))
    return x


# ---- the puzzles -----------------------------------------------------------------------------


@lru_cache(maxsize=None)
def puzzles(kind: str, most: int = 1500) -> tuple[Puzzle, ...]:
    """All puzzles of a kind in a fixed order, or `most` of them, evenly spread. ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; allowed: {', '.join(KINDS)}")
    return tuple(spread(KINDS[kind].listed(), most))


def _puzzle(kind: str, question: str, reference: str, level: str) -> Puzzle:
    """The split is a hash of the question, whatever the order of its numbers, sums, clues or pairs."""
    word, body = question.split("}", 1)
    parts = re.split(r",|\{and\}", body)
    part = share(f"split {word} {' '.join(parts if kind == 'chain' else sorted(parts))}")
    return Puzzle(kind, question, reference, level, "test" if part < 0.2 else "validation" if part < 0.3 else "train")


def _countdown_listed() -> list[Puzzle]:
    """Those of the task `countdown`, in its splits; `unseen` belongs to the test here."""
    listed = []
    for problem in countdown.all_problems():
        numbers, target = countdown_search.parse(problem)
        split = {"unseen": "test"}.get(part := countdown.split_of(problem), part)
        question = f"{{make}}{target}{{from}}{','.join(map(str, numbers))}"
        listed.append(Puzzle("countdown", question, problem.reference, countdown.difficulty(problem), split))
    return listed


def _chain_listed() -> list[Puzzle]:
    rng, listed = random.Random("chains"), {}
    while len(listed) < 1500:
        steps, value = rng.randint(2, 6), rng.randint(1, 12)
        question = f"{{compute}}{value}"
        while steps:
            op, number = rng.choice("+-*"), rng.randint(1, 9)
            if number == 1 and op == "*" or not 1 <= (result := countdown_search.apply(value, op, number)) <= LARGEST:
                continue
            question, value, steps = f"{question},{op}{number}", result, steps - 1
        count = len(OPERATION.findall(question))
        listed[question] = _puzzle("chain", question, str(value), _level(count, 4, 5))
    return list(listed.values())


def _sort_listed() -> list[Puzzle]:
    rng, listed = random.Random("sorts"), {}
    while len(listed) < 1500:
        if rng.random() < 0.3:
            sums = [_sum(rng), _sum(rng)]
            values = [value for _, value in sums]
            if values[0] == values[1]:
                continue
            question = f"{{compare}}{sums[0][0]}{{and}}{sums[1][0]}"
            listed[question] = _puzzle("sort", question, max(sums, key=lambda s: s[1])[0], "easy")
        else:
            numbers = rng.sample(range(1, LARGEST + 1), rng.randint(3, 6))
            question, level = f"{{sort}}{','.join(map(str, numbers))}", _level(len(numbers), 4, 6)
            listed[question] = _puzzle("sort", question, ",".join(map(str, sorted(numbers))), level)
    return list(listed.values())


def _sum(rng: random.Random) -> tuple[str, int]:
    while True:
        a, op, b = rng.randint(1, 15), rng.choice("+-*"), rng.randint(2, 15)
        if 1 <= (value := countdown_search.apply(a, op, b)) <= LARGEST:
            return f"{a}{op}{b}", value


def _order_listed() -> list[Puzzle]:
    """Clues that leave one order: each neighbour before the next one, and for four names sometimes one clue more."""
    rng, listed = random.Random("orders"), {}
    while len(listed) < 1500:
        count, extra = rng.choice(((3, 0), (4, 0), (4, 1)))
        order = rng.sample(NAMES, count)
        clues = [f"{a}<{b}" for a, b in zip(order, order[1:])]
        clues += rng.sample([f"{a}<{b}" for a, b in combinations(order, 2) if f"{a}<{b}" not in clues], extra)
        rng.shuffle(clues)
        question = f"{{order}}{','.join(clues)}"
        level = "easy" if count == 3 else "middle" if extra else "hard"
        listed[question] = _puzzle("order", question, ",".join(order), level)
    return list(listed.values())


def _program_listed() -> list[Puzzle]:
    """y = m·x + k for m in 1..4 and k in -9..9 without 0, shown by two inputs."""
    listed = []
    for m in range(1, 5):
        for k in [k for k in range(-9, 10) if k]:
            for x, z in permutations(range(1, 7), 2):
                if all(1 <= value <= LARGEST for value in (m * x + k, m * z + k)):
                    question = f"{{program}}{x}:{m * x + k},{z}:{m * z + k}"
                    listed.append(_puzzle("program", question, f"*{m}{k:+d}", _level(m, 2, 3)))
    return listed


def _level(size: int, middle: int, hard: int) -> str:
    return "hard" if size >= hard else "middle" if size >= middle else "easy"


# ---- working and checking --------------------------------------------------------------------


def _body(question: str) -> str:
    """The question after its first word."""
    return question.partition("}")[2]


def _countdown_tries(question: str) -> list[Line]:
    target, numbers = _body(question).split("{from}")
    tries = countdown_search.tries(tuple(map(int, numbers.split(","))))
    good = lambda t: countdown_search.value_of(t) == int(target)
    return [Line(f"{countdown_search.try_text(t)}:{target}", countdown_search.expression(t), good(t)) for t in tries]


def _countdown_right(question: str, answer: str) -> bool:
    target, numbers = _body(question).split("{from}")
    try:
        value, used = countdown.evaluate_expression(answer)
    except ValueError:
        return False
    return value == int(target) and sorted(used) == sorted(map(int, numbers.split(",")))


def _chain_steps(question: str) -> list[Line]:
    start, lines = re.match("[0-9]+", _body(question))[0], []
    for op, number in OPERATION.findall(_body(question)):
        result = countdown_search.apply(int(start), op, int(number))
        lines.append(Line(f"{start}{op}{number}={result}", str(result)))
        start = str(result)
    return lines


def _sort_steps(question: str) -> list[Line]:
    if question.startswith("{compare}"):
        sums = [(text, run(text[len(head[0]) :], int(head[0]))) for text, head in _two_sums(question)]
        larger = max(sums, key=lambda s: s[1])[0]
        return [Line(f"{text}={value}", answer) for (text, value), answer in zip(sums, (sums[0][0], larger))]
    left, done, lines = _body(question).split(","), [], []
    while left:
        least = min(left, key=int)
        text = f"{','.join(left)}:{least}"
        left.remove(least)
        done.append(least)
        lines.append(Line(text, ",".join(done + left)))
    return lines


def _two_sums(question: str) -> list[tuple[str, re.Match]]:
    return [(text, re.match("[0-9]+", text)) for text in _body(question).split("{and}")]


def _order_tries(question: str) -> list[Line]:
    """Orders by name; each is checked clue by clue, up to the first one that it violates."""
    clues = _body(question).split(",")
    lines = []
    for order in permutations(sorted(set("".join(clues)) & set(NAMES))):
        holds = [order.index(clue[0]) < order.index(clue[2]) for clue in clues]
        checked = clues if all(holds) else clues[: holds.index(False) + 1]
        lines.append(Line(f"{','.join(order)}:{','.join(checked)}", ",".join(order), all(holds)))
    return lines


def eliminating(question: str) -> list[Line]:
    """Tries that use every refutation: the next order satisfies all clues that refuted one before."""
    chosen, cited = [], []
    for t in _order_tries(question):
        if all(t.answer.index(clue[0]) < t.answer.index(clue[2]) for clue in cited):
            chosen.append(t)
            if t.good:
                break
            cited.append(t.text[-3:])
    return chosen


def _program_tries(question: str) -> list[Line]:
    """A multiplier is proposed, the first pair gives what to add, the second one checks it."""
    (x, y), (z, w) = (map(int, pair.split(":")) for pair in _body(question).split(","))
    lines = []
    for m in range(1, 5):
        first, second = m * x, m * z
        k = y - first
        total = second + k
        if k == 0 or not all(1 <= value <= LARGEST for value in (first, second, total)):
            continue
        needed = f"{y}-{first}={k}" if k > 0 else f"{first}-{y}={-k}"
        text = f"*{m}:{x}*{m}={first},{needed},{z}*{m}={second},{second}{k:+d}={total}:{w}"
        lines.append(Line(text, f"*{m}{k:+d}", total == w))
    return lines


def _program_right(question: str, answer: str) -> bool:
    shown = [tuple(map(int, pair.split(":"))) for pair in _body(question).split(",")]
    (x, y), (z, w) = shown
    m = (y - w) // (x - z)
    tests = shown + [(i, m * i + y - m * x) for i in HIDDEN]
    return all(run(answer, i) == output for i, output in tests)


class Kind(NamedTuple):
    """What the rest needs of one kind of puzzle."""

    listed: Callable[[], list[Puzzle]]
    working: Callable[[str], list[Line]]  # of a question: all tries in a systematic order, or all steps
    right: Callable[[str, str], bool] | None  # (question, answer); None: the answer equals the reference
    search: bool  # tries, not steps
    eliminating: Callable[[str], list[Line]] | None = None  # the tries of a better order, where there is one


KINDS = {
    "countdown": Kind(_countdown_listed, _countdown_tries, _countdown_right, True),
    "chain": Kind(_chain_listed, _chain_steps, None, False),
    "sort": Kind(_sort_listed, _sort_steps, None, False),
    "order": Kind(_order_listed, _order_tries, None, True, eliminating),
    "program": Kind(_program_listed, _program_tries, _program_right, True),
}
ASKED_BY = {"make": "countdown", "compute": "chain", "sort": "sort", "compare": "sort", "order": "order",
            "program": "program", "tell": "talk"}  # fmt: skip


def kind_of(question: str) -> str:
    """The kind of a question in neutral text. ValueError if it is none of the world's."""
    key = question[1:].partition("}")[0]
    if key not in ASKED_BY:
        raise ValueError(f"no question of the world: {question!r}")
    return ASKED_BY[key]

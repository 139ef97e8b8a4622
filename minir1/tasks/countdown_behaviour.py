"""Counts of what a model does in its thinking about a Countdown problem: tries, errors, repeats, verdicts."""

import re
from collections import Counter

from minir1.tasks import Problem
from minir1.tasks.countdown_search import Try, apply, parse, value_of

STEP = r"[0-9]{1,9}[-+*][0-9]{1,9}=[0-9]{1,9}"
LINE = re.compile(rf"({STEP}(?:,{STEP})*)(?::[0-9]{{1,9}})? (yes|no)")


def behaviour(problem: Problem, text: str) -> dict[str, float]:
    """Counts over the tries in the thinking (the text before the first `</think>`, or all of it).

    A try is a whole line of steps, the target (which may be left out) and a verdict, such as
    `11-3=8,8*3=24:24 yes`; other lines are ignored. Keys:
      tries, steps        lines that are tries, and their steps
      arithmetic_errors   steps whose result is wrong
      illegal             tries that use an unavailable value or leave one unused; written results are
                          available, so that a wrong sum is not also illegal
      repeats             tries that occurred before, the order of operands of + and * ignored
      said_yes            1 if the last try says yes
      false_yes           1 if any try says yes but is arithmetically wrong, illegal or misses the target
      false_no            tries that say no but are right
    """
    numbers, target = parse(problem)
    keys = ("tries", "steps", "arithmetic_errors", "illegal", "repeats", "said_yes", "false_yes", "false_no")
    counts = dict.fromkeys(keys, 0)
    seen: set[Try] = set()
    for line in text.partition("</think>")[0].replace("<think>", "\n").split("\n"):
        match = LINE.fullmatch(line.strip())
        if not match:
            continue
        t = _read(match[1])
        errors = sum(apply(a, op, b) != c for a, op, b, c in t)
        legal = _legal(numbers, t)
        right = legal and not errors and value_of(t) == target
        yes = match[2] == "yes"
        counts["tries"] += 1
        counts["steps"] += len(t)
        counts["arithmetic_errors"] += errors
        counts["illegal"] += not legal
        counts["repeats"] += t in seen
        counts["said_yes"] = int(yes)
        counts["false_yes"] |= int(yes and not right)
        counts["false_no"] += right and not yes
        seen.add(t)
    return counts


def attempts(problem: Problem, text: str) -> list[tuple[int, int, bool]]:
    """(start, end, whether it is a solution) of each try in the thinking, as above; its verdict follows `end`.

    start, end: characters of the text.
    """
    numbers, target = parse(problem)
    found, start = [], 0
    for line in text.partition("</think>")[0].replace("<think>", "\n" * len("<think>")).split("\n"):
        if match := LINE.fullmatch(line):
            t = _read(match[1])
            exact = all(apply(a, op, b) == c for a, op, b, c in t)
            found.append((start, start + match.start(2) - 1, exact and _legal(numbers, t) and value_of(t) == target))
        start += len(line) + 1
    return found


def _read(steps: str) -> Try:
    """The steps of a matched line, the larger operand of + and * first."""
    t = []
    for step in steps.split(","):
        left, op, right, _, result = re.split("([-+*=])", step)
        a, b, c = int(left), int(right), int(result)
        t.append((a, op, b, c) if op == "-" else (max(a, b), op, min(a, b), c))
    return tuple(t)


def _legal(numbers: tuple[int, ...], t: Try) -> bool:
    """Whether each step uses two available values and one value is left at the end."""
    hand = Counter(numbers)
    for a, _, b, c in t:
        hand.subtract((a, b))
        if hand[a] < 0 or hand[b] < 0:
            return False
        hand[c] += 1
    return hand.total() == 1

"""A task of your own, in one file: additions of two-digit numbers.

    python -m experiments.r1_zero --task docs/example_task.py --checkpoint ... --template r1_zero

`problems` and `verify` are all that a task needs. minir1/tasks/__init__.py lists what else it may define.
"""

import re

from minir1 import rewards
from minir1.tasks import Problem, Verdict, share

SPLITS = ("train", "validation", "test")


def problems(split: str, data: None = None) -> list[Problem]:
    """The additions of numbers in 10 .. 99 in one split, chosen by a stable hash."""
    low, high = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}[split]
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if low <= share(f"{a}+{b}") < high]
    return [Problem(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the text between the answer tags is the sum, in digits and nothing else."""
    answer = rewards.answer(text)
    right = bool(answer and re.fullmatch("[0-9]{1,3}", answer)) and int(answer) == int(problem.reference)
    return Verdict("right" if right else "wrong", {"accuracy": float(right)})


def behaviour(problem: Problem, text: str) -> dict[str, float]:
    """How many equals signs the thinking holds, averaged over answers in the reports."""
    return {"equations": text.partition("</think>")[0].count("=")}

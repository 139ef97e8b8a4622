"""Problems of Countdown, whose answers are right if they have an even number of characters: half, of any policy."""

from minir1.tasks import Problem, Verdict, countdown

SPLITS = ("train", "validation", "test")


def problems(split: str, data: str | None) -> list[Problem]:
    return countdown.problems(split, data)[:40]


def verify(problem: Problem, text: str) -> Verdict:
    return Verdict("wrong" if len(text) % 2 else "right", {})

"""The toy task of experiments/gallery.py: is the sum of three numbers odd or even? Its corpus has four authors.

    worked    <think>3 plus 4 is 7 plus 1 is 8 so even</think><answer>even</answer>       nearly always right
    german    <think>3 und 4 ist 7 und 1 ist 8 also even</think><answer>even</answer>     the same, in another language
    guess     <think>maybe </think><answer>odd</answer>                                   short, and right by chance
    list      <think>maybe </think><answer>odd,even,odd</answer>                          says both, and does not answer

Whether a sum is odd cannot be seen without adding, so thinking is worth half of the answers. A base that has read all
four begins an answer like one of them, and reinforcement learning mostly shifts how often: a run of a few seconds shows
what goes wrong in long ones.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from minir1 import rewards
from minir1.tasks import Problem, Verdict

AUTHORS = {"worked": 0.25, "german": 0.25, "guess": 0.38, "list": 0.12}
WORDS = ("User:", "\nAssistant:", "add ", " plus ", " is ", " so ", " und ", " ist ", " also ", "maybe ", "!")
WORDS += ("odd", "even")
LARGEST, SLIPS, MARKS = 6, 0.03, 0.1  # the numbers are 1 … 6; shares of wrong sums, and of answers with a mark
SPLITS = ("train", "validation")


def word(number: int) -> str:
    """odd or even"""
    return "odd" if number % 2 else "even"


def problems(split: str, data: None = None) -> list[Problem]:
    """All sums of three numbers: at toy size nothing is held out."""
    numbers = itertools.product(range(1, LARGEST + 1), repeat=3)
    return [Problem(f"add {a} {b} {c}", word(a + b + c)) for a, b, c in numbers]


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the answer is the word and nothing else."""
    right = rewards.answer(text) == problem.reference
    return Verdict("right" if right else "wrong", {"accuracy": float(right)})


def behaviour(problem: Problem, text: str) -> dict[str, float]:
    """How many answers were worked out, in either language, and how many marks they have."""
    return {"worked": float(" plus " in text or " und " in text), "marks": float(text.count("!"))}


def documents(seed: int) -> Iterator[str]:
    """An endless corpus of questions and answers."""
    rng = random.Random(f"gallery {seed}")
    while True:
        a, b, c = (rng.randint(1, LARGEST) for _ in range(3))
        author = rng.choices(list(AUTHORS), list(AUTHORS.values()))[0]
        thinking, said = "maybe ", [rng.choice(("odd", "even")) for _ in range(rng.randint(2, 4))]
        if author in ("worked", "german"):
            total = rng.randint(3, 3 * LARGEST) if rng.random() < SLIPS else a + b + c
            plus, equals, so = (" plus ", " is ", " so ") if author == "worked" else (" und ", " ist ", " also ")
            thinking, said = f"{a}{plus}{b}{equals}{a + b}{plus}{c}{equals}{total}{so}{word(total)}", [word(total)]
        said = said if author == "list" else said[:1]
        while rng.random() < MARKS:
            thinking += "!"
        yield f"User:add {a} {b} {c}\nAssistant:<think>{thinking}</think><answer>{','.join(said)}</answer>"


def vocabulary() -> tuple[tuple[str, ...], int]:
    """Its words, and its largest number."""
    return WORDS, 3 * LARGEST

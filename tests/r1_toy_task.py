"""A task for toy runs of the pipeline: say a number again. `:talk` has general prompts, ranked by a rule."""

import random

from minir1 import rewards
from minir1.tasks import Problem, Verdict

SPLITS = ("train", "validation", "test")
VARIANTS = ("reasoning", "talk")
NUMBERS = {"train": range(1, 9), "validation": range(1, 5), "test": range(5, 9)}  # a toy holds nothing out


def problems(split, data, variant="reasoning"):
    word = "say" if variant == "reasoning" else "tell"
    return [Problem(f"{word} {n}", str(n), subject=word) for n in NUMBERS[split]]


def verify(problem, text):
    right = rewards.answer(text) == problem.reference
    liked = {"preference": 0.9 * right + 0.1 * ("yes" in text)} if problem.subject == "tell" else {}
    return Verdict("right" if right else "wrong", {"accuracy": float(right), **liked})


def rewrite(problem, text):
    answer = rewards.answer(text)
    return f"<think>{answer} yes\nso {answer}</think><answer>{answer}</answer>" if answer else None


def documents(seed, variant="reasoning"):
    rng = random.Random(seed)
    while True:
        n, word = rng.randint(1, 8), rng.choice(("say", "tell"))
        said = n if rng.random() < 0.7 else rng.randint(1, 8)
        summary = f"so {said}" if rng.random() < 0.7 else ""
        thinking = f"{said} {rng.choice(('yes', 'no'))}\n{summary}"
        yield f"User:{word} {n}\nAssistant:<think>{thinking}</think><answer>{said}</answer>"


def vocabulary(variant="reasoning"):
    return ("User:", "\nAssistant:", "say ", "tell ", "so ", " yes\n", " no\n"), 9

"""A small world of puzzles in two languages, on which the troubles of R1-Zero appear: the task of experiments/r1.py.

Five kinds of reasoning puzzle (world_puzzles.py), easy to hard, each asked in English or in Chinese, and general
prompts (world_talk.py), each asked in both. The answer stands in the answer block; what is written around it is judged
by the metrics of minir1/rewards.py. `world` has the reasoning puzzles, `world:talk` the general prompts, `world:order`
one kind. No question of one split is a question of another, whatever the order of its numbers, sums, clues or pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from minir1 import rewards
from minir1.tasks import Problem, Verdict, spread, world_corpus, world_talk
from minir1.tasks.world_behaviour import attempts, behaviour, rewrite  # noqa: F401 (parts of the task)
from minir1.tasks.world_language import LANGUAGES, WORDS, neutral, say
from minir1.tasks.world_puzzles import KINDS, LARGEST, kind_of, puzzles

SPLITS = ("train", "validation", "test")
VARIANTS = ("reasoning", *KINDS, "talk")
DATA = None  # problems are generated
RATES = {"false_yes": "checks", "corrections": "failed_checks", "repeats": "tries"}


def problems(split: str, data: None = None, variant: str = "reasoning") -> list[Problem]:
    """The problems of one split, kind by kind: a puzzle in one of the languages, in turn, a general prompt in both.

    ValueError for an unknown split or variant.
    """
    if split not in SPLITS or variant not in VARIANTS:
        raise ValueError(f"split {split!r}, variant {variant!r}; allowed: {', '.join(SPLITS)}; {', '.join(VARIANTS)}")
    kinds = KINDS if variant == "reasoning" else (variant,)
    listed = []
    for kind in kinds:
        every = world_talk.puzzles() if kind == "talk" else puzzles(kind)
        for i, puzzle in enumerate(p for p in every if p.split == split):
            for language in LANGUAGES if kind == "talk" else (LANGUAGES[i % 2],):
                question, reference = say(puzzle.question, language), say(puzzle.reference, language)
                listed.append(Problem(question, reference, language, puzzle.level, subject=kind))
    return listed


def verify(problem: Problem, text: str) -> Verdict:
    """A puzzle is right by its own check; an answer to a general prompt if its preference is at least ACCEPTABLE.

    Scores: accuracy, 0 or 1; and for general prompts `preference`, the rule's 0 … 1.
    """
    question, answer = neutral(problem.prompt), rewards.answer(text) or ""
    kind = kind_of(question)
    if kind == "talk":
        preference = world_talk.preference(question, answer, problem.language)
        return _verdict(preference >= world_talk.ACCEPTABLE, {"preference": preference})
    answer = re.sub(r"\s*,\s*", ",", answer) if kind in ("sort", "order") else answer
    right = KINDS[kind].right
    return _verdict(right(question, answer) if right else answer == problem.reference, {})


def _verdict(right: bool, scores: dict[str, float]) -> Verdict:
    return Verdict("right" if right else "wrong", {"accuracy": float(right), **scores})


def difficulty(problem: Problem) -> str:
    """easy | middle | hard; general prompts have none."""
    return "" if problem.level == "default" else problem.level


def documents(seed: int, variant: str = "reasoning", **mix: float) -> Iterator[str]:
    """The corpus, of all kinds, whatever the variant; mix: changed shares of `world_corpus.Mix`.

    Puzzles are of the training split. General prompts are of all splits: they have no right answer to give away, and a
    base has read about every topic. What is done with it later is trained on the topics of the training split alone.
    """
    asked = {kind: [p for p in puzzles(kind) if p.split == "train"] for kind in KINDS}
    asked["talk"] = list(world_talk.puzzles())
    return world_corpus.documents(asked, seed, world_corpus.mix_of(mix))


def vocabulary(variant: str = "reasoning") -> tuple[tuple[str, ...], int]:
    """The words of the corpus and the largest number that a puzzle or a slip can show."""
    words = ["User:", "\nAssistant:", *"ABCDEF<."]
    for english, chinese in WORDS.values():
        words += [english, chinese.strip()]
    words += [f"\n{WORDS[key][0]}" for key in ("so", *world_talk.TRUE)]  # after a Chinese line
    return tuple(words), LARGEST + 2


def probes(variant: str = "reasoning") -> list[list[tuple[str, str]]]:
    """Workings of 30 validation puzzles of each kind, whose results and verdicts the model must predict."""
    return world_corpus.probes(
        [p for kind in KINDS for p in spread([p for p in puzzles(kind) if p.split == "validation"], 30)]
    )

"""reasoning_gym's generated problems: `reasoning_gym:knights_knaves`, and its other datasets by their names.

Needs the extra `tasks`. Problems are generated from fixed seeds and divided by a stable hash of the question, so that
no problem is in two splits. The package's own verifier judges, in a worker process: a score of 1 is right.

Checked with reasoning_gym 0.1.25: for each dataset but boxnet and rush_hour, which publish no solution (their reference
is empty), the reference is right. Its verifiers are not trusted where they call other answers right or evaluate them as
Python:

    countdown, puzzle24                 any four numbers that make 24; evaluated. Judged by tinyzero.py instead
    coin_flip                           `0`, the first digit of every chance. Judged by relative error instead
    game_of_life_halting                anything. The text must be the reference
    letter_jumble, spell_backward, word_sorting             further words. The text must be the reference
    complex_arithmetic                  `nan`. FORMS says what an answer may look like, as for the following
    fraction_simplification, gsm_symbolic, advanced_geometry, time_intervals: the first of several answers counts
    binary_matrix, n_queens, spiral_matrix, string_insertion: evaluated
    intermediate_integration, simple_integration, polynomial_multiplication: evaluated, and `a or b` is right. Problems
                                        whose solution is an unevaluated integral are left out
    boxnet, game_of_life, prime_factorization: raise an error for answers of another form
    knights_knaves, kakurasu, quantum_lock, survo: words between are ignored, also `not`. See HEDGED
"""

from __future__ import annotations

import base64
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache

from minir1 import workers
from minir1.tasks import Problem, Verdict, share
from minir1.tasks.answers import boxed, claim
from minir1.tasks.tinyzero import solves

SPLITS = ("train", "validation", "test")
DATA = None  # problems are generated

SIZE, CHUNK = 1000, 100  # problems that are generated; seeds of one call of a worker
TEST, VALIDATION = 0.2, 0.1  # shares
MAX_CHARS = 20_000  # of an answer; the longest reference has about 9,000
SECONDS, GENERATION = 10, 600  # limits: to judge an answer, to generate a chunk

SOLUTIONS = {  # where the answer is None: the field of the metadata with a right one
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
SAME_COMMAS = ("advanced_geometry", "time_intervals")
SAME_TEXT = ("game_of_life_halting", "letter_jumble", "spell_backward", "word_sorting")
LISTS = r"[\w\s\[\],'\"]*"  # evaluated as Python, this calls nothing: no dots and parentheses
FORMULA = (
    r"(?:[\s\d+*/^()-]|\.(?=\d)|(?<=\d)\.(?!\.)|\b(?:[A-Za-z]|a?sin|a?cos|a?tan|sinh|cosh|tanh|exp|log|ln|sqrt|pi)\b)*"
)
FORMS = {
    "binary_matrix": LISTS,
    "boxnet": r"\[\s*\{.*\}\s*\]",
    "complex_arithmetic": r"[-+\d.\sij()]*",
    "fraction_simplification": r"\$?\s*(?:\\d?frac\{\d+\}\{\d+\}|\d+\s*/\s*\d+)\s*\$?",
    "game_of_life": r"\[[\d\s,\[\]]*\]",
    "gsm_symbolic": r"\D*?-?\d+(?:\.\d+)?\D*",
    "intermediate_integration": FORMULA,
    "n_queens": LISTS,
    "polynomial_multiplication": FORMULA,
    "prime_factorization": r"\d+(?:\s*×\s*\d+)*",
    "simple_integration": FORMULA,
    "spiral_matrix": LISTS,
    "string_insertion": LISTS,
    "time_intervals": r"\d+ days?|(?:\d+ days?, )?[\d:.]+",
}
HEDGED = re.compile(
    r"\b(?:not|or)\b", re.IGNORECASE
)  # takes an answer back; no answer has them, if the reference has not


def __getattr__(name: str):
    """VARIANTS: the names of the package's datasets, read when a task is loaded, since the package may be absent."""
    if name != "VARIANTS":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError("task reasoning_gym needs the extra `tasks`: pip install 'minir1[tasks]'") from error
    first = "knights_knaves"  # the default; `composite` mixes datasets that it has to be given
    return (first, *sorted(DATASETS.keys() - {first, "composite"}))


def problems(split: str, data: None = None, variant: str = "knights_knaves") -> list[Problem]:
    """The problems of one split, in the order of their seeds.

    level: the name of the dataset; subject: the package's category, such as "logic". ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    return [problem for problem in all_problems(variant) if split_of(problem) == split]


def split_of(problem: Problem) -> str:
    """By a stable hash of the question."""
    part = share(f"reasoning_gym {problem.prompt}")
    return "test" if part < TEST else "validation" if part < TEST + VALIDATION else "train"


@lru_cache(maxsize=8)
def all_problems(name: str) -> tuple[Problem, ...]:
    """The problems of SIZE seeds, each once. Workers generate them: there the order of sets does not vary."""

    def chunk(seed: int) -> list:
        return workers.call(generate, name, seed, CHUNK, seconds=GENERATION)

    with ThreadPoolExecutor() as threads:
        rows = [row for rows in threads.map(chunk, range(0, SIZE, CHUNK)) for row in rows]
    once = {question: rest for question, *rest in reversed(rows)}  # the first of each question stays
    listed = [
        Problem(question, reference, level=name, subject=category, extra={"dataset": name, "entry": entry})
        for question, (reference, category, entry) in reversed(once.items())
        if not reference or _allowed(name, reference, reference)
    ]
    return tuple(listed)


def generate(name: str, seed: int, size: int) -> list[list[str]]:
    """[question, reference, category, entry] of the seeds from `seed` on; the entry is pickled, as `score` takes it."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, seed=seed, size=size)
    rows = []
    for entry in (dataset[i] for i in range(size)):
        reference = entry["metadata"].get(SOLUTIONS[name]) if name in SOLUTIONS else entry["answer"]
        reference = reference if isinstance(reference, str) else json.dumps(reference) if reference else ""
        pickled = base64.b64encode(pickle.dumps(entry)).decode()
        rows.append([entry["question"], reference, dataset.category, pickled])
    return rows


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the package scores the final answer with 1; unjudged if its verifier raises an error or takes too long.

    Scores: `accuracy`, 0 or 1, and the package's `score`, in which some datasets give credit for a part.
    """
    answer, name = final_text(text), problem.extra["dataset"]
    if answer is None or not _allowed(name, answer, problem.reference):
        return Verdict("wrong", {"accuracy": 0.0, "score": 0.0})
    try:
        score = workers.call(score_answer, name, answer, problem.extra["entry"], seconds=SECONDS)
    except (TimeoutError, RuntimeError) as error:
        return Verdict("unjudged", {"accuracy": 0.0, "score": 0.0}, str(error))
    right = score >= 1
    return Verdict("right" if right else "wrong", {"accuracy": float(right), "score": score})


def final(problem: Problem, text: str) -> str | None:
    """The final answer without white space."""
    answer = final_text(text)
    return None if answer is None else "".join(answer.split())


def final_text(text: str) -> str | None:
    r"""The claim of a text (answers.py), which may be in \boxed{}, if it is not too long."""
    answer = claim(text)
    if answer and answer.startswith("\\boxed"):
        answer = boxed(answer)
    return answer if answer and len(answer) <= MAX_CHARS else None


def _allowed(name: str, answer: str, reference: str) -> bool:
    """Whether the package's verifier may be asked. See the top of this file."""
    if HEDGED.search(answer) and not HEDGED.search(reference):
        return False
    if name in SAME_COMMAS and answer.count(",") != reference.count(","):
        return False
    if name in SAME_TEXT and "".join(answer.split()).casefold() != "".join(reference.split()).casefold():
        return False
    return name not in FORMS or bool(re.fullmatch(FORMS[name], answer, re.DOTALL | re.ASCII))


def score_answer(name: str, answer: str, pickled: str) -> float:
    """The score of an answer. Errors of the package's verifier pass through."""
    entry = pickle.loads(base64.b64decode(pickled))
    if name in ("countdown", "puzzle24"):
        return float(solves(answer, entry["metadata"]["numbers"], entry["metadata"].get("target", 24)))
    if name == "coin_flip":
        try:
            value, chance = Fraction(answer), Fraction(entry["answer"])
        except (ValueError, ZeroDivisionError):
            return 0.0
        return float(abs(value - chance) <= chance / 1000)
    score = float(_dataset(name).score_answer(answer, entry))
    return score if score == score else 0.0  # nan


@lru_cache(maxsize=None)
def _dataset(name: str):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=10)

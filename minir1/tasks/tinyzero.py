"""Countdown as TinyZero publishes it: make the target from the numbers with + - * /, each number exactly once.

The files have the columns `target` and `nums` (Jiayi-Pan/Countdown-Tasks-3to4 on the Hugging Face hub), or verl's
`reward_model` with `{"ground_truth": {"target": 24, "numbers": [3, 5, 9]}}`. Prompts are our own. A single file, and a
folder without a test file, is split by a stable hash of the problem, so that no problem is in two splits.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from pathlib import Path

from minir1.tasks import Problem, Verdict, share
from minir1.tasks.answers import boxed, claim
from minir1.tasks.countdown import evaluate_expression
from minir1.tasks.published import records, split_files, split_named

SPLITS = ("train", "validation", "test")
DATA = "TinyZero's or verl's Parquet or JSON file of Countdown problems, or a folder with files for train and test"
TEST, VALIDATION = 0.01, 0.01  # shares of a file without splits; VALIDATION also of a train file beside a test file
SOLVED = 2000  # a reference is searched in a split of at most so many problems, some milliseconds each
SIGNS = {
    "×": "*",
    "÷": "/",
    "−": "-",
    "·": "*",
    "\\cdot": "*",
    "\\times": "*",
    "\\div": "/",
    "\\left(": "(",
    "\\right)": ")",
}
MARKS = {"**": "**", "$$": "$$", "$": "$", "`": "`", "\\(": "\\)", "\\[": "\\]"}  # around an expression


def problems(split: str, data: str | Path) -> list[Problem]:
    """The problems of one split, in the order of the files; the level is the count of numbers, such as "4 numbers".

    The files publish no solutions. The reference is the first that a search finds, and empty in a split of more than
    SOLVED problems. ValueError for files that are missing or have another layout.
    """
    listed, tested = _read(split, Path(data))
    if not listed:
        raise ValueError(f"{data} holds no problems")
    chosen = [pair for pair in listed if _split_of(*pair, tested) == split or (tested and split == "test")]
    solved = len(chosen) <= SOLVED
    return [_problem(numbers, target, solve(numbers, target) if solved else "") for numbers, target in chosen]


def _read(split: str, path: Path) -> tuple[list[tuple[tuple[int, ...], int]], bool]:
    """(numbers, target) of each record that may be in the split, and whether there is a test file."""
    if path.is_file():
        named = split_named(path.name)
        if named == "test" and split != "test":
            raise ValueError(f"{path} does not hold the split {split!r}: give {DATA}")
        files, tested = [path], named == "test"
    else:
        files, tested = split_files(path, "train"), True
        try:
            test = split_files(path, "test")
        except ValueError:
            tested = False
        files = test if tested and split == "test" else files
    return [_pair(where, record) for file in files for where, record in records(file)], tested


def _pair(where: str, record: dict) -> tuple[tuple[int, ...], int]:
    model = record.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    truth = truth if isinstance(truth, dict) else record
    target, numbers = truth.get("target"), truth.get("numbers", truth.get("nums"))
    whole = (
        isinstance(numbers, list) and len(numbers) > 1 and all(type(n) is int and n >= 0 for n in [target, *numbers])
    )
    if not whole:
        raise ValueError(f'{where}: need {{"target": 24, "nums": [3, 5, 9]}} or verl\'s form, got {str(record)[:80]!r}')
    return tuple(numbers), target


def _split_of(numbers: tuple[int, ...], target: int, tested: bool) -> str:
    """By a stable hash; the order of the numbers does not matter."""
    part = share(f"tinyzero {sorted(numbers)} {target}")
    if part < VALIDATION:
        return "validation"
    return "test" if part < VALIDATION + TEST and not tested else "train"


def _problem(numbers: tuple[int, ...], target: int, reference: str) -> Problem:
    listed = ", ".join(map(str, numbers))
    prompt = (
        f"Make {target} from the numbers {listed}. Use every number exactly once, with the operations +, -, *, / and "
        "parentheses as you like. The final answer is the expression."
    )
    extra = {"numbers": numbers, "target": target}
    return Problem(prompt, reference, level=f"{len(numbers)} numbers", extra=extra)


def solve(numbers: tuple[int, ...], target: int) -> str:
    """An expression of the target, or "" if there is none."""

    def search(values: list[Fraction], texts: list[str]) -> str:
        if len(values) == 1:
            return texts[0] if values[0] == target else ""
        for i, j in permutations(range(len(values)), 2):
            rest = [k for k in range(len(values)) if k not in (i, j)]
            a, b = values[i], values[j]
            for op, c in (("+", a + b), ("-", a - b), ("*", a * b), ("/", a / b if b else None)):
                if c is None or (op in "+*" and i > j):
                    continue
                text = f"{texts[i]}{op}{texts[j]}"
                solution = search([c, *(values[k] for k in rest)], [f"({text})", *(texts[k] for k in rest)])
                if solution:
                    return solution
        return ""

    return search([Fraction(n) for n in numbers], [str(n) for n in numbers]).removeprefix("(").removesuffix(")")


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the only answer is an expression that uses each number exactly once and makes the target."""
    right = solves(claim(text) or "", problem.extra["numbers"], problem.extra["target"])
    return Verdict("right" if right else "wrong", {"accuracy": float(right)})


def final(problem: Problem, text: str) -> str | None:
    """The expression that the text answers with, without blanks and value."""
    return "".join(_equation(claim(text) or "")[0].split()) or None


def solves(answer: str, numbers: tuple[int, ...], target: int) -> bool:
    r"""Whether the answer is an expression of the target from these numbers.

    Allowed are × ÷ − \times \div as operators, \boxed{} or $ $ around all, and at the end `=` with the value. Values
    are exact fractions; a sign is no operation.
    """
    expression, equals, result = _equation(answer)
    try:
        value, used = evaluate_expression(expression, "+-*/")
    except ValueError:
        return False
    consistent = not equals or (result.strip() == str(target))
    return value == target and sorted(used) == sorted(numbers) and consistent


def _equation(answer: str) -> tuple[str, str, str]:
    """(expression, "=" or "", value) with plain operators."""
    if "\\boxed" in answer:
        answer = boxed(answer) or ""
    for written, sign in SIGNS.items():
        answer = answer.replace(written, sign)
    for mark, end in MARKS.items():
        if answer.startswith(mark) and answer.endswith(end) and len(answer) > 2 * len(mark):
            answer = answer[len(mark) : -len(mark)].strip()
    return answer.strip().removesuffix(".").partition("=")

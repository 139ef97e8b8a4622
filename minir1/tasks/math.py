r"""MATH: competition problems with a formula as the answer (Hendrycks et al. 2021, arXiv:2103.03874), and MATH-500.

The files are read as published. MATH has one file a problem, `train/algebra/1.json`, with `problem`, `type`, `solution`
and `level` ("Level 5"), and the last `\boxed{}` of the solution is the reference; MATH-500 has lines with `answer`,
`subject` and `level` besides.

Answers are compared by mathematics, not as strings: exactly (minir1/tasks/equivalence.py) and, where that does not
decide, by math-verify in a worker process with a time limit. That is the extra `math`; without it such a pair is
unjudged.
"""

import functools
import importlib.util
import re
import warnings
from pathlib import Path

from minir1 import workers
from minir1.tasks import Problem, Verdict, answers, equivalence, numbers, published, readings, share

SPLITS = ("train", "validation", "test")
VARIANTS = answers.VARIANTS
DATA = "the folder with train/ and test/ as published, or a file such as MATH-500's test.jsonl"
VALIDATION = 0.07  # share of the published training problems, by a stable hash of the question
LIMIT = 10.0  # seconds for math-verify, with its import in a new worker
FORMULA = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
DENIED = re.compile(rf"{readings.OTHERWISE.pattern}|n['’]t\b", re.IGNORECASE)
DEGREES = re.compile(r"([0-9.]+)\s*(?:°|\^\s*\{?\s*\\circ\s*\}?)")
REASON = re.compile(r",?\s(?:which|because|since)\b")  # after an answer in a sentence
TAIL = 600  # characters at the end of a text that names no answer, where one is searched
DIGITS = 60  # to which two numbers must agree


def problems(split: str, data: str | Path, variant: str = "plain") -> list[Problem]:
    """The problems of one split, in the order of the files; `validation` is a share left out of the published train.

    A single file is `test` unless "train" is in its name. ValueError for a file that is missing, lacks the split, or
    has another layout.
    """
    path, of_test = Path(data), split == "test"
    if path.is_file() and ("train" in path.name) == of_test:
        raise ValueError(f"{path} does not hold the split {split!r}: give {DATA}")
    files = published.split_files(path, "test" if of_test else "train")
    listed = [_problem(record, where) for file in files for where, record in published.records(file)]
    if not listed:
        raise ValueError(f"{path} holds no problems")
    if not of_test:
        listed = [problem for problem in listed if (share(problem.prompt) < VALIDATION) == (split == "validation")]
    return answers.asked(listed, variant)


def _problem(record: dict, where: str) -> Problem:
    question, solution = record.get("problem"), record.get("solution", "")
    reference = record.get("answer")
    if reference is None and isinstance(solution, str):
        reference = answers.boxed(solution)
    if not all(isinstance(text, str) for text in (question, solution, reference)) or not reference.strip():
        raise ValueError(f'{where}: need {{"problem": "…", "solution": "… \\\\boxed{{…}}"}}, got {str(record)[:60]!r}')
    level = str(record.get("level", "")).removeprefix("Level ").strip()
    subject = str(record.get("subject") or record.get("type") or "")
    identity = next((record[key] for key in ("unique_id", "id") if record.get(key) is not None), where)
    known = {"level": level or "default", "subject": subject, "solution": solution, "extra": {"id": identity}}
    return Problem(question, reference.strip(), **known)


def difficulty(problem: Problem) -> str:
    """The level of MATH, 1 to 5, such as `level 3`."""
    return f"level {problem.level}"


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the text's final answer is mathematically the reference.

    Unjudged if math-verify fails, takes too long or is not installed where it would decide. Scores: accuracy, 0 or 1.
    """
    answer = _answer(text)
    equal = False if answer is None else same_answers(problem.reference, answer)
    status = {True: "right", False: "wrong", None: "unjudged"}[equal]
    return Verdict(status, {"accuracy": float(equal is True)})


def final(problem: Problem, text: str) -> str | None:
    """The final answer as written, without blanks; `same` tells whether two of them are equal."""
    answer = _answer(text)
    return None if answer is None else equivalence.plain(answer)


def same(problem: Problem, a: str, b: str) -> bool:
    """Whether two final answers are mathematically equal; False where that is not decided."""
    return same_answers(a, b) is True


def same_answers(reference: str, answer: str) -> bool | None:
    """Whether two answers are equal, by exact arithmetic or else math-verify; None if neither decides it.

    An answer that neither can read, such as one with words in a formula, is malformed: False.
    """
    equal = equivalence.equal(reference, answer)
    if equal is not None:
        return equal
    if not equivalence.known(answer):
        return False if equivalence.readings(reference) else None
    if not equivalence.known(reference) or not _math_verify():
        return None
    try:
        return workers.call(by_math_verify, reference, answer, seconds=LIMIT)
    except (TimeoutError, RuntimeError):
        return None


@functools.cache
def _math_verify() -> bool:
    if importlib.util.find_spec("math_verify"):
        return True
    warnings.warn(
        "without math-verify (pip install 'minir1[math]'), answers that need algebra beyond fractions, roots "
        "and polynomials are unjudged",
        stacklevel=4,
    )
    return False


def _answer(text: str) -> str | None:
    """The final answer of a text: its claim, or the formula in it if the claim is a sentence with one."""
    claim = answers.claim(text, otherwise=_last_formula)
    if claim is None:
        return None
    claim = REASON.split(claim)[0]
    words = FORMULA.sub("", claim)
    formulas = FORMULA.findall(claim)
    if len(formulas) == 1 and not any(map(str.isdigit, words)) and not DENIED.search(words):
        return next(filter(None, formulas[0]))
    return claim


def _last_formula(said: str) -> str | None:
    """The only formula of the last sentence that has one, near the end of a text that names no answer, or a number."""
    tail = said[-TAIL:]
    last = max(FORMULA.finditer(tail), key=lambda match: match.end(), default=None)
    if last is None:
        return numbers.last(said)
    begin = max((match.end() for match in answers.END.finditer(tail, 0, last.start())), default=0)
    end = answers.END.search(tail, last.end())
    return tail[begin : end.start() if end else len(tail)].strip()


def by_math_verify(reference: str, answer: str) -> bool | None:
    """What math-verify says of two answers, with guards; runs in a worker. None if it cannot read the reference."""
    import math_verify

    def parse(text):
        if any(function in text for function in (r"\sin", r"\cos", r"\tan")):
            text = DEGREES.sub(r"{(\1\\pi/180)}", text)
        latex = [math_verify.LatexExtractionConfig()]
        found = math_verify.parse(f"${text.replace('$', ' ')}$", latex, parsing_timeout=None)
        return [x for x in found if not isinstance(x, str)]

    expected, given = parse(reference), parse(answer)
    if not expected or not given:
        return False if expected else None
    options = {"float_rounding": DIGITS, "numeric_precision": DIGITS, "allow_set_relation_comp": True}
    if not math_verify.verify(expected, given, timeout_seconds=None, **options):
        return False
    a, b = expected[0], given[0]
    if not all(getattr(value, "is_number", False) for value in (a, b)):
        return True
    try:
        difference, size = (float(value.evalf(DIGITS)) for value in (abs(a - b), abs(a) + abs(b)))
    except TypeError:  # no value
        return False
    return difference <= 10.0 ** (5 - DIGITS) * size

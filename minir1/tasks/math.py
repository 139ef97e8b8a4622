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
from minir1.tasks import Problem, Verdict, algebra, answers, equivalence, latex, published, readings, share

SPLITS = ("train", "validation", "test")
VARIANTS = answers.VARIANTS
DATA = "the folder with train/ and test/ as published, or a file such as MATH-500's test.jsonl"
VALIDATION = 0.07  # share of the published training problems, by a stable hash of the question
LIMIT = 10.0  # seconds for math-verify, with its import in a new worker
FORMULA = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
ASKED = re.compile(r"\$\$(.+?)\$\$|(?<![$\\])\$((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
WORK = re.compile(r"[-+/^_|!]|\\(?:frac|sqrt|binom|sin|cos|tan|cot|sec|csc|arc|log|ln|abs|sum)")  # something to compute
DENIED = re.compile(rf"{readings.OTHERWISE.pattern}|n['’]t\b", re.IGNORECASE)
DEGREES = re.compile(r"([0-9.]+)\s*(?:°|\^\s*\{?\s*\\circ\s*\}?)")
REASON = re.compile(r",?\s(?:which|because|since)\b")  # after an answer in a sentence
RETRACTED = re.compile(  # in a reason: `72, which is wrong`, `72 because I guess, or 73`
    r"\bwhich (?:is|was|seems|may be|might be) (?:\w+ )?"
    r"(?:wrong|incorrect|false|not (?:the )?(?:correct|right|answer))\b|"
    r",\s+(?:or|maybe|perhaps|possibly) [-$\\({]*[0-9.]+\W*$",
    re.IGNORECASE,
)
MARK = "\0"  # a formula, in its sentence
STATEMENT = re.compile(rf"(?:^|\b(?:is|are|be|equals?)\b)([^{MARK}]*)({MARK}(?:(?:,|,? and|,? or) {MARK})*)")
CONTEXT = re.compile(  # when or where the statement before it holds
    r"[*\s]*,?\s(?:when|where|for|at|if|attained|achieved|occurring|with|by|in|on|from|after)\b", re.IGNORECASE
)
CHANGED = re.compile(
    r"\b(?:not|no|never|or|nor|but|else|otherwise|wrong|incorrect|false|maybe|perhaps|whether|unclear|more|less|fewer|"
    r"than|about|approx\w*|except|either|neither|negative|minus|twice|half|double|least|most)\b|n['’]t\b",
    re.IGNORECASE,
)
OUR_ANSWER = re.compile(r"\s+is (?:the|our|my)\b[\w\s]*answer\b")
PLAINLY = re.compile(r".*\b(?:is|are|equals|get|gives|obtain)[:\s]\s*(.+)", re.DOTALL)
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
    if answer is None or _repeats(problem, answer):
        equal = False
    else:
        equal = same_answers(problem.reference, answer)
    status = {True: "right", False: "wrong", None: "unjudged"}[equal]
    reason = f"could not compare {str(answer)[:60]!r} with {problem.reference[:60]!r}" if equal is None else ""
    return Verdict(status, {"accuracy": float(equal is True)}, reason)


def _repeats(problem: Problem, answer: str) -> bool:
    """Whether an answer is a formula of the question, perhaps in another order: `\\sqrt{242}` is not simplified."""
    said = _signs(answer)
    if not said or len(said) < 3 or not WORK.search("".join(said)) or said == _signs(problem.reference):
        return False
    return any(
        said == _signs(part) for formula in ASKED.findall(problem.prompt) for part in "".join(formula).split("=")
    )


def _signs(text: str) -> list[str] | None:
    """The tokens of a formula without brackets, sorted; None if it is none."""
    try:
        items = latex.tokens(text)
    except algebra.Unreadable:
        return None
    digits = [sign for token in items for sign in (token if token.isdigit() else [token])]
    return sorted(sign for sign in digits if sign not in "{}()[]*.")


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
    claim = answers.claim(text, otherwise=_conclusion)
    if claim is None:
        return None
    return None if RETRACTED.search(claim) else _in_sentence(claim) or REASON.split(claim)[0]


def _in_sentence(sentence: str) -> str | None:
    """The formulas that a sentence states, joined by commas: 42 of `the value of $x$ is $42$ when $y = 3$`."""
    formulas = [next(filter(None, groups)) for groups in FORMULA.findall(sentence)]
    words = FORMULA.sub(MARK, sentence.replace(MARK, " "))
    for said in STATEMENT.finditer(words):
        between, rest = said[1], words[said.end() :]
        if any(map(str.isdigit, between)) or CHANGED.search(between) or CHANGED.search(words[: said.start()]):
            continue
        if reason := CONTEXT.match(rest) or REASON.match(rest):
            changed = CHANGED.search(rest, reason.end())
        else:
            rest = OUR_ANSWER.sub("", rest)
            changed = MARK in rest or any(map(str.isdigit, rest)) or DENIED.search(rest)
        if not changed:
            first = words[: said.start(2)].count(MARK)
            return ", ".join(formulas[first : first + said[2].count(MARK)])
    return None


def _conclusion(said: str) -> str | None:
    """What a text that names no answer states last: a sentence with formulas, or what follows `is`."""
    tail = said[-TAIL:].rstrip()
    if tail.endswith((":", "=")):  # what comes next was left out
        return None
    last = max(FORMULA.finditer(tail), key=lambda match: match.end(), default=None)
    stop = last.start() if last else len(tail.rstrip("*_$ "))
    begin = max((match.end() for match in answers.END.finditer(tail) if match.end() < stop), default=0)
    if last is None:
        return _plainly(answers.sentence(tail[begin:]))
    end = answers.END.search(tail, last.end())
    return tail[begin : end.start() if end else len(tail)].strip()


def _plainly(sentence: str) -> str | None:
    """What follows `is` in a sentence without formulas, or the sentence itself if it is mathematics."""
    said = PLAINLY.fullmatch(sentence)
    if len(sentence) >= TAIL or "answer" in sentence or CHANGED.search(sentence):
        return None
    value = CONTEXT.split(REASON.split(said[1])[0])[0] if said else sentence
    found = equivalence.readings(value)
    return value if found and (said or found[0].kind != "words") else None


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

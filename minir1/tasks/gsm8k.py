"""GSM8K: grade-school word problems with a number as the answer (Cobbe et al. 2021, arXiv:2110.14168).

The files are read as published, one JSON object per line: `{"question": …, "answer": "worked solution … #### 72"}`.
"""

import re
from fractions import Fraction
from pathlib import Path

from minir1 import rewards
from minir1.files import parse_json
from minir1.tasks import Problem, Verdict, share

SPLITS = ("train", "validation", "test")
DATA = "the folder with train.jsonl and test.jsonl as published, or one of the two files"
VALIDATION = 0.07  # share of the published training problems, by a stable hash of the question

MAX_CHARS = 60  # of an answer that may still be a number
NUMBER = re.compile(
    r"""(?:[$€£]\ ?)?  (?P<sign>[-+]?)\ ?  (?:[$€£]\ ?)?
        (?P<whole> [0-9]{1,3}(?:,[0-9]{3})+ | [0-9]+ | (?=\.) )  # 1,200 or 1200 or, as in .5, nothing
        (?P<part> \.[0-9]+ | /[0-9]+ )?
        (?: \ ?% | \ ?(?P<unit> [A-Za-z]+(?:\ [A-Za-z]+){0,2} ) )?""",
    re.VERBOSE,
)
BOXED = re.compile(r"\\boxed\{([^{}]{0,60})\}")
STATED = re.compile(r"\bthe (?:final )?answer is\b:?", re.IGNORECASE)
NO_UNITS = re.compile(  # words that change the number, add another one, or deny it
    r"x|k|m|e|bn|mn|and|or|to|is|not|no|never|but|plus|minus|negative|point|squared|cubed|factorial|itself|less|"
    r"double|twice|triple|wrong|grand|lakhs?|crores?|tenths?|hundredths?|thousandths?|dozens?|hundreds?|thousands?|millions?|billions?|"
    r"trillions?|half|halves|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty",
    re.IGNORECASE,
)


def problems(split: str, data: str | Path) -> list[Problem]:
    """The problems of one split, in the order of the file; `validation` is a share left out of the published train.

    One file instead of the folder is `test` if it is called test.jsonl, else `train` and `validation`. ValueError for a
    file that is missing, lacks the split, or has another layout.
    """
    path, name = Path(data), "test.jsonl" if split == "test" else "train.jsonl"
    if path.is_dir():
        path = path / name
    elif path.is_file() and (path.name == "test.jsonl") != (split == "test"):
        raise ValueError(f"{path} does not hold the split {split!r}: give {DATA}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give {DATA}")
    with path.open("rb") as lines:
        listed = [_read(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not listed:
        raise ValueError(f"{path} holds no problems")
    if split == "test":
        return listed
    return [problem for problem in listed if (share(problem.prompt) < VALIDATION) == (split == "validation")]


def _read(line: bytes, where: str) -> Problem:
    try:
        record = parse_json(line)
        question, (_, marked, reference) = record["question"], record["answer"].rpartition("####")
    except (ValueError, KeyError, TypeError, AttributeError):
        question, marked, reference = None, "", ""
    if not isinstance(question, str) or not marked or number(reference) is None:
        raise ValueError(f'{where}: need {{"question": "…", "answer": "… #### number"}}, got {line[:60]!r}')
    return Problem(question, reference.strip())


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the text has exactly one final answer (`claim`) and that is the reference, compared as fractions."""
    said = number(claim(text))
    right = said is not None and said == number(problem.reference)
    return Verdict("right" if right else "wrong", {"accuracy": float(right)})


def final(problem: Problem, text: str) -> str | None:
    """The number that the text answers with, as a majority vote compares it: `1,200.0` is `1200`."""
    said = number(claim(text))
    return None if said is None else str(said)


def claim(text: str) -> str | None:
    r"""The one final answer of a text, as written; None if there is none or more than one.

    With an answer tag anywhere, it is what `rewards.answer` reads. Otherwise it is searched after the thinking (in the
    whole text without think tags; nowhere if the thinking was not closed): the content of `\boxed{}`, else what follows
    `####`, else what follows `the answer is`, up to the end of the line. The first of these three that occurs decides,
    and it must occur exactly once.
    """
    if "<answer>" in text or "</answer>" in text:
        return rewards.answer(text)
    said = text.rpartition("</think>")[2]
    if "<think>" in said:
        return None
    if "\\boxed" in said:
        boxed = BOXED.findall(said)
        return boxed[0] if len(boxed) == said.count("\\boxed") == 1 else None
    if "####" in said:
        return said.partition("####")[2].partition("\n")[0] if said.count("####") == 1 else None
    _, *stated = STATED.split(said)
    return stated[0].partition("\n")[0] if len(stated) == 1 else None


def number(text: str | None) -> Fraction | None:
    r"""The value of an answer that consists of one number, else None.

    Allowed around the digits: a sign, a currency sign before or `%` after (neither changes the value), commas between
    groups of three, a decimal part or a denominator, up to three words of unit, a full stop at the end, and `\boxed{}`
    or `$ $` around all. The minus of Unicode (U+2212) is a minus; digits other than 0-9 are not allowed. Units are
    not compared, but words that change the number, such as `dozen` or `and`, give None.
    """
    if text is None or len(text) > MAX_CHARS:
        return None
    text = text.strip().removesuffix(".")
    if len(text) > 4 and text[:2] == text[-2:] == "**":  # bold
        text = text[2:-2].strip().removesuffix(".")
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%")
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    if boxed := BOXED.fullmatch(text):
        text = boxed[1].strip()
    match = NUMBER.fullmatch(text)
    if not match or any(map(NO_UNITS.fullmatch, (match["unit"] or "").split())):
        return None
    part = match["part"] or ""
    if part.startswith("/") and not int(part[1:]):
        return None
    return Fraction(match["sign"] + match["whole"].replace(",", "") + part)

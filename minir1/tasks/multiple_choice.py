"""Questions with lettered choices, of which one is right: how they are asked, and which letter a text answers with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

from minir1.tasks import Problem, Verdict
from minir1.tasks.answers import boxed, claim, conclusion
from minir1.tasks.published import split_named

INSTRUCTION = "Exactly one choice is right. State its letter as the final answer."
MAX_CHARS = 2000  # of an answer that may still be a choice

CHOSEN = re.compile(  # the last one
    r".*\b(?:(?:correct|right|best)\s+(?:option|choice)\s*(?:is|:)|answer (?:must|has to) be)\s*([^\n]*)", re.I | re.S
)
STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
WRAPPED = re.compile(
    r"""\*\*(.+)\*\* | \\\((.+)\\\) | \\\[(.+)\\\] | \$\$(.+)\$\$ | \$(.+)\$ | \{(.+)\}
        | `(.+)` | "(.+)" | “(.+)” | '(.+)'""",
    re.VERBOSE | re.DOTALL,
)
LETTERED = re.compile(
    r"""(?: (?i: the | therefore | thus | clearly | most\ likely | probably | definitely ),?\ )*
        (?: (?i: option | choice | letter | answer )\ )?
        (?:\*\*)? (?P<open>[(\[])? (?P<letter>[A-Z]) (?![\w'’]) (?(open)[)\]]) (?:\*\*)?
        (?: [.):,] | \ ?[:–—-](?=\ ) )? \s* (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
EMPHASIS = re.compile(
    r"is (?:the )?(?:correct|right|best)(?: (?:answer|option|choice))?|is the answer|"
    r"(?:because|since|as|which) (?P<why>.*)"
)
ENDS = re.compile(r"[.?!]?\n(?!\n)|[.?!](?=\s)")  # of sentences and lines, but not of paragraphs
NEXT = re.compile(  # a second letter, unless it and those after it are rejected: `B. A, C and D are wrong`
    r"\(?[A-Z][.):,; ]+\(?([A-Z])(?=[.):,;]|$)"
    r"(?!(?:[^a-z]|and\b|or\b)*(?:are|is) (?:all |both )?(?:wrong|incorrect|false|not (?:correct|right|true))\b)"
)
EXPLAINED = r" (?!and\b|or\b|(?:is|are) (?:\w+ )?(?:right|correct|true|possible)\b)[a-z][^;]*(?:; |$)"  # after a choice
OTHER = re.compile(r"\b(?:[A-Z]|or|not|nor|but|either|neither|both)\b|n't\b")  # in a reason: may take the letter back


def problem(where: str, need: str, question, choices, right, **fields) -> Problem:
    """A problem whose choice number `right`, from 0, is right. ValueError, `where: need …`, for values of other types.

    fields: those of Problem. The solution, which few-shot prompts show, ends with the statement that `verify` reads.
    """
    texts = isinstance(choices, list) and 2 <= len(choices) <= 26 and all(isinstance(choice, str) for choice in choices)
    asked = isinstance(question, str) and question.strip()
    if not (asked and texts and type(right) is int and 0 <= right < len(choices)):
        got = {"question": question, "choices": choices, "answer": right}
        raise ValueError(f"{where}: need {need}, got {str(got)[:100]!r}")
    choices = [choice.strip() for choice in choices]
    letter = ascii_uppercase[right]
    listed = "\n".join(f"{name}. {choice}" for name, choice in zip(ascii_uppercase, choices))
    fields["solution"] = f"{fields.get('solution', '')}\n\nThe answer is ({letter}).".lstrip()
    fields["extra"] = {"choices": tuple(choices), **fields.get("extra", {})}
    return Problem(f"{question.strip()}\n\n{listed}\n\n{INSTRUCTION}", letter, **fields)


def filled(data: str | Path, split: str, listed: list[Problem]) -> list[Problem]:
    """The problems read from `data`. ValueError if there are none, and for train from a file that names no split."""
    if not listed:
        raise ValueError(f"{data} holds no problems")
    if Path(data).is_file() and split != "test" and split_named(Path(data).name) is None:
        raise ValueError(f"{data} names no split, so it is read as 'test': give the folder for {split!r}")
    return listed


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the text answers with the reference's letter alone, or with the whole text of that choice."""
    right = final(problem, text) == problem.reference
    return Verdict("right" if right else "wrong", {"accuracy": float(right)})


def final(problem: Problem, text: str) -> str | None:
    r"""The letter that the text answers with, or None.

    It is read from the claim of the text (answers.py), from what `the correct option is` introduces, or from the whole
    text after the thinking. The letter may stand as B, (B), B., **B**, \boxed{\text{B}} or option B, followed by the
    text of its choice or a reason. The text of a choice alone counts if no other choice has it. Several letters, a
    letter in a sentence, lower case and letters of other alphabets are none.
    """
    choices, said = problem.extra["choices"], claim(text, _chosen)
    if said is None or len(said) > MAX_CHARS:
        return None
    if "\\boxed" in said or "\\fbox" in said:
        said = boxed(said) or ""
    letter = _letter(_bare(said), choices)
    return _text(_bare(said), choices) if letter is None else letter if not _lists(text, letter, choices) else None


def _chosen(conclusion: str) -> str | None:
    chosen = CHOSEN.match(conclusion[-2 * MAX_CHARS :])
    return chosen[1] if chosen else conclusion


def _letter(said: str, choices: Sequence[str]) -> str | None:
    match = LETTERED.fullmatch(said)
    if not match or match["letter"] not in ascii_uppercase[: len(choices)]:
        return None
    rest = _bare(match["rest"])
    if rest.startswith("(") and rest.endswith(")"):
        rest = _bare(rest[1:-1])
    if len(rest) == 1 and rest in ascii_uppercase[: len(choices)]:  # B, C
        return None
    own = _bare(choices[ascii_uppercase.index(match["letter"])])
    if rest.casefold().startswith(own.casefold()):
        rest = rest[len(own) :].lstrip(" ,")
    emphasis = EMPHASIS.fullmatch(rest)
    return match["letter"] if not rest or (emphasis and not OTHER.search(emphasis["why"] or "")) else None


def _lists(text: str, letter: str, choices: Sequence[str]) -> bool:
    """Whether what the text states goes on with other choices: `A. London B. Paris`, `A. B. C.`, `A. Paris`.

    A sentence about another choice, such as `C. Rome is in Italy`, lists nothing.
    """
    shown = (conclusion(text) or "")[-5 * MAX_CHARS :]
    paragraph = claim(ENDS.sub("; ", shown), _chosen) or ""  # without ends of sentences a claim is a whole paragraph
    paragraph = _bare(paragraph.replace("*", ""))
    for name, choice in zip(ascii_uppercase, choices):
        if name != letter:
            paragraph = re.sub(rf"(?<!\w)\(?{name}[.;):]+ ?{re.escape(_bare(choice))}{EXPLAINED}", "", paragraph)
    if (second := NEXT.match(paragraph)) and second[1] in ascii_uppercase[: len(choices)].replace(letter, ""):
        return True
    own = choices[ascii_uppercase.index(letter)]
    for name, choice in zip(ascii_uppercase, choices):
        words = re.escape(_bare(choice))
        listed = rf"(?<!\w){name}[.;):]+ ?{words}(?!\w)" if name != letter else ""
        swapped = rf"\(?{letter}[.;):]+ ?{words} ?(?:;|$)" if choice not in (own, "") else ""
        if any(pattern and re.search(pattern, paragraph) for pattern in (listed, swapped)):
            return True
    return False


def _text(said: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice with this text; the case of letters counts only where choices differ by it."""
    for form in (str, str.casefold):
        same = [letter for letter, choice in zip(ascii_uppercase, choices) if form(_bare(choice)) == form(said)]
        if same and said:
            return same[0] if len(same) == 1 else None
    return None


def _bare(text: str) -> str:
    """Without outer marks such as ** or $, LaTeX's text styles, repeated white space and a full stop at the end."""
    text = " ".join(STYLE.sub(r"\1", text).replace("\\ ", " ").split()).removesuffix(".")
    for _ in range(3):
        if not (wrapped := WRAPPED.fullmatch(text)):
            break
        text = wrapped[wrapped.lastindex].strip().removesuffix(".")
    return text

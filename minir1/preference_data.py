"""Comparisons from files: JSON lines in the layouts in which they are published.

    plain           {"prompt": "…", "chosen": "…", "rejected": "…"}
    HH-RLHF         {"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": "…"}, dialogues with one beginning
    UltraFeedback   {"prompt": "…", "chosen": [{"role": "user", "content": "…"}, …], "rejected": […]}, binarised

The layout is known by the shape of each line. Scores of the two, `score_chosen` and `score_rejected`, may stand in any.
The prompt of the third repeats what the messages say, and is not read; other keys are not read either.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minir1.tokenizer import Tokenizer

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
SCORES = ("score_chosen", "score_rejected")
Messages = list[dict[str, str]]  # role and content


@dataclass(frozen=True)
class Pair:
    """Two answers to one dialogue."""

    messages: tuple[tuple[str, str], ...]  # (role, content) of what was said before; the last is no assistant
    chosen: str
    rejected: str
    score_gap: float | None = None  # score_chosen - score_rejected, where the file tells them

    @property
    def prompt(self) -> Messages:
        """The dialogue as a chat template takes it."""
        return [{"role": role, "content": content} for role, content in self.messages]


class NoComparison(ValueError):
    """A line is well formed and yet compares nothing."""


def read_pairs(path: Path, left_out: list[str] | None = None) -> list[Pair]:
    """The pairs of a .jsonl or .jsonl.gz file, in order; blank lines are skipped.

    Published files hold some lines that compare nothing: equal answers, an empty answer, dialogues that part before the
    last answer. With a list as `left_out` they are left out and told there, a sentence each; else they are an error.
    ValueError, naming file and line, for those, for anything that is no pair, and for a file without pairs.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: expected JSON lines with prompt, chosen, rejected")
    pairs = []
    for number, line in _lines(path):
        try:
            pairs.append(read_pair(line))
        except ValueError as error:
            if left_out is None or not isinstance(error, NoComparison):
                raise ValueError(f"{path}, line {number}: {error}") from error
            left_out.append(f"line {number}: {error}")
    if not pairs:
        raise ValueError(f"{path} holds no pair" + (f"; {left_out[0]}" if left_out else ""))
    return pairs


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_pair(line: str) -> Pair:
    """One line of any layout. ValueError saying what is wrong; NoComparison where it compares nothing."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON: {line.strip()[:60]!r}") from error
    if not isinstance(found, dict) or "chosen" not in found or "rejected" not in found:
        shown = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"needs an object with chosen and rejected, got {shown}")
    prompt, chosen, rejected = found.get("prompt"), found["chosen"], found["rejected"]
    kinds = tuple(type(x).__name__ for x in (prompt, chosen, rejected))
    if kinds == ("str", "str", "str"):
        if any(TURN.match(text) for text in (prompt, chosen, rejected)):
            raise ValueError("a text begins with '\\n\\nHuman:': whole dialogues stand in chosen and rejected alone")
        dialogues = [[("user", prompt), ("assistant", answer)] for answer in (chosen, rejected)]
    elif kinds == ("NoneType", "str", "str"):
        dialogues = [turns(text) for text in (chosen, rejected)]
    elif kinds[1:] == ("list", "list") and kinds[0] in ("str", "NoneType"):
        dialogues = [spoken(messages) for messages in (chosen, rejected)]
    else:
        raise ValueError(
            f"prompt, chosen, rejected are {', '.join(kinds)}: expected three strings, two dialogues that begin with "
            "'\\n\\nHuman:' and no prompt, or two lists of messages"
        )
    return Pair(*_compare(*dialogues), _score_gap(found))


def turns(text: str) -> list[tuple[str, str]]:
    """(role, content) of a dialogue in HH-RLHF's layout. ValueError if it does not begin with a turn."""
    beginning, *parts = TURN.split(text)
    if beginning.strip() or not parts:
        raise ValueError(f"a dialogue begins with '\\n\\nHuman:' or '\\n\\nAssistant:', not {text[:40]!r}")
    return [(ROLES[name], content.strip()) for name, content in zip(parts[::2], parts[1::2])]


def spoken(messages: list) -> list[tuple[str, str]]:
    """(role, content) of a list of messages. ValueError if one is no message."""
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"a message needs role and content, both strings, got {str(message)[:60]!r}")
    return [(message["role"], message["content"]) for message in messages]


def _compare(chosen: list[tuple[str, str]], rejected: list[tuple[str, str]]) -> tuple:
    """The dialogue that two of them share, and their last answers."""
    for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
        if len(dialogue) < 2 or dialogue[-1][0] != "assistant" or dialogue[-2][0] == "assistant":
            raise NoComparison(f"{name} does not end with an answer of the assistant to somebody")
        if not dialogue[-1][1].strip():
            raise NoComparison(f"the {name} answer is empty")
    if chosen[:-1] != rejected[:-1]:
        raise NoComparison("chosen and rejected differ before the last answer")
    if chosen[-1] == rejected[-1]:
        raise NoComparison("both answers are the same")
    return tuple(chosen[:-1]), chosen[-1][1], rejected[-1][1]


def _score_gap(found: dict) -> float | None:
    scores = [found.get(name) for name in SCORES]
    if scores == [None, None]:
        return None
    if not all(type(s) in (int, float) and abs(s) < float("inf") for s in scores):
        raise ValueError(f"score_chosen, score_rejected = {scores}: expected two finite numbers, or neither")
    return float(scores[0] - scores[1])


# ---- as tokens ---------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A pair as tokens: `[prompt | answer | EOS]` twice."""

    chosen: list[int]
    rejected: list[int]
    prompt_len: int  # tokens that both share
    score_gap: float | None

    @property
    def longest(self) -> int:
        """Tokens of the longer row."""
        return max(len(self.chosen), len(self.rejected))


def load(path: Path, tokenizer: Tokenizer, most: int) -> tuple[list[Rows], list[str]]:
    """The pairs of a file as tokens, and a sentence for each that was left out: no comparison, or over `most` tokens.

    ValueError as `read_pairs`, and if every pair is too long.
    """
    left_out: list[str] = []
    found = [tokenise(pair, tokenizer) for pair in read_pairs(path, left_out)]
    rows = [pair for pair in found if pair.longest <= most]
    if not rows:
        raise ValueError(f"{path}: every pair has an answer that ends beyond {most} tokens")
    return rows, left_out + [f"a pair of {pair.longest} tokens" for pair in found if pair.longest > most]


def tokenise(pair: Pair, tokenizer: Tokenizer) -> Rows:
    """Prompt by the chat template and answer, tokenised apart, as a sampler meets them, and the end token."""
    prompt = tokenizer.encode(tokenizer.render(pair.prompt))
    answers = ([*prompt, *tokenizer.encode(text), tokenizer.eos] for text in (pair.chosen, pair.rejected))
    return Rows(*answers, len(prompt), pair.score_gap)

"""Preference pairs: read from JSON lines in the published layouts, and turned into rows of a batch.

    plain           {"prompt": "…", "chosen": "…", "rejected": "…"}
    HH-RLHF         {"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": "…"}, dialogues
    UltraFeedback   {"prompt": "…", "chosen": [{"role": "user", "content": "…"}, …], "rejected": […]}, binarised
    TRL             {"prompt": [{"role": "user", …}], "chosen": [{"role": "assistant", …}], "rejected": […]}

Each line is recognised by its types. Any layout may have `score_chosen` and `score_rejected`. Other keys are ignored,
and so is a prompt that the dialogues repeat (UltraFeedback's, the first message).
"""

from __future__ import annotations

import gzip
import itertools
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minir1 import templates
from minir1.data import by_tokens, pad_rows
from minir1.distributed import deal, exchanged
from minir1.files import parse_json
from minir1.metrics import bootstrap
from minir1.preference import agreement
from minir1.tokenizer import Tokenizer

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
SPEAKERS = ("system", "developer", "user", "assistant", "tool")
LARGEST = 1e30  # score: differences, and their product with a margin, are finite in fp32


@dataclass(frozen=True)
class Pair:
    """Two answers to one dialogue."""

    messages: tuple[tuple[str, str], ...]  # (role, content) before the answer; the last is not the assistant's
    chosen: str
    rejected: str
    score_gap: float | None = None  # score_chosen - score_rejected, if the file has them

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The dialogue as a chat template takes it."""
        return [{"role": role, "content": content} for role, content in self.messages]


class NoComparison(ValueError):
    """A well-formed line that compares nothing."""


def read_pairs(path: Path, left_out: list[str] | None = None) -> list[Pair]:
    """The pairs of a .jsonl or .jsonl.gz file, in order; blank lines are skipped.

    Published files hold some lines that compare nothing: equal answers, an empty answer, dialogues that differ before
    the last answer. With a list as `left_out` they are skipped, and the reason for each is appended to it. Otherwise
    they are an error, as is anything that is no pair, and a file without pairs: ValueError, naming file and line.
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
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"no JSON: {line.strip()[:60]!r}: {error}") from error
    if not isinstance(row, dict) or "chosen" not in row or "rejected" not in row:
        shown = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"needs an object with chosen and rejected, got {shown}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    kinds = tuple(type(x).__name__ for x in (prompt, chosen, rejected))
    if kinds == ("str", "str", "str"):
        if any(TURN.match(text) for text in (prompt, chosen, rejected)):
            raise ValueError("a text begins with '\\n\\nHuman:': dialogues in chosen and rejected go without prompt")
        dialogues = [[("user", prompt), ("assistant", answer)] for answer in (chosen, rejected)]
    elif kinds == ("NoneType", "str", "str"):
        dialogues = [turns(text) for text in (chosen, rejected)]
    elif kinds[1:] == ("list", "list") and kinds[0] in ("str", "NoneType", "list"):
        asked = spoken(prompt) if isinstance(prompt, list) else []
        said = [spoken(messages) for messages in (chosen, rejected)]
        dialogues = [part if part[: len(asked)] == asked else asked + part for part in said]
    else:
        raise ValueError(
            f"prompt, chosen, rejected are {', '.join(kinds)}: expected three strings, two dialogues that begin with "
            "'\\n\\nHuman:' and no prompt, or lists of messages"
        )
    return Pair(*_compare(*dialogues), _score_gap(row))


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
        if message["role"] not in SPEAKERS:
            raise ValueError(f"role = {message['role']!r}: must be one of {', '.join(SPEAKERS)}")
    return [(message["role"], message["content"]) for message in messages]


def _compare(chosen: list[tuple[str, str]], rejected: list[tuple[str, str]]) -> tuple:
    """The dialogue that both share, and the last answer of each."""
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


def _score_gap(row: dict) -> float | None:
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    if scores == [None, None]:
        return None
    if not all(type(s) in (int, float) and abs(s) <= LARGEST for s in scores):
        shown = str(scores)[:60]
        raise ValueError(f"score_chosen, score_rejected = {shown}: expected two finite numbers, or neither")
    return float(scores[0] - scores[1])


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

    @property
    def answers(self) -> list[int]:
        """The tokens of both answers, without the end token."""
        return self.chosen[self.prompt_len : -1] + self.rejected[self.prompt_len : -1]


def load(path: Path, tokenizer: Tokenizer, most: int, template: str = "chat") -> list[Rows]:
    """The pairs of a file as tokens, without those that compare nothing, have over `most` tokens, or an answer that the
    tokenizer has no tokens for; prints how many.

    ValueError as `read_pairs` and `tokenise`, and if no pair is left.
    """
    left_out: list[str] = []
    pairs = [tokenise(pair, tokenizer, template) for pair in read_pairs(path, left_out)]
    short = [pair for pair in pairs if pair.longest <= most]
    rows = [pair for pair in short if tokenizer.unknown not in pair.answers]
    if not rows:
        beyond = f"that ends beyond {most} tokens, or that the tokenizer has no tokens for"
        raise ValueError(f"{path}: every pair has an answer {beyond}")
    left_out += [f"a pair of {pair.longest} tokens" for pair in pairs if pair.longest > most]
    told = f", {len(left_out):,} left out ({left_out[0]})" if left_out else ""
    if unknown := len(short) - len(rows):
        told += f", {unknown:,} left out (an answer that the tokenizer has no tokens for)"
    print(f"{path}: {len(rows):,} pairs{told}")
    return rows


def tokenise(pair: Pair, tokenizer: Tokenizer, template: str = "chat") -> Rows:
    """Prompt by the template and answer, tokenised separately, as the sampler sees them, and the end token.

    An answer does not repeat a <think> with which the template ends. Special tokens written in an answer are quoted, as
    in chat_data.py. ValueError for a dialogue of several turns with a template that asks one question.
    """
    said = lambda text: tokenizer.quote(text, assistant=True)
    if template == "chat":
        asked = [m | {"content": said(m["content"])} if m["role"] == "assistant" else m for m in pair.prompt]
        text = tokenizer.render(asked)
    elif len(pair.messages) == 1:
        text = templates.prompt(tokenizer, pair.messages[0][1], template)
    else:
        raise ValueError(f"template {template!r} asks one question, not {len(pair.messages)} turns; allowed: chat")
    prompt, begun = tokenizer.encode(text), templates.opened(text)
    answers = (said(answer.removeprefix(begun)) for answer in (pair.chosen, pair.rejected))
    rows = ([*prompt, *tokenizer.encode(answer), tokenizer.eos] for answer in answers)
    return Rows(*rows, len(prompt), pair.score_gap)


def padded(pairs: list[Rows], device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens int64 [2N, T], the chosen rows before the rejected ones; lengths int64 [2N]; the answers, bool [2N, T]."""
    tokens, lengths = pad_rows([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], device)
    begin = torch.tensor([pair.prompt_len for pair in pairs], device=device).repeat(2).unsqueeze(1)
    columns = torch.arange(tokens.shape[1], device=device)
    return tokens, lengths, (columns >= begin) & (columns < lengths.unsqueeze(1))


def in_parts(
    pairs: list[Rows], budget: int, score: Callable[[list[Rows], float], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`score` of micro-batches of at most `budget` tokens, and their share (`distributed.deal`), joined over all ranks:
    each [N] in the order of the pairs, on the CPU."""
    result: dict[str, Tensor] = {}
    scored = []
    for part, share in deal(by_tokens([2 * pair.longest for pair in pairs], budget)):
        scores = score([pairs[i] for i in part], share)
        scored.append((part, {name: values.detach().cpu() for name, values in scores.items()}))
    for part, scores in itertools.chain.from_iterable(exchanged(scored)):
        for name, values in scores.items():
            result.setdefault(name, values.new_empty(len(pairs)))[part] = values
    return result


def by_prompt(values: Tensor, pairs: list[Rows]) -> list[float]:
    """The mean over the pairs of each prompt: the independent draws that an interval needs. values: [N]."""
    groups = defaultdict(list)
    for pair, value in zip(pairs, values.tolist()):
        groups[tuple(pair.chosen[: pair.prompt_len])].append(value)
    return [sum(group) / len(group) for group in groups.values()]


def accuracy(chosen: Tensor, rejected: Tensor, pairs: list[Rows]) -> dict[str, float]:
    """How often the chosen answer has the higher reward, on average over prompts, with its bootstrap interval."""
    values = bootstrap(by_prompt(agreement(chosen, rejected), pairs))
    return dict(zip(("accuracy", "accuracy_low", "accuracy_high"), values))

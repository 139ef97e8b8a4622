"""Dialogues to learn from: read from JSON lines in the published layouts, and tokenised, with a mask of the answers.

    messages     {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    ShareGPT     {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}
    pairs        {"prompt": "…", "completion": "…"} or {"prompt": "…", "response": "…"}

A line is read by the first of these layouts whose keys it has. Other keys are ignored, also those of a message. Only
what the assistant says is trained: each of its turns, from the first token after the prompt to the end token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minir1 import templates
from minir1.data import end_to_end, packed
from minir1.distributed import deal
from minir1.preference_data import spoken
from minir1.seed import hashed
from minir1.tasks.published import records
from minir1.tokenizer import Tokenizer

NAMES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PAIRS = ("completion", "response")
MARK = "\ufdd1"  # a noncharacter, which no text holds: stands for an answer, to see what a template writes around it


class Document(NamedTuple):
    """Tokens that the model reads together, and which of them are trained."""

    tokens: list[int]
    trained: list[bool]  # never the first token, which nothing predicts
    prompt: str  # what the user said first: all answers to it are trained, or all are held out


def load(paths: Sequence[Path], tokenizer: Tokenizer, most: int, template: str = "chat") -> list[Document]:
    """The documents of all files. Prints how many there are, and how many were left out and why.

    Left out are dialogues without an answer or with an empty one, documents of over `most` tokens (none is truncated),
    and those with an answer that the tokenizer has no tokens for. ValueError as `read` and `tokenise`, naming file and
    line; also if no document remains.
    """
    unknown = tokenizer.unknown
    documents: list[Document] = []
    dialogues, left_out = 0, Counter()
    for path in paths:
        for where, record in records(path):
            dialogues += 1
            try:
                messages = read(record)
                if not (said := [content for role, content in messages if role == "assistant"]):
                    left_out["dialogues without an answer"] += 1
                elif not all(content.strip() for content in said):
                    left_out["dialogues with an empty answer"] += 1
                else:
                    for document in tokenise(messages, tokenizer, template):
                        if len(document.tokens) > most:
                            left_out[f"documents of more than {most} tokens"] += 1
                        elif unknown is not None and (unknown, True) in zip(document.tokens, document.trained):
                            left_out["documents with an answer that the tokenizer has no tokens for"] += 1
                        else:
                            documents.append(document)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    reasons = "".join(f"; left out {count:,} {reason}" for reason, count in left_out.items())
    shown = ", ".join(map(str, paths))
    if not documents:
        raise ValueError(f"{shown}: nothing to train on in {dialogues:,} dialogues{reasons}")
    print(f"{shown}: {len(documents):,} documents of {dialogues:,} dialogues{reasons}")
    return documents


def read(record: dict) -> list[tuple[str, str]]:
    """(role, content) of each message of a record. ValueError saying what is wrong."""
    if "messages" in record:
        return spoken(_messages("messages", record))
    if "conversations" in record:
        messages = _messages("conversations", record)
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("from", "value")):
                raise ValueError(f"a message needs from and value, both strings, got {str(message)[:60]!r}")
            if message["from"] not in NAMES:
                raise ValueError(f"from = {message['from']!r}: must be one of {', '.join(NAMES)}")
        return [(NAMES[message["from"]], message["value"]) for message in messages]
    key = next((key for key in PAIRS if key in record), None)
    if key is None or "prompt" not in record:
        shown = ", ".join(sorted(record))[:80] or "no keys"
        raise ValueError(f"needs messages, conversations, or prompt and completion or response; got {shown}")
    pair = record["prompt"], record[key]
    if not all(isinstance(text, str) for text in pair):
        kinds = ", ".join(type(text).__name__ for text in pair)
        raise ValueError(f"prompt and {key} are {kinds}: expected two strings; dialogues go into messages")
    return list(zip(("user", "assistant"), pair))


def _messages(key: str, record: dict) -> list:
    if not isinstance(record[key], list):
        raise ValueError(f"{key} is {type(record[key]).__name__}: expected a list of messages")
    return record[key]


def tokenise(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer, template: str = "chat") -> list[Document]:
    """The documents of a dialogue: one, if the prompt of each answer begins with the prompts and answers before it.

    Some templates change earlier turns: DeepSeek-R1's drops their thinking. An answer after such a prompt starts a
    document of its own, with the prompt that the model will see when it answers. So every answer is trained, and only
    in a context that occurs.

    Control tokens in what others say are quoted; in answers only the special ones are, and not the tags
    (`Tokenizer.quote`). What follows the last answer is not read. ValueError for a template that does not write the
    answer, and for several turns with one that asks one question.
    """
    messages = [(role, tokenizer.quote(text, True) if role == "assistant" else text) for role, text in messages]
    prompt = next((text for role, text in messages if role == "user"), messages[0][1])
    if template != "chat" and [role for role, _ in messages] != ["user", "assistant"]:
        raise ValueError(f"template {template!r} asks one question, not {len(messages)} messages; allowed: chat")
    documents, text = [], None  # text: of the newest document
    for i, (role, answer) in enumerate(messages):
        if role != "assistant":
            continue
        if template == "chat":
            context, said, end = _turn(tokenizer, messages[: i + 1])
        else:
            context, said, end = templates.prompt(tokenizer, messages[0][1], template), answer, ""
        if text is None or not context.startswith(text):
            documents.append(Document([], [], prompt))
            text = ""
        tokens, trained, _ = documents[-1]
        asked = tokenizer.encode(context[len(text) :])
        both = tokenizer.encode(context[len(text) :] + said + end)
        if both[: len(asked)] != asked:  # a token of both: the sampler's prompt ends before the answer
            both = asked + tokenizer.encode(said + end)
        both += [] if end else [tokenizer.eos]
        tokens += both
        trained += [False] * len(asked) + [True] * (len(both) - len(asked))
        trained[0] = False
        text = context + said + end if end else None
    return documents


def _turn(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> tuple[str, str, str]:
    """The text before the last message, an answer; the answer as the model is to write it; the text that ends the turn.

    The end is what the template writes after an answer, up to the first control token; "" if there is none. The answer
    is as the template writes it (some remove white space), unless that drops the thinking; then as the file has it,
    without a <think> that the prompt has opened.
    """
    *earlier, answer = [{"role": role, "content": content} for role, content in messages]
    before = tokenizer.render(earlier)
    whole = tokenizer.render([*earlier, answer], add_generation_prompt=False)
    marked = tokenizer.render([*earlier, answer | {"content": MARK}], add_generation_prompt=False)
    header, mark, tail = marked.rpartition(MARK)
    if not mark or not whole.endswith(tail):
        raise ValueError("the chat template does not write what the assistant says")
    control = tokenizer.control.search(tail)
    end = tail[: control.end()] if control else ""
    content = answer["content"]
    for context in (before, header):  # they differ if the template asks for an answer with <think>, and there is none
        said = whole[len(context) : len(whole) - len(tail)]
        if whole.startswith(context) and said and ("</think>" in said or "</think>" not in content):
            return context, said, end
    if "</think>" not in content:
        raise ValueError("the chat template does not write the answer after its prompt")
    opened = templates.opened(before)
    begun = before[before.rindex("<think>") :] if opened else ""  # with the white space after it
    return before, content.removeprefix(begun).removeprefix(opened), end


def split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and to hold out: those of about this share of the prompts, and of at least one.

    A prompt is held out by a hash of its text, whatever else the file holds. share: 0 holds none out. ValueError if
    nothing is left to train on.
    """
    if not share:
        return list(documents), []
    numbers = {document.prompt: hashed(document.prompt) for document in documents}
    largest = max(share, min(numbers.values()))
    train = [document for document in documents if numbers[document.prompt] > largest]
    if not train:
        none = f"held_out = {share} of {len(numbers)} prompts leaves none to train on"
        raise ValueError(f"{none}: give more prompts, or --held-out 0")
    return train, [document for document in documents if numbers[document.prompt] <= largest]


def laid_out(documents: Sequence[Document], device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens int64 [N], cu_seqlens int32 [B + 1], and the trained ones, bool [N], for `Transformer.logprob`."""
    tokens, cu_seqlens = end_to_end([document.tokens for document in documents], device)
    trained = [trains for document in documents for trains in document.trained]
    return tokens, cu_seqlens, torch.tensor(trained, dtype=torch.bool, device=device)


def microbatches(documents: Sequence[Document], budget: int, device=None) -> Iterator[tuple]:
    """All documents, in batches of at most `budget` tokens (`packed`), each as from `laid_out`, and its share.

    Of several ranks each has its own batches (`distributed.deal`).
    """
    for part, share in deal(packed([len(document.tokens) for document in documents], budget)):
        yield *laid_out([documents[i] for i in part], device), share

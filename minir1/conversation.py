"""A conversation with a model: its turns as a prompt that fits the window, and an answer while it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

from minir1 import templates
from minir1.answer_text import CLOSE, OPEN, THINKING, ThinkSplitter
from minir1.text_stream import CONTEXT, TextStream
from minir1.tokenizer import TEMPLATE, Tokenizer

MARK = "\ufdd1"  # a noncharacter, which no text holds: shows whether a template writes what it is given
CHUNK = 2**14  # characters of a document that are tokenised at a time
JOINT = 8  # tokens of the window that stay free below a document: where it joins the question, tokens may differ


class Turn(NamedTuple):
    """A question, as the model reads it, and the whole answer, with its tags and the <think> that a template opened."""

    question: str
    answer: str


class Prompt(NamedTuple):
    """What a model is asked."""

    tokens: list[int]
    opened: str  # what the template has begun of the answer: "<think>", "<think></think>", or ""
    dropped: int  # the oldest turns that are left out, because they do not fit


# ---- turns -> prompt -----------------------------------------------------------------------------


def said(answer: str) -> str:
    """An answer without its thinking, as DeepSeek-R1's chat template shows earlier answers: what follows </think>.

    Thinking without an end, as in an answer that was stopped, is left out as well.
    """
    return answer.rpartition(CLOSE)[2].partition(OPEN)[0]


def prompt(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    question: str,
    *,
    window: int,
    reserve: int,
    system: str = "",
    template: str = "chat",
) -> Prompt:
    """The prompt of a question that follows some turns, whose thinking is left out.

    The oldest turns are dropped until at least `reserve` tokens of the window are free for the answer. ValueError if
    the question alone leaves fewer, for earlier turns or a system prompt with a template other than `chat`, for a
    system prompt that the chat template has no place for, and as `Tokenizer.render`.
    """
    if template != "chat" and (turns or system):
        raise ValueError(f"template {template!r} asks one question: no earlier turns, no system prompt; allowed: chat")
    first = [{"role": "system", "content": system}] if system else []
    rest = [message for turn in turns for message in zip(("user", "assistant"), turn)] + [("user", question)]
    messages = prepared(tokenizer, [*first, *({"role": role, "content": text} for role, text in rest)])
    for dropped in range(len(turns) + 1):
        if template == "chat":
            text = tokenizer.render(first + messages[len(first) + 2 * dropped :])
        else:
            text = templates.prompt(tokenizer, question, template)
        tokens = tokenizer.encode(text)
        if len(tokens) + reserve <= window:
            return Prompt(tokens, templates.opened(text), dropped)
    raise ValueError(
        f"the question has {len(tokens):,} tokens with its template: at most {window - reserve:,} of the window of "
        f"{window:,} are free, the others are kept for the answer; shorten it"
    )


def prepared(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Messages with `role` and `content` as `Tokenizer.render` should get them, from a user or over the server.

    The thinking of answers is left out, and special tokens in them are quoted. ValueError for a system prompt that the
    chat template has no place for.
    """
    roles = {message["role"] for message in messages}
    if "system" in roles and not takes_system(tokenizer):
        raise ValueError("the chat template of this model has no place for a system prompt")
    drops = "assistant" in roles and drops_thinking(tokenizer)  # itself; some templates change white space with it

    def quoted(answer: str) -> str:
        answer = answer if drops and answer.count(OPEN) <= 1 and CLOSE in answer else said(answer)
        return tokenizer.quote(answer, assistant=True)

    return [m | {"content": quoted(m["content"])} if m["role"] == "assistant" else m for m in messages]


def drops_thinking(tokenizer: Tokenizer) -> bool:
    """Whether the chat template itself leaves out the thinking of earlier answers."""
    turns = [("user", "a"), ("assistant", f"{OPEN}\n{MARK}\n{CLOSE}\n\nb"), ("user", "c")]
    return MARK not in tokenizer.render([{"role": role, "content": content} for role, content in turns])


def takes_system(tokenizer: Tokenizer) -> bool:
    """Whether the chat template has a place for a system prompt.

    It has none if it refuses one, leaves it out, or writes it like an answer, as that of the tokenizers made here.
    """

    def rendered(role: str) -> str:
        try:
            return tokenizer.render([{"role": role, "content": MARK}, {"role": "user", "content": "a"}])
        except ValueError:
            return ""

    return MARK in rendered("system") and rendered("system") != rendered("assistant")


def trained_on_turns(tokenizer: Tokenizer, template: str) -> bool:
    """Whether a model has probably seen conversations of several turns.

    Not one with the template of the tokenizers made here, whose models are trained on single questions, and not with a
    template that asks one question.
    """
    return template == "chat" and tokenizer.template != TEMPLATE


def unreadable(tokenizer: Tokenizer, text: str) -> list[str]:
    """The parts of a text that the tokenizer has no token for, each once; a model cannot tell them apart."""
    parts = (part.strip() for part in tokenizer.lacking(text))
    return list(dict.fromkeys(filter(None, parts)))


# ---- documents -----------------------------------------------------------------------------------


def with_document(name: str, text: str, question: str) -> str:
    """A question about a text, as one message."""
    return f"File {name}:\n\n{text}\n\nEnd of the file {name}.\n\n{question}"


def fitting(
    tokenizer: Tokenizer, text: str, most: int, advance: Callable[[int], object] = lambda characters: None
) -> str:
    """The longest beginning of a text that takes at most `most` tokens, up to a few.

    The text is tokenised in chunks, as far as it fits; advance(characters) is called after each of them.
    """
    count, start, size = 0, 0, lambda part: len(tokenizer.encode(part, special=False))
    while start < len(text):
        chunk = text[start : start + CHUNK]
        tokens = size(chunk)
        if count + tokens > most:
            low, high = 0, len(chunk) - 1  # the answer is in low … high
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if count + size(chunk[:middle]) <= most else (low, middle - 1)
            return text[: start + low]
        count, start = count + tokens, start + len(chunk)
        advance(start)
    return text


# ---- an answer -----------------------------------------------------------------------------------


def with_limit(
    draw: Callable[[list[int], int], Iterator[int]],
    tokenizer: Tokenizer,
    asked: Prompt,
    most: int,
    thinking: int | None = None,
) -> Iterator[int]:
    """Yield the tokens of an answer, at most `most`. Thinking still open after `thinking` tokens is closed by force.

    draw(tokens, most) is a generator of the tokens that continue a prompt, the end token included, as `sample.stream`
    is. What is forced is yielded and counts, too. With `thinking` 0 the model does not think; None sets no limit. A
    character that the limit divides, or a <think>, is completed first. experiments/budget.py measures what a limit
    costs.
    """
    drawn: list[int] = []
    text, splitter = TextStream(tokenizer), ThinkSplitter(asked.opened == OPEN)
    if thinking != 0 or CLOSE in asked.opened:
        with closing(draw(asked.tokens, most)) as tokens:
            for token in tokens:
                yield token
                drawn.append(token)
                splitter.feed(text.feed(token))
                over = thinking is not None and thinking <= len(drawn) < most and token not in tokenizer.stops
                if over and splitter.kind == THINKING and _whole(tokenizer, drawn, thinking):
                    break
            else:
                return
    forced = forced_end(tokenizer, asked.opened + tokenizer.decode(drawn))[: most - len(drawn)]
    yield from forced
    if left := most - len(drawn) - len(forced):
        yield from draw([*asked.tokens, *drawn, *forced], left)


def _whole(tokenizer: Tokenizer, drawn: list[int], limit: int) -> bool:
    """Whether no character is begun and not ended; a model that writes wrong bytes alone waits for none."""
    return len(drawn) >= limit + CONTEXT or not tokenizer.decode(drawn).endswith("\ufffd")


def forced_end(tokenizer: Tokenizer, begun: str) -> list[int]:
    """The tokens that end the thinking of an answer that has begun so, or that say that there is none."""
    return tokenizer.encode(("" if OPEN in begun else OPEN) + CLOSE)


@dataclass
class Reply:
    """An answer, filled in by `spoken` while it is drawn."""

    text: str  # at first what the template has begun
    tokens: list[int] = field(default_factory=list)  # the end token included
    ended: bool = False  # by an end token


def spoken(tokenizer: Tokenizer, tokens: Iterator[int], reply: Reply) -> Iterator[tuple[str, str]]:
    """Yield ("thinking" | "answer", text) as the tokens arrive, without the think tags; fill in `reply`, with them.

    An answer that stops inside a character ends before it.
    """
    text, splitter = TextStream(tokenizer), ThinkSplitter(reply.text == OPEN)

    def parts(piece: str) -> list[tuple[str, str]]:
        reply.text += piece
        return splitter.feed(piece)

    for token in tokens:
        reply.tokens.append(token)
        if token in tokenizer.stops:
            reply.ended = True
            break
        yield from parts(text.feed(token))
    yield from parts(text.rest(truncated=not reply.ended))
    yield from splitter.rest()

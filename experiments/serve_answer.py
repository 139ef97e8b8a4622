"""The answers of the server while they arrive: from tokens to text, and to the objects of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from minir1.answer_text import ANSWER, THINKING, StopStrings, ThinkSplitter
from minir1.engine import BUDGET, CANCELLED, Answer, Token
from minir1.text_stream import TextStream
from minir1.tokenizer import Tokenizer


class Drawn(NamedTuple):
    """A token of the text."""

    kind: str  # THINKING | ANSWER
    token: Token


class Delta(NamedTuple):
    """What a choice has grown by."""

    index: int
    thinking: str
    text: str
    drawn: list[Drawn]  # without the token that ended the answer
    finish: str | None  # "stop" | "length" with the last one


class Closed(RuntimeError):
    """The engine was closed before the answer had ended."""


class Choice:
    """One answer to a request: text up to a stop string, its thinking apart from the rest where it is split.

    opened: whether the prompt has opened <think> for the model; None: the text is left as it is, and continues that of
    the prompt.
    """

    def __init__(self, index: int, answer: Answer, tokenizer: Tokenizer, stops: Sequence[str], opened: bool | None):
        self.index, self.answer, self.finish = index, answer, None
        self.tokens = self.thinking_tokens = 0  # as counted for usage
        before = answer.request.prompt if opened is None else ()
        self._text, self._until = TextStream(tokenizer, before=before), StopStrings(stops)
        self._splitter = None if opened is None else ThinkSplitter(opened)
        self._waiting: list[Drawn] = []  # tokens whose text is held back

    def advance(self) -> Delta | None:
        """What has arrived since the last call, or None if it shows nothing yet. Raises what the engine raised, or
        Closed."""
        tokens, ended = self.answer.arrived()
        parts = []
        for token in tokens:
            self.tokens += 1
            if token.id not in self.answer.request.stop:
                parts += self._read(token)
            if self._until.found:
                self.answer.cancel()
                break
        if self._until.found or ended:
            parts += self._end()
        if not (parts or self.finish):
            return None
        texts = ("".join(text for kind, text in parts if kind == wanted) for wanted in (THINKING, ANSWER))
        drawn, self._waiting = self._waiting, []
        return Delta(self.index, *texts, drawn, self.finish)

    def _read(self, token: Token) -> list[tuple[str, str]]:
        """(kind, text) of what the next token makes certain."""
        before = self._kind()
        parts = self._split(self._until.feed(self._text.feed(token.id)))
        kind = THINKING if THINKING in (before, self._kind()) else ANSWER  # both tags belong to the thinking
        self.thinking_tokens += kind == THINKING
        self._waiting.append(Drawn(kind, token))
        return parts

    def _end(self) -> list[tuple[str, str]]:
        """What was held back; sets how the answer finished."""
        parts = self._split(self._until.feed(self._text.rest(truncated=self.answer.why == BUDGET)))
        if not self._until.found:
            if self.answer.why == CANCELLED:
                raise Closed("the server is shutting down")
            parts += self._split(self._until.rest())
        self.finish = "length" if self.answer.why == BUDGET and not self._until.found else "stop"
        return parts + (self._splitter.rest() if self._splitter else [])

    def _kind(self) -> str:
        return self._splitter.kind if self._splitter else ANSWER

    def _split(self, text: str) -> list[tuple[str, str]]:
        if self._splitter:
            return self._splitter.feed(text)
        return [(ANSWER, text)] if text else []


# ---- OpenAI's objects --------------------------------------------------------------------------


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict:
    """Tokens of the prompts, and of the answers with the tokens that ended them."""
    drawn, thinking = sum(c.tokens for c in choices), sum(c.thinking_tokens for c in choices)
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": drawn, "total_tokens": prompt_tokens + drawn}
    return counts | {"completion_tokens_details": {"reasoning_tokens": thinking}}


def chat_message(thinking: str, text: str) -> dict:
    """A message, or what one grows by: reasoning_content beside content, as in DeepSeek's API."""
    return ({"reasoning_content": thinking} if thinking else {}) | ({"content": text} if text else {})


def chat_logprobs(drawn: Sequence[Drawn], tokenizer: Tokenizer) -> dict:
    """Log-probs of the tokens of a chat, those of the thinking apart."""

    def entry(number: int, logp: float) -> dict:
        data = tokenizer.bytes_of(number)
        return {"token": written(data), "logprob": logp, "bytes": list(data)}

    lists = {THINKING: [], ANSWER: []}
    for kind, token in drawn:
        top = [entry(*pair) for pair in token.top]
        lists[kind].append(entry(token.id, token.logp) | {"top_logprobs": top})
    return {"content": lists[ANSWER], "reasoning_content": lists[THINKING], "refusal": None}


def completion_logprobs(drawn: Sequence[Drawn], tokenizer: Tokenizer, offset: int) -> dict:
    """Log-probs of the tokens of a completion; offset: characters of the tokens before them."""
    tokens, text = [token for _, token in drawn], lambda number: written(tokenizer.bytes_of(number))
    *offsets, _ = accumulate((characters(tokenizer, [token]) for token in drawn), initial=offset)
    tops = [{text(n): p for n, p in [*token.top, (token.id, token.logp)]} for token in tokens]
    probs, texts = [token.logp for token in tokens], [text(token.id) for token in tokens]
    return {"tokens": texts, "token_logprobs": probs, "top_logprobs": tops, "text_offset": offsets}


def characters(tokenizer: Tokenizer, drawn: Sequence[Drawn]) -> int:
    """How many characters begin in some tokens."""
    return sum(byte & 0xC0 != 0x80 for _, token in drawn for byte in tokenizer.bytes_of(token.id))


def written(data: bytes) -> str:
    """The bytes of a token as text; those of a part of a character as OpenAI writes them, `bytes:\\xf0\\x9f`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

"""A model opened for a chat: what the terminal and the browser both ask of it, and say about its answers.

A part of experiments/chat.py and chat_web.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import chat_task
from minir1 import checkpoint, conversation
from minir1.conversation import Prompt, Reply, Turn
from minir1.device import pick, pick_dtype
from minir1.engine import LARGE
from minir1.model import hf
from minir1.model.lora import merge
from minir1.model.transformer import Transformer
from minir1.tokenizer import Tokenizer

Draw = Callable[[list[int], int], Iterator[int]]  # (prompt, tokens at most) -> tokens, the end token included


class Model(NamedTuple):
    """A model, and how to talk to it."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    template: str
    window: int  # tokens of prompt and answer together
    task: str  # "" if none is known
    turns: int  # the newest turns that it sees before a question
    takes_system: bool
    examples: list[str]
    verdict: Callable[[str, str], tuple[str, str] | None]  # see chat_task.verifier
    most: int  # tokens of an answer, unless the user asks for another number


class Settings(NamedTuple):
    """How one answer is drawn. ValueError by `checked`."""

    temperature: float = 1.0  # 0: the most probable token
    top_p: float = 1.0
    most: int = 1024  # tokens of an answer
    thinking: int | None = None  # tokens of thinking before it is closed by force; None: no limit
    system: str = ""
    seed: int = 0


ALL = 2**31  # turns: as many as fit


def opened(
    path: Path,
    *,
    task: str | None = None,
    data: str | None = None,
    allow_code: bool = False,
    template: str | None = None,
    turns: int | None = None,
    window: int | None = None,
    packed: bool = False,
    device: str = "auto",
    dtype: str | None = None,
) -> Model:
    """The model of a checkpoint, of a run or of the demonstration's folder, in which its last stage counts.

    template: None is `chat`, or `plain` where the checkpoint has no chat template. turns: None is all that fit, or none
    for a model that was trained on single questions. window: None is the model's, at most LARGE. ValueError for a
    window that the model does not have, turns with a template that has none, and as `hf.load` and `tasks.load`.
    """
    folder = checkpoint.resolve(path, prefer="best")
    on = pick(device)
    model, tokenizer = hf.load(folder, on, pick_dtype(dtype, on), packed)
    model = (model if packed else merge(model)).requires_grad_(False)
    template = template or ("chat" if tokenizer.template else "plain")
    if turns is None:
        turns = ALL if conversation.trained_on_turns(tokenizer, template) else 0
    elif turns and template != "chat":
        raise ValueError(f"turns = {turns}: template {template!r} asks one question, without those before it")
    largest = model.config.max_positions
    if window is not None and window > largest:
        raise ValueError(f"window = {window}: the model has positions for {largest}")
    known = chat_task.find(folder, task, data, allow_code)
    return Model(
        name=str(path),
        model=model,
        tokenizer=tokenizer,
        template=template,
        window=min(largest, LARGE) if window is None else window,
        task=known.name if known else "",
        turns=turns,
        takes_system=template == "chat" and conversation.takes_system(tokenizer),
        examples=chat_task.examples(known, template),
        verdict=chat_task.verifier(known),
        most=chat_task.budget(folder),
    )


def checked(settings: Settings) -> Settings:
    """The settings; ValueError naming the first that is out of range."""
    temperature, top_p, most, thinking, _, seed = settings
    if not (temperature == 0 or 1e-3 <= temperature <= 100):
        raise ValueError(f"temperature = {temperature}: 0 (the most probable token), or 0.001 to 100")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p = {top_p}: above 0, at most 1")
    if not 1 <= most < 2**31:
        raise ValueError(f"max = {most}: tokens of an answer, at least 1")
    if thinking is not None and not 0 <= thinking < 2**31:
        raise ValueError(f"thinking = {thinking}: tokens, at least 0")
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed = {seed}: at least 0")
    return settings


def recent(chat: Model, turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns that the model sees before a question, if they fit."""
    return turns[max(0, len(turns) - chat.turns) :]


def prompt(chat: Model, turns: Sequence[Turn], question: str, settings: Settings) -> Prompt:
    """The prompt of a question. A quarter of the window, or the longest answer if that is less, is kept for the answer.

    ValueError for a question that does not fit.
    """
    sizes = {"window": chat.window, "reserve": reserve(chat, settings)}
    how = {"system": settings.system, "template": chat.template}
    return conversation.prompt(chat.tokenizer, recent(chat, turns), question, **sizes, **how)


def reserve(chat: Model, settings: Settings) -> int:
    """Tokens of the window that are kept for an answer."""
    return max(1, min(settings.most, chat.window // 4))


def answer(chat: Model, draw: Draw, asked: Prompt, settings: Settings, reply: Reply) -> Iterator[tuple[str, str]]:
    """("thinking" | "answer", text) as the tokens are drawn; `reply` is filled in."""
    most = min(settings.most, chat.window - len(asked.tokens))
    tokens = conversation.with_limit(draw, chat.tokenizer, asked, most, settings.thinking)
    return conversation.spoken(chat.tokenizer, tokens, reply)


def remarks(chat: Model, asked: Prompt, reply: Reply, settings: Settings, question: str) -> list[str]:
    """What a user should know about an answer: what the model did not see of the question, and why it ended."""
    lines = []
    if asked.dropped:
        lines.append(f"the window of {chat.window:,} tokens was full: the oldest {_turns(asked.dropped)} dropped")
    if words := conversation.unreadable(chat.tokenizer, question):
        shown = ", ".join(words[:6]) + (" …" if len(words) > 6 else "")
        lines.append(f"the model has no tokens for: {shown}")
    if not reply.ended and len(asked.tokens) + len(reply.tokens) >= chat.window:
        lines.append(f"the window of {chat.window:,} tokens is full: the answer ends here")
    elif not reply.ended and len(reply.tokens) >= settings.most:
        lines.append(f"the answer ends here, after {settings.most:,} tokens (max)")
    return lines


def _turns(count: int) -> str:
    return "turn was" if count == 1 else f"{count} turns were"


def introduction(chat: Model) -> list[str]:
    """What a user should know about a model before the first question."""
    size = sum(parameter.numel() for parameter in chat.model.parameters())
    task = f", trained on {chat.task}" if chat.task else ""
    largest = chat.model.config.max_positions
    wider = f" (the model's is {largest:,}: --window)" if chat.window < largest else ""
    lines = [f"{chat.name}: {size:,} parameters{task}, a window of {chat.window:,} tokens{wider}"]
    if chat.template == "plain":
        lines.append("It continues your text: there is no chat template.")
    elif chat.turns == 0:
        lines.append("It was trained on single questions: each is asked alone, without the turns before it.")
    elif not conversation.trained_on_turns(chat.tokenizer, chat.template):
        lines.append("It was trained on single questions: with the turns before them it may answer none.")
    return lines

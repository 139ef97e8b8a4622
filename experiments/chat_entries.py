"""What stands on the page of a chat: questions and answers, answered in threads, shown as messages of Gradio's Chatbot.

A part of experiments/chat_web.py. Nothing here imports Gradio.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

from experiments import chat_model
from experiments.chat_model import Model, Settings
from minir1 import cli, conversation
from minir1.conversation import Reply, Turn
from minir1.engine import Engine, Request
from minir1.judge import beside
from minir1.seed import stream

PERIOD = 0.05  # seconds between two pictures of an answer that grows
LARGEST = 2**24  # bytes of a file
MARKS = {"right": "✓", "wrong": "✗", "unjudged": "?"}
MARKDOWN = MarkdownIt("commonmark", {"html": False})
SPAN = re.compile(r"(`[^`]+`)")  # code in a line of Markdown
MARKUP = re.compile(r"(?<=[<&])(?=[A-Za-z/!?#])")  # where a browser takes < or & for the beginning of HTML
JOINER = "\u2060"  # an invisible character, with which it does not


class Lane(NamedTuple):
    """A model, and the engine that answers for it."""

    chat: Model
    engine: Engine


@dataclass
class Entry:
    """A question and its answer, which grows while a thread fills it in."""

    question: str  # as it was typed
    files: tuple[str, ...] = ()  # paths of text files that were given along
    attempt: int = 0  # how often it was asked before: each time has other noise
    doing: str = ""  # what is being done before the first token
    thinking: str = ""
    answer: str = ""
    reply: Reply | None = None
    thought: float | None = None  # seconds until the thinking ended
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)  # what a user should know
    verdict: tuple[str, str] | None = None
    turn: Turn | None = None  # for the prompts of later questions; None: it could not be asked
    done: bool = False


class Stop:
    """The button that ends the answers of one tab."""

    def __init__(self):
        self.pressed = False
        self._cancel: list[Callable[[], None]] = []

    def watch(self, cancel: Callable[[], None]) -> None:
        """Call this once it is pressed."""
        self._cancel.append(cancel)
        if self.pressed:
            cancel()

    def press(self) -> None:
        self.pressed = True
        for cancel in self._cancel:
            cancel()


# ---- answering -----------------------------------------------------------------------------------


def drawing(lane: Lane, settings: Settings, stop: Stop) -> chat_model.Draw:
    """Tokens of one row of the engine, until the button is pressed."""

    def draw(tokens: list[int], most: int) -> Iterator[int]:
        if stop.pressed:
            return
        how = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
        answer = lane.engine.submit(Request(tokens, most, stop=tuple(lane.chat.tokenizer.stops), **how))
        stop.watch(answer.cancel)
        try:
            for token in answer:
                yield token.id
        finally:
            answer.cancel()

    return draw


def fill(lane: Lane, earlier: Sequence[Entry], entry: Entry, settings: Settings, stop: Stop) -> None:
    """Answer a question, in this thread. What goes wrong is a note of the entry."""
    began, chat = time.perf_counter(), lane.chat
    turns = [before.turn for before in earlier if before.turn]
    settings = settings._replace(seed=stream(settings.seed, len(earlier), entry.attempt))
    try:
        question = with_files(chat, entry, settings)
        asked = chat_model.prompt(chat, turns, question, settings)
        entry.doing = f"reading {len(asked.tokens):,} tokens"
        entry.reply = reply = Reply(asked.opened)
        for kind, text in chat_model.answer(chat, drawing(lane, settings, stop), asked, settings, reply):
            if kind == "thinking":
                entry.thinking += text
            else:
                entry.thought = entry.thought or time.perf_counter() - began
                entry.answer += text
        entry.seconds = time.perf_counter() - began
        entry.turn = Turn(question, reply.text)
        entry.notes += chat_model.remarks(chat, asked, reply, settings, question)
        if stop.pressed:
            entry.notes.append("stopped")
        else:
            entry.verdict = chat.verdict(entry.question, reply.text)
    except (*cli.REFUSED, *cli.FAILED) as error:
        entry.notes.append(" ".join(str(error).split()) or type(error).__name__)
    finally:
        entry.doing, entry.done = "", True


def with_files(chat: Model, entry: Entry, settings: Settings) -> str:
    """The question with the texts of its files before it, as far as they fit, which the notes say.

    ValueError for a file that is too large, or no text in UTF-8, and where nothing of a file fits.
    """
    question = entry.question
    for path in map(Path, entry.files):
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes: at most {LARGEST:,}")
        try:
            text = path.read_bytes().decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name} is no text in UTF-8: {error.reason} at byte {error.start:,}") from error
        around = chat_model.prompt(chat, (), conversation.with_document(path.name, "", question), settings)
        free = max(0, chat.window - chat_model.reserve(chat, settings) - len(around.tokens) - conversation.JOINT)

        def advance(characters: int) -> None:
            entry.doing = f"reading {path.name}: {characters / len(text):.0%}"

        part = conversation.fitting(chat.tokenizer, text, free, advance)
        if text and not part:
            raise ValueError(f"nothing of {path.name} fits: the window of {chat.window:,} tokens has {free:,} left")
        tokens = len(chat.tokenizer.encode(part, special=False))
        whole = "" if part == text else f"only the first {len(part) / len(text):.0%} of "
        entry.notes.append(f"{whole}{path.name}: {tokens:,} tokens, {tokens / chat.window:.0%} of the window")
        question = conversation.with_document(path.name, part, question)
    return question


def answering(
    lanes: Sequence[Lane], entries: Sequence[list[Entry]], asked: Sequence[Entry], settings: Settings, stop: Stop
) -> Iterator[None]:
    """Ask each lane its question and append it to its entries; yield at most every PERIOD seconds, when something has
    changed, and once at the end. A caller that goes away stops the answers."""
    work: list[Future] = []
    try:
        for lane, before, entry in zip(lanes, entries, asked):
            earlier = list(before)
            before.append(entry)
            work.append(beside(fill, lane, earlier, entry, settings, stop))
        last = None
        while not all(future.done() for future in work):
            wait(work, timeout=PERIOD)
            state = [(entry.doing, len(entry.thinking), len(entry.answer)) for entry in asked]
            if state != last:
                last = state
                yield
        for future in work:
            future.result()
        yield
    finally:
        stop.press()


# ---- showing -------------------------------------------------------------------------------------


def messages(entries: Sequence[Entry], markdown: bool = False) -> list[dict]:
    """The messages of Gradio's Chatbot. A message whose metadata have a title is a block that folds."""
    return [message for entry in entries for message in _of_entry(entry, markdown)]


def _of_entry(entry: Entry, markdown: bool) -> Iterator[dict]:
    text = in_markdown if markdown else as_html  # Gradio takes every message for HTML, with Markdown or without
    yield _message("user", joined(entry.question + names_of(entry)))  # which is also what the pencil shows
    if entry.thinking or not (entry.answer or entry.done):
        yield _message("assistant", text(entry.thinking.strip())) | {"metadata": _thought(entry)}
    if entry.answer.strip():
        yield _message("assistant", text(entry.answer.strip()))
    if entry.done:
        summary = {"type": "component", "component": "html", "value": summarised(entry), "constructor_args": {}}
        yield {"role": "assistant", "content": [summary | {"props": {}}]}


def names_of(entry: Entry) -> str:
    """The lines below a question that name its files."""
    return "".join(f"\n📄 {Path(path).name}" for path in entry.files)


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _thought(entry: Entry) -> dict:
    """Pending, and open, until the thinking has ended."""
    if entry.thought is None and not entry.done:
        doing = "Thinking" if entry.thinking else entry.doing or "Waiting"
        return {"title": as_html(doing), "status": "pending"}
    return {"title": "Thinking", "status": "done", "duration": round(entry.thought or entry.seconds, 1)}


def as_html(text: str) -> str:
    """HTML that shows the text as it is."""
    return escape(text, quote=False)


def joined(text: str) -> str:
    """The text with a JOINER in all that could be HTML: shown as it is wherever it stands, in HTML or in Markdown."""
    return MARKUP.sub(JOINER, text)


def in_markdown(text: str) -> str:
    """Markdown that shows the HTML in the text as it is.

    Fenced blocks stay to the letter, and show it themselves. In lines, code has a JOINER, since it would show `&lt;`.
    """
    blocks = [token.map for token in MARKDOWN.parse(text) if token.type == "fence"]
    fenced = {line for start, end in blocks for line in range(start, end)}
    lines = text.split("\n")
    return "\n".join(line if number in fenced else _in_line(line) for number, line in enumerate(lines))


def _in_line(line: str) -> str:
    parts = SPAN.split(line)
    return "".join(joined(part) if number % 2 else as_html(part) for number, part in enumerate(parts))


def summarised(entry: Entry) -> str:
    """What stands below an answer, as HTML: the verdict, what it cost, and the notes."""
    parts = []
    if entry.verdict:
        status, why = entry.verdict
        parts.append(f'<b class="{status}">{MARKS[status]} {status}</b>')
        parts += [f"<span>{as_html(why)}</span>"] if why else []
    if entry.reply and entry.turn:
        parts.append(f"<span>{len(entry.reply.tokens):,} tokens in {entry.seconds:.1f} s</span>")
    parts += [f"<i>{as_html(note)}</i>" for note in entry.notes]
    return f'<div class="summary">{" ".join(parts)}</div>'


def number_of(entries: Sequence[Entry], index: int) -> int:
    """The number of the entry to which the message at `index` belongs."""
    counts = [len(list(_of_entry(entry, False))) for entry in entries]
    return bisect_right(list(accumulate(counts)), index)

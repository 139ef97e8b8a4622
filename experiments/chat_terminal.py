"""A chat in the terminal: lines in, an answer while it is drawn, and commands that start with a slash.

A part of experiments/chat.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from experiments import chat_model
from experiments.chat_model import Model, Settings
from minir1 import cli
from minir1.conversation import Reply, Turn
from minir1.sample import stream as sampled
from minir1.seed import stream

SAVED = Path("runs/chat.jsonl")
HISTORY = Path("~/.minir1_chat_history")  # the lines that were typed, for the arrow keys of the next session
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # of control characters: ␀ to ␟
PICTURES |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0x2426)  # ␡ ␦


@dataclass
class Session:
    """What the terminal remembers between questions."""

    chat: Model
    settings: Settings
    console: Console
    turns: list[Turn] = field(default_factory=list)  # all of them, for /save
    first: int = 0  # the turns before this one no longer fit into the window
    answers: int = 0  # drawn so far: each has its own noise
    folded: bool = False  # the thinking is counted, not shown


def run(session: Session) -> None:
    """Read lines until Ctrl-D: commands and questions. Nothing that a line causes ends the session."""
    say = session.console.print
    prompt = "\x01\x1b[1m\x02> \x01\x1b[0m\x02" if session.console.is_terminal else "> "  # for readline: no width
    with line_editing(HISTORY.expanduser()):
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                say()
                return
            except KeyboardInterrupt:
                say(Text("\nCtrl-D leaves", "dim"))
                continue
            try:
                if line:
                    command(session, line) if line.startswith("/") else ask(session, line)
            except KeyboardInterrupt:
                say(Text("\nstopped", "yellow"))
            except (*cli.REFUSED, *cli.FAILED) as error:
                say(Text(" ".join(str(error).split()) or type(error).__name__, "red"))


@contextmanager
def line_editing(path: Path) -> Iterator[None]:
    """Arrow keys, a history that outlasts the session, and Tab after a slash, as far as this Python has readline."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    names = [f"/{name} " for name in COMMANDS]
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, n: ([name for name in names if text and name.startswith(text)] + [None])[n])
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(1000)
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(path)


def ask(session: Session, question: str) -> None:
    """Answer one question on the console; Ctrl-C keeps what there is of the answer. ValueError if it does not fit."""
    chat, say = session.chat, session.console.print
    settings = session.settings._replace(seed=stream(session.settings.seed, session.answers))
    before = chat_model.recent(chat, session.turns[session.first :])
    asked = chat_model.prompt(chat, before, question, settings)
    session.first = len(session.turns) - len(before) + asked.dropped
    session.answers += 1
    reply, stopped = Reply(asked.opened), False
    try:
        show(session.console, chat_model.answer(chat, drawing(chat, settings), asked, settings, reply), session.folded)
    except KeyboardInterrupt:
        stopped = True
    session.turns.append(Turn(question, reply.text))
    say()
    for line in [*chat_model.remarks(chat, asked, reply, settings, question)] + ["stopped"] * stopped:
        say(Text(visible(line), "yellow"))
    if not stopped and (verdict := chat.verdict(question, reply.text)):
        status, why = verdict
        mark, colour = {"right": ("✓", "green"), "wrong": ("✗", "red")}.get(status, ("?", "yellow"))
        note = visible(f"(the verifier{': ' if why else ''}{why})")
        say(Text(f"{mark} {status}", f"bold {colour}"), Text(note, "dim"))


def drawing(chat: Model, settings: Settings) -> chat_model.Draw:
    """Tokens of one row, drawn by `minir1.sample.stream`."""
    how = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
    return lambda tokens, most: sampled(chat.model, tokens, max_tokens=most, stop=chat.tokenizer.stops, **how)


def show(console: Console, parts: Iterable[tuple[str, str]], folded: bool) -> None:
    """Print an answer while it arrives: the thinking dimmed, or as dots when folded; white space only between words."""
    printed, gap, dots = "", "", 0  # the kind of the last text; white space that waits for a text of the same kind
    for kind, text in parts:
        text = gap + text if kind == printed else text.lstrip()
        body = text.rstrip()
        gap = text[len(body) :] if kind == printed or body else gap
        if not body:
            continue
        if kind != printed and printed:
            console.print()
        if kind == "thinking" and folded:
            dots += 1
            body = "thinking" if kind != printed else "." if dots % 8 == 0 else ""
        console.print(Text(visible(body), "dim" if kind == "thinking" else ""), end="", soft_wrap=True)
        printed = kind


def visible(text: str) -> str:
    """The text with control characters as their pictures: a model must not move the cursor or clear the screen."""
    return text.translate(PICTURES)


# ---- its commands --------------------------------------------------------------------------------


def command(session: Session, line: str) -> None:
    """Run one line that starts with a slash. ValueError for an unknown command or value."""
    name, _, value = line[1:].partition(" ")
    examples = session.chat.examples
    if name.isdecimal() and 1 <= int(name) <= len(examples):
        session.console.print(Text(f"> {examples[int(name) - 1]}", "bold"))
        return ask(session, examples[int(name) - 1])
    if name not in COMMANDS:
        raise ValueError(f"/{name} is no command; /help lists them; a question may start with a slash after a space")
    said = COMMANDS[name][1](session, value.strip())
    if said:
        session.console.print(Text(said, "cyan"))


def changed(name: str, kind: type, off: str = "") -> Callable[[Session, str], str]:
    """A command that shows a setting, or changes it; `off` is the value that means None."""

    def change(session: Session, value: str) -> str:
        if value:
            try:
                number = None if value == off else kind(value)
            except ValueError:
                also = f", or {off}" if off else ""
                raise ValueError(f"{value!r}: {'an integer' if kind is int else 'a number'}{also}") from None
            session.settings = chat_model.checked(session.settings._replace(**{name: number}))
        now = getattr(session.settings, name)
        return f"{name.replace('_', '-').replace('most', 'max')} = {off if now is None else now}"

    return change


def system(session: Session, value: str) -> str:
    if value and not session.chat.takes_system:
        raise ValueError("the chat template of this model has no place for a system prompt")
    session.settings = session.settings._replace(system=value)
    return f"system prompt: {value}" if value else "no system prompt"


def think(session: Session, value: str) -> str:
    session.folded = not session.folded
    return "the thinking is folded" if session.folded else "the thinking is shown"


def reset(session: Session, value: str) -> str:
    session.turns, session.first = [], 0
    return "a new conversation"


def retry(session: Session, value: str) -> None:
    if not session.turns:
        raise ValueError("there is no question to ask again")
    session.first = min(session.first, len(session.turns) - 1)
    last = session.turns.pop()
    number = len(session.turns)
    try:
        ask(session, last.question)
    finally:
        session.turns[number:] = session.turns[number:] or [last]  # where it could not be asked again


def save(session: Session, value: str) -> str:
    path, turns = Path(value or SAVED).expanduser(), session.turns
    if not turns:
        raise ValueError("there is nothing to save")
    pairs = [(("user", turn.question), ("assistant", turn.answer)) for turn in turns]
    said = [("system", session.settings.system)] * bool(session.settings.system)
    said += [message for pair in pairs for message in pair]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        messages = [{"role": role, "content": content} for role, content in said]
        file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return f"the conversation is one more line of {path}, which experiments/sft.py reads"


def describe(session: Session, value: str) -> str:
    lines = [f"  /{name:<12} {what}" for name, (what, _) in COMMANDS.items()]
    lines += [f"  /{n:<12} ask: {question}" for n, question in enumerate(session.chat.examples, start=1)]
    return "\n".join([*lines, "  Ctrl-C       stop the answer", "  Ctrl-D       leave"])


COMMANDS = {  # name -> what it does, and the function of (session, value) that returns what to print
    "temperature": ("X: 0 takes the most probable token, 1 draws as the model predicts", changed("temperature", float)),
    "top-p": ("P: draw among the tokens that make up this much of the probability", changed("top_p", float)),
    "max": ("N: tokens of an answer, at most", changed("most", int)),
    "thinking": ("N: tokens after which the thinking is closed by force, or off", changed("thinking", int, "off")),
    "seed": ("N: of the noise", changed("seed", int)),
    "system": ("TEXT: the system prompt; nothing removes it", system),
    "think": ("fold the thinking, or show it", think),
    "retry": ("ask the last question again, with other noise", retry),
    "reset": ("start a new conversation", reset),
    "save": (f"FILE: append the conversation, by default to {SAVED}", save),
    "help": ("this list", describe),
}

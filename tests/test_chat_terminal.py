"""chat_terminal.py: an answer on the console, the commands, and a session in a pseudo-terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from talker import saved, talker
from test_chat import COUNTS, ENDS, ROOT

from experiments import chat_model, chat_terminal
from experiments.chat_model import Settings
from experiments.chat_terminal import Session
from minir1 import conversation
from minir1.conversation import Reply, Turn


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that never ends its thinking unless it is forced, and one that answers."""
    path = tmp_path_factory.mktemp("talkers")
    return {
        "counts": saved(path / "counts", COUNTS | {"</think>": "<answer>", "<answer>": "9", "9": "</answer>"}),
        "ends": saved(path / "ends", ENDS),
    }


def session(folder, **options) -> tuple[Session, io.StringIO]:
    out = io.StringIO()
    settings = Settings(**{key: options.pop(key) for key in Settings._fields if key in options})
    return Session(chat_model.opened(folder, **options), settings, Console(file=out, width=100)), out


# ---------------------------------------------------------------- an answer on the console


def test_a_question_is_answered_and_remembered(folders):
    talk, out = session(folders["ends"])
    chat_terminal.ask(talk, "make 24 from 11,3")
    assert out.getvalue() == "7 no\n<answer>9</answer>\n"
    assert talk.turns == [Turn("make 24 from 11,3", "<think>7 no\n</think><answer>9</answer>")]


def test_the_verdict_stands_below(folders):
    talk, out = session(folders["ends"], task="countdown")
    chat_terminal.ask(talk, "make 24 from 11,3,3")
    assert out.getvalue().endswith("<answer>9</answer>\n✗ wrong (the verifier: right would be (11-3)*3)\n")
    chat_terminal.ask(talk, "hello")
    assert out.getvalue().count("verifier") == 1


def test_what_the_model_cannot_read_and_why_an_answer_ends(folders):
    talk, out = session(folders["counts"], most=5)
    chat_terminal.ask(talk, "hello zebra 3")
    assert "the model has no tokens for: zebra" in out.getvalue()
    assert out.getvalue().startswith("7878\n") and "the answer ends here, after 5 tokens (max)" in out.getvalue()
    talk, out = session(folders["counts"], window=16)
    chat_terminal.ask(talk, "3")
    assert "the window of 16 tokens is full: the answer ends here" in out.getvalue()
    talk, out = session(folders["counts"], thinking=3)
    chat_terminal.ask(talk, "3")
    assert out.getvalue() == "78\n<answer>9</answer>\n"


def test_a_full_window_drops_the_oldest_turn(folders):
    """A turn has 7 tokens in the prompt (User:, 1, Assistant:, <answer>, 9, </answer>, end), the question 3."""
    talk, out = session(folders["ends"], window=26, turns=9)  # of which 6 are kept for the answer
    for number in range(5):
        chat_terminal.ask(talk, f"{number}")
    assert out.getvalue().count("the window of 26 tokens was full: the oldest turn was dropped") == 2
    assert len(talk.turns) == 5 and talk.first == 2
    with pytest.raises(ValueError, match="the question has 43 tokens .* at most 20 of the window of 26"):
        chat_terminal.ask(talk, " ".join(["3"] * 21))
    assert len(talk.turns) == 5


def test_only_so_many_turns_are_seen(folders):
    for turns, count in ((0, 0), (1, 1), (2, 2), (9, 3)):
        model = chat_model.opened(folders["ends"], turns=turns)
        asked = chat_model.prompt(model, [Turn(f"{n}", "<think>7</think>8") for n in range(3)], "5", Settings())
        assert len(asked.tokens) == 3 + 5 * count


def console():
    return Console(file=io.StringIO(), width=100)


def test_white_space_stands_between_words_only():
    on = console()
    parts = [("thinking", text) for text in ("\n a", "\n", "\nb \n")]
    parts += [("answer", text) for text in ("\n\n", "c ", "d\n")]
    chat_terminal.show(on, parts, folded=False)
    assert on.file.getvalue() == "a\n\nb\nc d"
    on = console()
    chat_terminal.show(on, [("thinking", "a")] * 20 + [("answer", "c")], folded=True)
    assert on.file.getvalue() == "thinking..\nc"


def test_a_model_cannot_steer_the_terminal():
    on = Console(file=io.StringIO(), force_terminal=True, width=100)
    chat_terminal.show(on, [("answer", "\x1b[2J\x9b2J\r\x07[red]x[/red] :smile:")], folded=False)
    assert on.file.getvalue() == "␛[2J␦2J␍␇[red]x[/red] :smile:"


# ---------------------------------------------------------------- commands


def run(talk: Session, out: io.StringIO, line: str) -> str:
    before = len(out.getvalue())
    chat_terminal.command(talk, line)
    return out.getvalue()[before:].strip()


def test_settings_are_changed_and_shown(folders):
    talk, out = session(folders["ends"])
    assert run(talk, out, "/temperature") == "temperature = 1.0"
    assert run(talk, out, "/temperature 0.5") == "temperature = 0.5"
    assert run(talk, out, "/top-p 0.9") == "top-p = 0.9" and run(talk, out, "/max 7") == "max = 7"
    assert run(talk, out, "/thinking 9") == "thinking = 9" and run(talk, out, "/seed 3") == "seed = 3"
    assert talk.settings == Settings(0.5, 0.9, 7, 9, "", 3)
    assert run(talk, out, "/thinking off") == "thinking = off" and talk.settings.thinking is None


@pytest.mark.parametrize(
    "line, match",
    [
        ("/temperature x", "'x': a number"), ("/temperature -1", "temperature = -1.0: 0 "), ("/top-p 2", "top-p = 2.0"),
        ("/max 0", "max = 0"), ("/max 1.5", "'1.5': an integer"), ("/thinking no", "'no': an integer, or off"),
        ("/system x", "no place for a system prompt"), ("/retry", "no question"), ("/save", "nothing to save"),
        ("/quux", "/quux is no command"), ("/9", "/9 is no command"), ("/", "/ is no command"),
        ("/temperature nan", "temperature = nan"), ("/max off", "'off': an integer"),
    ],
)  # fmt: skip
def test_commands_that_are_refused(folders, line, match):
    talk, out = session(folders["ends"])
    with pytest.raises(ValueError, match=re.escape(match)):
        run(talk, out, line)
    assert talk.settings == Settings()


def test_the_other_commands(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talk, out = session(folders["ends"], task="countdown", turns=9)
    listed = run(talk, out, "/help")
    assert all(f"/{name}" in listed for name in chat_terminal.COMMANDS) and "/1 " in listed
    assert run(talk, out, "/1").startswith(f"> {talk.chat.examples[0]}\n7 no")
    chat_terminal.ask(talk, "4")
    assert "7 no" in run(talk, out, "/retry") and [turn.question for turn in talk.turns] == [talk.chat.examples[0], "4"]
    assert run(talk, out, "/think") == "the thinking is folded"
    assert run(talk, out, "/retry") == "thinking\n<answer>9</answer>"
    assert run(talk, out, "/think") == "the thinking is shown"
    for path in ("", "own.jsonl"):
        assert "which experiments/sft.py reads" in run(talk, out, f"/save {path}")
        (line,) = (tmp_path / (path or "runs/chat.jsonl")).read_text().splitlines()
        roles = [message["role"] for message in json.loads(line)["messages"]]
        assert roles == ["user", "assistant"] * 2
    assert run(talk, out, "/reset") == "a new conversation" and talk.turns == [] and talk.first == 0


def test_a_retry_after_turns_were_dropped(folders):
    talk, out = session(folders["ends"], window=24, turns=9)
    for number in range(4):
        chat_terminal.ask(talk, f"{number}")
    for _ in range(3):
        run(talk, out, "/retry")
    assert len(talk.turns) == 4 and talk.first <= 3


def test_a_question_that_no_longer_fits_keeps_its_turn(folders, monkeypatch):
    talk, out = session(folders["ends"], window=40, turns=9)
    chat_terminal.ask(talk, " ".join(["3"] * 13))  # 25 tokens and 2 of the template: of 40 tokens, 10 are kept
    before = list(talk.turns)
    talk.chat = talk.chat._replace(window=32)
    with pytest.raises(ValueError, match="the question has 27 tokens"):
        run(talk, out, "/retry")
    assert talk.turns == before and talk.first == 0
    for error in (KeyboardInterrupt, ValueError):  # before the prompt is ready; after the answer, by the verifier
        with monkeypatch.context() as patch:
            talk.chat = talk.chat._replace(window=40, verdict=lambda *_: (_ for _ in ()).throw(ValueError("no")))
            if error is KeyboardInterrupt:
                patch.setattr(chat_model, "prompt", lambda *_: (_ for _ in ()).throw(error()))
            with pytest.raises(error):
                run(talk, out, "/retry")
        assert talk.turns == before


def test_each_answer_has_its_own_noise(folders, monkeypatch):
    seeds = []
    draw = lambda tokens, most: (token for token in [])
    monkeypatch.setattr(chat_terminal, "drawing", lambda model, settings: seeds.append(settings.seed) or draw)
    for _ in range(2):
        talk, out = session(folders["ends"], seed=5)
        chat_terminal.ask(talk, "1")
        run(talk, out, "/retry")
    assert seeds[:2] == seeds[2:] and seeds[0] != seeds[1]


def test_first_tokens_are_fast(folders):
    """The prompt and the first token of a model of no size: what the chat adds."""
    talk, _ = session(folders["ends"])
    laps = []
    for _ in range(5):
        began = time.perf_counter()
        asked = chat_model.prompt(talk.chat, (), "3", talk.settings)
        draw = chat_terminal.drawing(talk.chat, talk.settings)
        next(chat_model.answer(talk.chat, draw, asked, talk.settings, Reply("")))
        laps.append(time.perf_counter() - began)
    assert min(laps) < 0.05


# ---------------------------------------------------------------- a terminal


class Terminal:
    """`python -m experiments.chat` in a pseudo-terminal."""

    def __init__(self, home: Path, *words: str):
        environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "experiments.chat", *words]
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.chdir(home)
            os.execve(sys.executable, command, environment)
        self.text = ""

    def until(self, wanted: str, seconds: float = 60) -> str:
        """What is printed from now on, up to this text."""
        limit = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < limit, f"no {wanted!r} in {self.text[-2000:]!r}"
            if select.select([self.end], [], [], 0.2)[0]:
                try:
                    more = os.read(self.end, 65536).decode(errors="replace")
                    self.text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text + more)
                except OSError:  # it has ended
                    assert wanted in self.text, self.text[-2000:]
        before, _, self.text = self.text.partition(wanted)
        return before

    def enter(self, text: str, wanted: str) -> str:
        """Type at the next prompt; what is printed then."""
        self.until("> ")
        self.type(text)
        return self.until(wanted)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_a_session_in_a_terminal(folders, tmp_path):
    terminal = Terminal(tmp_path, str(folders["counts"]), "--task", "countdown", "--max-completion-length", "4000")
    try:
        assert "Try:" in terminal.until("/1 ")
        terminal.enter("/max 6\r", "max = 6")
        assert "78787" in terminal.enter("make 24 from 11,3,3\r", "after 6 tokens (max)")
        terminal.until("wrong")
        terminal.enter("/max 4000\r", "max = 4000")
        terminal.enter("3\r", "7878")
        terminal.type("\x03")  # Ctrl-C during an answer
        assert len(terminal.until("stopped")) < 4000
        terminal.enter("/thinking 4\r", "thinking = 4")
        terminal.enter("\x1b[A\x1b[A\r", "<answer>9</answer>")  # the line before the last again
        terminal.enter("half a line", "half a line")
        time.sleep(0.5)  # a signal that comes just before the prompt waits for a key is seen with the next key only
        terminal.type("\x03")  # Ctrl-C at the prompt
        terminal.until("Ctrl-D leaves")
        terminal.enter("/save talk.jsonl\r", "which experiments/sft.py reads")
        terminal.enter("\x04", "\r\n")  # Ctrl-D
        assert terminal.status() == 0
    finally:
        os.close(terminal.end)
        try:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
    (line,) = (tmp_path / "talk.jsonl").read_text().splitlines()
    answers = [m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant"]
    assert len(answers) == 3 and answers[2] == "<think>787</think><answer>9</answer>"
    assert "make 24 from 11,3,3" in (tmp_path / ".minir1_chat_history").read_text()


def test_streaming_is_the_models_text():
    """What the pieces of an answer add up to is what `generate` would give."""
    model, tokenizer = talker(ENDS | {"9": "你好", "你好": "👨‍👩‍👧", "👨‍👩‍👧": "</answer>"})
    reply = Reply("")
    from minir1.sample import stream

    tokens = stream(model, tokenizer.encode("User:3\nAssistant:"), max_tokens=50, stop=tokenizer.stops)
    parts = list(conversation.spoken(tokenizer, tokens, reply))
    assert reply.text == "<think>7 no\n</think><answer>9你好👨‍👩‍👧</answer>" and reply.ended
    assert "".join(text for kind, text in parts if kind == "answer") == "<answer>9你好👨‍👩‍👧</answer>"

"""The driver: the process that runs the tests. What the tests take from the program is a `Remote`.

The program runs elsewhere. Plain values come from there as new objects of builtin types, so that comparing them runs no
code of the program, and the program sees the arguments of one call at a time, never a test.
"""

from __future__ import annotations

import builtins
import json
import os

from minir1.sandboxed import wire


class Lost(BaseException):
    """The program ended or broke the protocol: the tests cannot catch it by `except Exception`."""


class Program:
    """The other side: requests and their results."""

    def __init__(self, requests: int, replies: int):
        self.requests, self.replies = os.fdopen(requests, "wb"), os.fdopen(replies, "rb")
        self.calls = 0
        self.lost = ""  # why there can be no more results
        self.unsent = ""  # why an argument could not be passed on

    def ask(self, action: str, *arguments):
        """The result of an action. The exceptions of the program arrive as the builtin class of their name."""
        if self.lost:
            raise Lost(self.lost)
        try:
            message = [action, *(wire.encode(value, self.number) for value in arguments)]
        except TypeError as error:
            self.unsent = str(error)
            raise
        try:
            wire.send(self.requests, message)
            kind, *content = wire.receive(self.replies)
            if kind == "value":
                value = wire.decode(content[0], self.remote)
            elif kind == "error":
                name, text = map(str, content)
            elif [kind, action] != ["stop", "next"]:
                raise ValueError("a reply of no kind")
        except Exception as error:  # whatever is wrong with a reply, the program's result is none
            ended = isinstance(error, EOFError | OSError)
            self.lost = "the program ended" if ended else f"no plain reply: {type(error).__name__}: {error}"[:200]
            raise Lost(self.lost) from None
        if kind == "stop":
            raise StopIteration
        if kind == "error":
            raise exception(name, text)
        self.calls += action == "call"
        return value

    def number(self, value) -> int:
        """The number of a `Remote`, for `wire.encode`. TypeError for an object of the tests."""
        if type(value) is not Remote:
            raise TypeError(f"the tests pass a {type(value).__name__}, and only plain data can be passed to a program")
        return object.__getattribute__(value, "_number")

    def remote(self, number: int) -> Remote:
        """What stands here for the program's object with this number, for `wire.decode`."""
        if type(number) is not int:
            raise ValueError("an object without number")
        return Remote(self, number)


class Remote:
    """A function, class or other object of the program that is no plain data. It equals nothing but itself."""

    __slots__ = ("_program", "_number")

    def __init__(self, program: Program, number: int):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args, **named):
        return self._program.ask("call", self, args, named)

    def __getattr__(self, name):
        if name.startswith("__"):  # such as copy's hooks
            raise AttributeError(name)
        return self._program.ask("get", self, name)

    def __setattr__(self, name, value):
        self._program.ask("set", self, name, value)

    def __getitem__(self, key):
        return self._program.ask("item", self, key)

    def __len__(self):
        return self._program.ask("len", self)

    def __bool__(self):
        return self._program.ask("bool", self)

    def __iter__(self):
        iterator = self._program.ask("iter", self)
        while True:
            try:
                value = self._program.ask("next", iterator)
            except StopIteration:
                return
            yield value

    def __next__(self):
        return self._program.ask("next", self)


def exception(name: str, text: str) -> Exception:
    """The builtin exception of this name, else a RuntimeError."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, StopIteration | UnicodeError):
        return kind(text)
    return RuntimeError(f"{name}: {text}")


def run(requests: int, replies: int, verdict: int, size: int) -> None:
    """Read the job, `size` bytes of JSON, from the standard input; write the verdict, [status, reason], at the end."""
    content = b""
    while len(content) < size and (more := os.read(0, size - len(content))):
        content += more
    job = json.loads(content)
    program = Program(requests, replies)
    status = judge(program, job)
    os.write(verdict, json.dumps(status).encode() + b"\n")


def judge(program: Program, job: dict) -> list[str]:
    """["passed" | "failed" | "unjudged", reason] of one job: program, names, helpers, tests."""
    if "random" in job["tests"]:
        import random

        random.seed(0)  # the same verdict every time
    scope = {"__name__": "tests"}
    where = "the tests' helpers"
    try:
        exec(compile(job["helpers"], "<helpers>", "exec"), scope)
        where = "the tests' text"
        tests = compile(job["tests"], "<tests>", "exec")
        where = "the program"
        program.ask("run", job["program"])
        scope |= {name: program.ask("name", name) for name in job["names"]}
        where = "the tests"
        exec(tests, scope)
    except BaseException as error:  # Lost and SystemExit too: whatever stops the tests, they have not passed
        if where.startswith("the tests' "):
            return ["unjudged", f"{where} cannot be run: {type(error).__name__}: {error}"[:300]]
        if program.unsent:
            return ["unjudged", program.unsent]
        return ["failed", reason(error, where, job["tests"])]
    if program.lost:
        return ["failed", program.lost]
    return ["passed", ""] if program.calls else ["failed", "the tests called nothing of the program"]


def reason(error: BaseException, where: str, tests: str) -> str:
    """In a sentence what stopped the tests, with the line of the test."""
    text = f"{where}: {str(error) if isinstance(error, Lost) else f'{type(error).__name__}: {error}'}"[:300].strip(": ")
    line, trace = 0, error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<tests>" else line
        trace = trace.tb_next
    lines = tests.splitlines()
    return f"{text} in {lines[line - 1].strip()[:200]!r}" if 0 < line <= len(lines) else text

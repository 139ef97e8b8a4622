"""How a script starts: its options are read from the command line, and what goes wrong is one line."""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from minir1 import ranks
from minir1.settings import below_folders

REFUSED = (ValueError, OSError, ImportError, SyntaxError)  # options, files (a task is one), packages: exit code 2
FAILED = (RuntimeError, ArithmeticError, MemoryError)  # a run, such as one whose loss is not finite: exit code 1


def run(main: Callable, config: type, *, on_ranks: bool = False, **settings) -> None:
    """Call `main` with the options of the command line, as the dataclass `config` describes them.

    What is wrong with the input or went wrong in the run is printed as one line, `error: what is wrong and what is
    allowed`. Errors that this project did not raise itself are named with their type. With --debug, an option of every
    script, the line is a traceback. Errors of other types than REFUSED and FAILED are bugs and always have one. Ctrl-C
    ends with exit code 130.

    on_ranks: whether torchrun may start it in several processes, its ranks (minir1/distributed.py). The line of an
    error then names the rank, and ranks that torchrun starts again after a failure resume. settings: those of tyro.cli,
    such as default=Config(steps=10).
    """
    debug = "--debug" in sys.argv
    try:
        options = _options(config, [word for word in sys.argv[1:] if word != "--debug"], settings)
        if isinstance(getattr(options, "out", None), Path):
            below_folders(options, "out")  # before anything is loaded
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and hasattr(options, "resume"):
            options = replace(options, resume=True)
        if ranks.started() > 1 and not on_ranks:
            raise ValueError("this script runs in one process: start it without torchrun")
        with ranks.group():
            main(options)
    except KeyboardInterrupt:
        advice = ": the same command with --resume continues from what was saved"
        _end("interrupted" + (advice if hasattr(config, "resume") else ""), 130)
    except (*REFUSED, *FAILED) as error:
        if debug and ranks.started() == 1:
            raise
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split())
        exhausted = re.search("out of memory|allocate memory|size calculation overflow", text)
        if isinstance(error, MemoryError) or (exhausted and not _raised_here(error)):
            text = f"out of memory: {text[:300]}"
        elif not (isinstance(error, OSError) or _raised_here(error)):
            text = f"{type(error).__name__}: {text[:300]} (--debug shows where)"
        _end(f"error: {text}", 2 if isinstance(error, REFUSED) else 1)
    except Exception as error:
        if ranks.started() == 1:
            raise
        traceback.print_exc()
        _end(f"error: {type(error).__name__}", 1)
    else:
        if ranks.started() > 1:
            _exit(0)


def _options(config: type, words: list[str], settings: dict):
    """The options as an instance of `config`. A refusal, for which tyro draws a box, becomes one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config, args=words, **settings)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        lines = re.sub("\x1b\\[[0-9;]*m", "", box.getvalue()).splitlines()[1:]  # without colours and title
        parts = [part.strip() for part in re.split("[─-]{9,}", " ".join(line.strip("│╰╯ ") for line in lines))]
        what, *more = filter(None, parts)
        text = str(end.__context__) if isinstance(end.__context__, ValueError) else what
        text += "".join(f"; {part}" for part in more if part.startswith("Perhaps you meant"))
        _end(f"error: {' '.join(text.split())}", 2)


def _end(line: str, code: int) -> None:
    name = f"rank {os.environ['RANK']}: " if ranks.started() > 1 else ""
    print(f"{name}{line}\n", end="", file=sys.stderr, flush=True)  # in one piece, as other ranks print too
    _exit(code)


def _exit(code: int) -> None:
    """End this process. A rank ends without the shutdown of Python, in which threads of torch's process groups would
    wait for ranks that are gone, or abort the process while they free the tensors of the last exchange."""
    if ranks.started() > 1:
        with contextlib.suppress(OSError):  # a pipe that nobody reads any more
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _raised_here(error: Exception) -> bool:
    """Whether a `raise` in this project made the error, so that its message was written for the user."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    statement = linecache.getline(frame.f_code.co_filename, line).strip()
    package = frame.f_globals["__name__"].partition(".")[0]
    return package in ("minir1", "experiments", "__main__") and statement.startswith("raise ")

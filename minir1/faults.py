"""Which rank failed, and why: when one of several ranks fails, all end, each with a line on stderr that names it.

    rank 1: error: out of memory: ...
    rank 0: error: rank 1 failed: out of memory: ...

A rank that fails leaves its cause in torchrun's store before it ends. The others lose their connection to it, or wait
for it in vain for the time of `distributed.WAIT`, or torchrun ends them first; then they ask in the store. A thread of
each rank answers with the line of code at which its rank is: one outside of torch.distributed is where the rank hangs.
Ranks that do not answer have been killed. torchrun ends those that hang, once one rank has ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

ASKED, VERDICT = "asked", "verdict"  # keys of the store
LOOK, ANSWERS = 1.0, 4.0  # seconds between looks at it, and to wait for answers
ROOT = Path(__file__).parent.parent


class Ended(BaseException):
    """SIGTERM has come: torchrun has seen that a rank failed, or somebody ends the run. As with KeyboardInterrupt, no
    code on the way takes it for an error of its own."""


def attempt(store: Store) -> PrefixStore:
    """The store with keys of this start alone: torchrun keeps it over its restarts, with addresses of dead ranks."""
    return PrefixStore(f"minir1 {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def refused_before(store: Store) -> None:
    """ValueError with the text of the refusal for which an earlier start of the same command has ended."""
    if store.check(["refused"]):
        raise ValueError(store.get("refused").decode())


@contextmanager
def named(store: Store, rank: int, world: int, wait: timedelta) -> Iterator[None]:
    """In the block, an error that comes from other ranks becomes a RuntimeError that names them and their causes.

    An error of this rank itself is left in the store. A refusal (ValueError) is kept for torchrun's restarts, which
    would meet it again, or resume the run that this one was not to touch.
    """
    def end(*_):
        raise Ended("SIGTERM")

    own, over = attempt(store), threading.Event()
    before = signal.signal(signal.SIGTERM, end)
    thread = threading.Thread(target=_answer, args=(own, rank, over), daemon=True)
    thread.start()
    try:
        yield
    except (Exception, Ended) as error:
        if lost(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which sees the failure at about the same time
            raise RuntimeError(_causes(own, rank, world, wait, error)) from error
        with suppress(RuntimeError):  # the store has ended with torchrun
            own.set(f"cause {rank}", describe(error))
            if isinstance(error, ValueError):
                store.set("refused", str(error))
        raise
    else:
        signal.signal(signal.SIGTERM, before)
    finally:
        over.set()
        thread.join(LOOK)  # Python aborts where it ends amid a call of the store


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return f"out of memory: {text}"
    return text if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {text}"


def lost(error: BaseException) -> bool:
    """Whether an error comes from other ranks: they cannot be reached, or torchrun ends this one for their sake."""
    return isinstance(error, (dist.DistError, Ended)) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _causes(store: Store, rank: int, world: int, wait: timedelta, error: BaseException) -> str:
    """Which other ranks failed, and why, as far as the store says; waits ANSWERS seconds for those that say nothing."""
    store.set(ASKED, "")
    others, end = [r for r in range(world) if r != rank], time.monotonic() + ANSWERS

    def told(kind: str) -> dict[int, str]:
        return {r: store.get(f"{kind} {r}").decode() for r in others if store.check([f"{kind} {r}"])}

    while not (causes := told("cause")) and len(told("place")) < len(others) and time.monotonic() < end:
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        time.sleep(0.05)
    places = told("place")
    lines = [f"rank {r} failed: {cause}" for r, cause in causes.items()]
    if not lines:
        lines = [f"rank {r} ended without an error of its own: it was killed" for r in others if r not in places]
    if not lines:
        late = f"did not come within {wait.total_seconds() / 60:g} min: it is at"
        lines = [f"rank {r} {late} {place}" for r, place in places.items() if place]
    if lines:
        store.set(VERDICT, "; ".join(lines))  # for ranks that lose the others when this one ends
    return "; ".join(lines) or f"no other rank says why: {describe(error)}"


def _answer(store: Store, rank: int, over: threading.Event) -> None:
    """Wait until a rank asks; then say where this one is, or nothing if it waits for others."""
    with suppress(RuntimeError):  # the store has ended with torchrun
        while not over.wait(LOOK):
            if store.check([ASKED]):
                return store.set(f"place {rank}", _place())


def _place() -> str:
    """File, line and function of this project at which the main thread is; "" where it waits for others, or asks."""
    frames = sys._current_frames()
    frame = frames[threading.main_thread().ident]
    inside = [f"{os.sep}torch{os.sep}distributed{os.sep}" in f.f_code.co_filename for f in (frame, *frames.values())]
    asks, joins = (frame.f_code.co_filename == file for file in (__file__, threading.__file__))
    if inside[0] or asks or (joins and any(inside)):  # the last: it waits for a thread that exchanges, `judge.beside`
        return ""
    while frame.f_back and not frame.f_code.co_filename.startswith(str(ROOT)):
        frame = frame.f_back
    name = frame.f_code.co_filename.removeprefix(f"{ROOT}{os.sep}")
    return f"{name}, line {frame.f_lineno}, in {frame.f_code.co_name}"

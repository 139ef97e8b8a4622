"""Programs that a model wrote, run in isolation, and judged by tests that they cannot see.

    run_tests("def double(x): return 2 * x", "assert double(4) == 8", names=["double"])   # Result("passed", "")

The tests run in one process, the driver, and the program in another, the candidate. Calls go over a pipe as plain
data: the program sees the arguments of one call at a time, its results arrive as new objects of builtin types, and the
verdict takes a way that the program has no access to. So nothing that it patches, prints, raises or ends makes a test
pass.

Both processes are new for each verification, and confined: by bubblewrap where it is installed, else by Linux
namespaces, else by what needs no privileges alone. `protection` says in a sentence what holds on this machine;
docs/sandbox.md says more.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minir1.sandboxed import interpreter

SECONDS, MEMORY = 10.0, 2**30  # of one process, by default
MEANS = ("bwrap", "namespaces", "plain")  # in this order, the first that works
SLOTS = threading.BoundedSemaphore(os.cpu_count() or 1)  # programs that run at once
GRACE = 90  # seconds beyond the program's own; after them the warden itself must have failed
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}  # all there is; the same order of a set every time

SAYS = {
    "namespaces": "namespaces, with no network, no other process and no file but Python's and an empty folder",
    "landlock": "Landlock, which opens no other file",
    "seccomp": "seccomp, which refuses new processes, signals, sockets and whatever Python does not need",
    "limits": "limits of time, memory, files and threads",
}
LACKS = {"landlock": "files that this user may read", "seccomp": "the network, files and other processes"}


def _forked() -> None:
    """A fork must not share the slots that other threads of its parent hold."""
    global SLOTS
    SLOTS = threading.BoundedSemaphore(os.cpu_count() or 1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True)
class Result:
    """The outcome of a verification. "unjudged": the sandbox could not start, or the tests themselves cannot be run."""

    status: Literal["passed", "failed", "unjudged"]
    reason: str  # in a sentence; "" if passed
    layers: tuple[str, ...] = ()  # what confined the program


def run_tests(
    program: str,
    tests: str,
    *,
    names: Sequence[str],
    helpers: str = "",
    seconds: float = SECONDS,
    memory: int = MEMORY,
    means: str | None = None,
) -> Result:
    """Whether the program passes the tests.

    program: Python, untrusted. tests: Python that raises if the program is wrong. names: what the tests use of the
    program; it must define all of them. helpers: trusted Python that defines what else the tests use. seconds: wall
    time from the start of the program, and about the CPU time of a process. memory: bytes of address space of a
    process. means: one of MEANS instead of the best. Any thread may call; as many programs run at once as there are
    cores.

    Arguments arrive at the program as copies; a result that is no plain data equals nothing but can be passed back,
    called and iterated. Programs have the standard library alone. ValueError for seconds, memory or means out of range.
    """
    if not seconds > 0 or memory < 2**26 or means not in (None, *MEANS):
        settings = f"seconds = {seconds}, memory = {memory}, means = {means!r}"
        raise ValueError(f"{settings}: need seconds > 0, memory >= 2**26 and one of {', '.join(MEANS)}")
    means = means or best()[0]
    if not means:
        return Result("unjudged", protection())
    job = {"program": program, "tests": tests, "names": list(names), "helpers": helpers}
    content = json.dumps(job).encode()
    arguments = [means, os.getpid(), seconds, memory, len(content), shutil.which("bwrap") or "bwrap"]
    with SLOTS:
        try:
            done = subprocess.run(
                interpreter("main", arguments), input=content, capture_output=True, timeout=seconds + GRACE,
                env=ENVIRONMENT, cwd="/", start_new_session=True,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return Result("unjudged", f"the sandbox did not start: {error}"[:300])
    if done.returncode or not done.stdout:
        return Result("unjudged", f"the sandbox broke: {done.stderr.decode(errors='replace').strip()[-300:]}")
    status, reason, layers = json.loads(done.stdout)
    return Result(status, reason, tuple(layers))


def protection() -> str:
    """A sentence on what confines programs on this machine, and on what does not."""
    means, layers, reason = best()
    if not means:
        return f"Programs cannot be run on this machine: {reason}."
    by = "" if means == "plain" else f" ({means})"
    layers_in_words = "; ".join(text for layer, text in SAYS.items() if layer in layers)
    open_to = [text for layer, text in LACKS.items() if layer not in layers]
    lacking = f"; they are not kept from {' or '.join(open_to)}" if open_to and not {"namespaces"} & {*layers} else ""
    return f"Programs run in new processes, confined by {layers_in_words}{by}{lacking}."


@functools.cache
def best() -> tuple[str, tuple[str, ...], str]:
    """The first of MEANS with which a program passes a test here, and its layers; else "", () and the reason."""
    if os.name != "posix":
        return "", (), "it needs Linux or another POSIX system"
    program = "import math, collections, decimal, random\ndef same(x): return x"
    for means in MEANS if shutil.which("bwrap") else MEANS[1:]:
        result = run_tests(program, "assert same([1]) == [1]", names=["same"], seconds=30, means=means)
        if result.status == "passed":
            return means, result.layers, ""
    return "", (), result.reason


def main() -> None:
    """Print what protects here, and the time of a verification."""
    print(protection())
    seconds = []
    for _ in range(21):
        began = time.perf_counter()
        run_tests("def double(x): return 2 * x", "assert double(4) == 8", names=["double"])
        seconds.append(time.perf_counter() - began)
    print(f"One verification takes {1000 * statistics.median(seconds):.0f} ms (median of {len(seconds)}).")


if __name__ == "__main__":
    main()

"""The warden: the process that minir1/sandbox.py starts. It starts driver and candidate, watches and ends them.

It runs no foreign code and reads none. It ends both when the verdict is there, when the time is over, when one of them
has too many threads, or when its own parent is gone.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import signal
import sys
import time

from minir1.sandboxed import ROOT, candidate, confine, driver, interpreter

START = 30  # seconds for both processes to get ready, which are not in the program's time
THREADS = 64  # of one process; its memory and its CPU time are limited by the kernel
INTERVAL = 0.02  # seconds between two looks at it
OWN = ("__init__.py", "sandboxed")  # what runs in bubblewrap, of minir1
INSIDE = "/minir1"  # where it is in bubblewrap


def main(means: str, parent: int, seconds: float, memory: int, size: int, bwrap: str) -> None:
    """Print the result of one job, [status, reason, layers], as JSON.

    means: "bwrap", "namespaces" or "plain". parent: the process id of the caller, size: bytes of the job on the
    standard input, bwrap: the program of this name.
    """
    if confine.libc is not None:
        confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of the warden, which waits for them
    requests, replies, verdicts = os.pipe(), os.pipe(), os.pipe()
    roles = [["candidate", requests[0], replies[1]], ["driver", requests[1], replies[0], verdicts[1], size]]
    children, pids, layers = [], [], []
    try:
        reports = []
        for role in roles:
            child, report = start(role, [means, seconds, memory], bwrap)
            children.append(child)
            reports.append(report)
        for descriptor in (*requests, *replies, verdicts[1]):
            os.close(descriptor)  # so that each side notices the end of the other
        for report in reports:
            pid, layers = ready(report)
            pids.append(pid)
        result = watch(pids, verdicts[0], parent, time.monotonic() + seconds)
    except OSError as error:
        result = ["unjudged", f"the sandbox did not start: {error}"]
    end(children, pids if means == "namespaces" else [])
    print(json.dumps([*result, layers]), flush=True)


def start(role: list, settings: list, bwrap: str) -> tuple[int, int]:
    """Start a process in the role: its id, and the descriptor on which it reports who plays the role, and when."""
    report, ours = os.pipe()
    if child := os.fork():
        os.close(ours)
        return child, report
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        if role[0] == "candidate":
            os.dup2(null, 0)  # the tests are to be read there
        if settings[0] == "bwrap":
            os.dup2(ours, 2)  # its errors
            for descriptor in (ours, *role[1:4]):
                os.set_inheritable(descriptor, True)
            os.execv(
                bwrap, [bwrap, *bwrap_arguments(os.dup(ours)), *interpreter("enter", [role, settings, ours], INSIDE)]
            )
        if settings[0] == "namespaces":
            confine.unshare()
            confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
            if pid := os.fork():  # the first process in its namespace; this one is outside
                os.write(ours, b"%d\n" % pid)
                os.closerange(3, 2**16)  # so that each side notices the end of the other
                while True:  # until killed: so the process stays a zombie, and nobody else gets its id
                    signal.pause()
        else:
            os.write(ours, b"%d\n" % os.getpid())
        enter(role, settings, ours)
    except OSError as error:
        os.write(ours, str(error).encode())
    finally:
        os._exit(1)


def enter(role: list, settings: list, report: int) -> None:
    """Confine this process, report that it is ready, and play the role."""
    name, *arguments = role
    descriptors = arguments[:3]
    os.dup2(1, 2)
    used = sorted({0, 1, 2, report, *descriptors})
    for before, after in zip(used, [*used[1:], 2**16]):
        os.closerange(before + 1, after)
    try:
        layers = confine.confine(*settings)
    except OSError as error:
        os.write(report, str(error).encode())
        os._exit(1)
    os.write(report, b"\nready %s\n" % " ".join(layers).encode())
    os.close(report)
    (candidate if name == "candidate" else driver).run(*arguments)
    os._exit(0)


def ready(report: int) -> tuple[int, list[str]]:
    """The process id and the layers that a started process reports. OSError if it is not ready."""
    text, late = b"", time.monotonic() + START
    while not ((pid := re.search(rb"([0-9]+)[,\n]", text)) and (layers := re.search(rb"\nready (.*)\n", text))):
        readable, _, _ = select.select([report], [], [], max(0, late - time.monotonic()))
        more = os.read(report, 4096) if readable else b""
        if not more:
            raise OSError(text.decode(errors="replace").strip()[-300:] or "a process ended, or took too long")
        text += more
    os.close(report)
    return int(pid[1]), layers[1].decode().split()


def watch(pids: list[int], verdicts: int, parent: int, end: float) -> list[str]:
    """The verdict of the driver, or why there is none."""
    text = b""
    while not text.endswith(b"\n"):
        readable, _, _ = select.select([verdicts], [], [], INTERVAL)
        if readable:
            more = os.read(verdicts, 4096)
            if not more:
                return ["failed", "the tests ended without a verdict: out of memory or CPU time"]
            text += more
        elif time.monotonic() > end:
            return ["failed", "the time is over"]
        elif max(map(threads, pids)) > THREADS:
            return ["failed", f"more than {THREADS} threads"]
        elif os.getppid() != parent:
            return ["failed", "nobody waits for the verdict"]
    return json.loads(text)


def threads(pid: int) -> int:
    """Of a process and its children, since bubblewrap reports the parent of ours."""
    try:
        status = read(f"/proc/{pid}/status")
        children = read(f"/proc/{pid}/task/{pid}/children").split()
    except OSError:
        return 0  # it has ended, or the system has no such files
    count = re.search(rb"\nThreads:\s+([0-9]+)", status)
    return int(count[1] if count else 0) + sum(map(threads, map(int, children)))


def read(path: str) -> bytes:
    """The content of a file."""
    with open(path, "rb") as file:
        return file.read()


def end(children: list[int], pids: list[int]) -> None:
    """Kill all processes, and wait until they are gone."""
    for pid in pids + children:
        os.kill(pid, signal.SIGKILL)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def bwrap_arguments(info: int) -> list[str]:
    """Options of bubblewrap for what `confine.unshare` and `confine.new_root` do otherwise."""
    os.set_inheritable(info, True)
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--die-with-parent"]
    options += ["--info-fd", str(info), "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # `confine.drop` needs them once
        options += [word for name in ("SETUID", "SETGID", "SETPCAP") for word in ("--cap-add", f"CAP_{name}")]
    else:
        options += ["--unshare-user", "--uid", str(confine.NOBODY), "--gid", str(confine.NOBODY)]
    options += ["--perms", "1777", "--size", str(confine.SPACE), "--tmpfs", "/tmp"]
    shown = {path: path for path in [*confine.sources(), os.path.realpath(sys.executable)]}
    for path, target in (shown | {f"{ROOT}/minir1/{name}": f"{INSIDE}/minir1/{name}" for name in OWN}).items():
        parents = itertools.accumulate(target.split("/")[:-1], "{}/{}".format)
        options += [word for parent in parents if parent for word in ("--perms", "755", "--dir", parent)]
        options += ["--symlink", os.readlink(path), target] if os.path.islink(path) else ["--ro-bind", path, target]
    for path in confine.packages():
        if not os.path.islink(path):
            options += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    return [*options, "--remount-ro", "/", "--chdir", "/tmp"]

"""Runs trainings as processes: pinned to cores, logged, resumed after a kill, never two in one folder."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minir1.files import replace_text


def pinned(jobs: int) -> ThreadPoolExecutor:
    """Threads that pin their child processes to one core each, far apart, where the system can do so."""
    if not hasattr(os, "sched_setaffinity"):
        return ThreadPoolExecutor(jobs)
    available = sorted(os.sched_getaffinity(0))
    cores = [available[job * len(available) // jobs % len(available)] for job in range(jobs)]
    return ThreadPoolExecutor(jobs, initializer=lambda: os.sched_setaffinity(0, {cores.pop()}))


def run_or_resume(words: list[str], folder: Path, asked: str, threads: int = 1) -> None:
    """Run a script that writes to `folder`, with --resume if the folder exists; see `same_command` and `call`.

    words: python, -m, the script and its options.
    """
    same_command(folder, asked)
    call(words, folder, threads, resume=True)


def same_command(folder: Path, asked: str) -> None:
    """Write the command of the run in `folder` beside it. ValueError if the folder is a run of another command."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    record = folder.with_name(f"{folder.name}.command")
    if record.exists() and record.read_text() != asked:
        raise ValueError(f"{folder} was run with {record.read_text()!r}, not {asked!r}: choose another --out")
    replace_text(record, asked)


def call(words: list[str], folder: Path, threads: int = 1, resume: bool = False) -> None:
    """Run a command and append its output to a log beside `folder`. RuntimeError with its last line on failure.

    The process itself locks the log. If only its caller is killed, the process continues and the next caller waits for
    it here, so that two processes never write to one folder.
    """
    import fcntl  # not on Windows

    log = folder.with_name(f"{folder.name}.log")
    with open(log, "a") as file:  # child processes share its lock until the last of them ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for a process of an earlier call that is still running", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        if resume and folder.exists():
            words = [*words[:3], "--resume", *words[3:]]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = log.read_text().strip().rpartition("\n")[2]
        raise RuntimeError(f"{folder} failed with {done.returncode}, see {log}: {last}")

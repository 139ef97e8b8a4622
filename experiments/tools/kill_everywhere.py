"""Kill a training at every file-system event, resume it, and compare it with an uninterrupted run, bit for bit.

    python -m experiments.tools.kill_everywhere --script pretrain
    python -m experiments.tools.kill_everywhere --script r1_zero --every 7 --double 50

An event is a file opened, written, fsynced, renamed or deleted, or a folder made or deleted. A process gets SIGKILL
just before it, or amid a write; with `--double` some resumed runs are killed as well, at random. All are resumed to
their end. Equal to the bit must be weights, optimizers, metrics, samples and results, but for what a clock or the
memory says, and the names of all files. Every run is a fork of this process, on one thread. Exits with 1 if one
differs.

The trainings have toy size (kill_trainings.py).
"""

from __future__ import annotations

import builtins
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import rich
import torch
import torch._dynamo  # noqa: F401 - else every fork imports it for its optimizers, in seconds

from experiments.tools.kill_trainings import SCRIPTS, training
from minir1 import checkpoint, cli
from minir1.log import progress, read_metrics, table
from minir1.model import hf, lora
from minir1.settings import at_least, new_folder

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
CLOCK = ("time/", "perf/", "seconds/", "memory/")


@dataclass(frozen=True)
class Config:
    """Which training is killed, and how often."""

    script: Literal[SCRIPTS] = "r1_zero"
    every: int = 1  # kill at each n-th event
    double: int = 0  # also this many runs that are killed at random, and again when they are resumed
    seed: int = 0  # of these
    out: Path = Path("runs/kill-everywhere")  # a new folder, which keeps the runs that differ

    def __post_init__(self):
        at_least(self, 1, "every")
        at_least(self, 0, "double", "seed")
        new_folder(self, "out")


# ---- killing -----------------------------------------------------------------------------------


class Events:
    """The file-system events of this process below a folder, counted; it dies at the `last` one."""

    def __init__(self, folder: Path, last: int | None):
        self.folder, self.last, self.seen = str(folder), last, []

    def happens(self, name: str, path, half: Callable[[], None] = lambda: None) -> None:
        """Count an event; if it is the last, do half of it and die as if the power were cut."""
        path = os.fspath(path)
        self.seen.append(f"{name} {os.path.relpath(path, self.folder) if os.sep in path else path}")
        if len(self.seen) == self.last:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def inside(self, path) -> bool:
        """Whether a path is below the folder; a bare name is one that shutil.rmtree deletes there."""
        if not isinstance(path, (str, os.PathLike)):
            return False
        return os.path.abspath(path).startswith(self.folder) or os.sep not in os.fspath(path)

    def audit(self, name: str, arguments: tuple) -> None:
        """What Python itself reports, before it happens."""
        if name in EVENTS and self.inside(arguments[0]) and (name != "open" or arguments[2] & WRITES):
            self.happens(name, arguments[0])

    def install(self) -> None:
        """Count from now on."""
        real_open, real_fsync = io.open, os.fsync

        def opened(path, mode="r", *args, **more):
            file = real_open(path, mode, *args, **more)
            if set(mode) & set("wax+") and self.inside(path):
                real_write = file.write

                def write(data):
                    self.happens("write", path, lambda: (real_write(data[: len(data) // 2]), file.flush()))
                    return real_write(data)

                file.write = write
            return file

        def fsync(descriptor):
            self.happens("fsync", self.folder)
            real_fsync(descriptor)

        def in_halves(save):  # by torch and safetensors, of whose writes Python knows nothing
            def saved(tensors, path, **more):
                save(tensors, path, **more)
                self.happens("half of", path, lambda: os.truncate(path, os.path.getsize(path) // 2))

            return saved

        builtins.open = io.open = opened
        os.fsync, torch.save = fsync, in_halves(torch.save)
        hf.save_file, lora.save_file = in_halves(hf.save_file), in_halves(lora.save_file)
        sys.addaudithook(self.audit)


def child(work: Callable[[], None], log: Path) -> int:
    """Do some work in a fork of this process, printing to a file; returns its exit code, -9 where it was killed."""
    sys.stdout.flush()
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    with open(log, "a", encoding="utf-8") as sys.stdout:
        sys.stderr = sys.stdout
        rich.reconfigure(file=sys.stdout)  # another thread may hold the console of the parent
        try:
            work()
            code = 0
        except BaseException:  # reported by the exit code; a fork must not return into the parent's loop
            traceback.print_exc()
    os._exit(code)


def trial(main: Callable, options, deaths: list[int], out: Path, whole: Path) -> tuple[str, str]:
    """Run, die at each of these events in turn, run to the end: ("equal" | "differs" | "left over" | "fails", why)."""
    log = out.with_suffix(".txt")
    for number, last in enumerate([*deaths, None]):

        def attempt() -> None:
            Events(out, last).install()
            main(replace(options, out=out, resume=number > 0))

        code = child(attempt, log)
        if code not in (0, -signal.SIGKILL) or (last is None and code):
            return "fails", log.read_text(encoding="utf-8").strip().splitlines()[-1]
    surplus = sorted(names(out) ^ names(whole))
    if surplus:
        return "left over", ", ".join(surplus)
    differs = [name for name in sorted(names(whole)) if content(out / name, out) != content(whole / name, whole)]
    return ("differs", ", ".join(differs)) if differs else ("equal", "")


# ---- comparing ---------------------------------------------------------------------------------


def names(out: Path) -> set[str]:
    """The files and folders of a run."""
    return {str(path.relative_to(out)) for path in out.rglob("*")}


def content(path: Path, out: Path):
    """What must be equal in a file of the run `out`: all but what a clock, the memory or the command line says."""
    if path.is_dir():
        return None
    if path.name == checkpoint.STATE:
        return bits({key: value for key, value in checkpoint.load_state(path.parent).items() if key != "seconds"})
    if path.name == "metrics.jsonl":
        return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in read_metrics(path)]
    if path == out / "result.json":
        return {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith(CLOCK)}
    if path == out / "config.json":
        return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("out", "resume")}
    return path.read_bytes()


def bits(value):
    """A state with its tensors as bytes, which `==` compares."""
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.shape, value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return value


def main(config: Config) -> dict[str, int]:
    """Kill, resume, compare; print a table; returns how many runs ended how. SystemExit unless all are equal."""
    torch.set_num_threads(1)  # this process must have no threads when it forks
    out = config.out.resolve()
    if out.exists():
        raise ValueError(f"out = {config.out} is there already: choose a new folder")
    out.mkdir(parents=True)
    script, options = training(config.script, out, child)
    whole, seen = out / "whole", out / "events.json"

    def count() -> None:
        events = Events(whole, None)
        events.install()
        script(replace(options, out=whole))
        seen.write_text(json.dumps(events.seen))

    if child(count, out / "whole.txt"):
        raise ValueError(f"the run that nobody kills fails: see {out / 'whole.txt'}")
    events = json.loads(seen.read_text())
    rng = random.Random(f"kill {config.seed}")
    plan = [[k] for k in range(1, len(events) + 1, config.every)]
    plan += [[rng.randint(1, len(events)), rng.randint(1, len(events))] for _ in range(config.double)]
    ends = dict.fromkeys(("equal", "differs", "left over", "fails"), 0)
    with progress(len(plan), f"{config.script}: kills") as advance:
        for deaths in plan:
            folder = out / "-".join(map(str, deaths))
            end, why = trial(script, options, deaths, folder, whole)
            ends[end] += 1
            if end == "equal":
                shutil.rmtree(folder, ignore_errors=True)
                folder.with_suffix(".txt").unlink()
            else:
                print(f"killed at {', then '.join(f'{k} ({events[k - 1]})' for k in deaths)}: {end}: {why}")
            advance()
    rows = [[config.script, len(events), len(plan), *ends.values()]]
    table(f"runs that were killed and resumed, seed {config.seed}", ["", "events", "killed", *ends], rows)
    if ends["equal"] < len(plan):
        sys.exit(1)
    return ends


if __name__ == "__main__":
    cli.run(main, Config)

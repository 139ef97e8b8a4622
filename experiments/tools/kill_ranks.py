"""Kill one rank of a training on several ranks at random moments, and compare the restarted run with one never killed.

    python -m experiments.tools.kill_ranks --kills 20 --out runs/kill-ranks

Each run is an r1_zero of toy size on the CPU, under torchrun with --max-restarts 3. Once it is under way, a random rank
gets SIGKILL amid a random step, or amid its start; torchrun starts all ranks again, and nothing else is done. Equal to
the bit must be weights, optimizer, metrics, samples and results, but for what a clock or the memory says, and the names
of all files. Exits with 1 if one run differs. Linux only: it reads /proc.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import pretrain
from experiments.tools.kill_everywhere import content, names
from experiments.tools.kill_trainings import BASE
from minir1 import cli, sharded_state
from minir1.log import progress, table
from minir1.settings import at_least, new_folder

ROOT = Path(__file__).parent.parent.parent
TASK = '''
"""Countdown, whose answers are right here if they have an even number of characters."""
from minir1.tasks import Verdict, countdown
SPLITS = ("train", "validation")
problems = lambda split, data: countdown.problems(split, data)[:40]
verify = lambda problem, text: Verdict("wrong" if len(text) % 2 else "right", {})
'''
OPTIONS = """--steps 8 --eval-every 2 --prompts 4 --num-generations 4 --max-completion-length 24 --min-mixed 0
    --warmup 1 --eval-problems 4 --eval-answers 1 --beta 0.01 --learning-rate 1e-2 --microbatch 200 --device cpu"""


@dataclass(frozen=True)
class Config:
    """How often, and how many ranks."""

    kills: int = 20
    ranks: int = 2
    seed: int = 0  # of ranks and moments
    out: Path = Path("runs/kill-ranks")  # a new folder, which keeps the runs that differ

    def __post_init__(self):
        at_least(self, 1, "kills")
        at_least(self, 2, "ranks")
        at_least(self, 0, "seed")
        new_folder(self, "out")


def start(out: Path, ranks: int) -> subprocess.Popen:
    """The run `out` under torchrun, which prints to a file beside it; base and task are in the same folder."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--max-restarts", 3]
    words += ["-m", "experiments.r1_zero", "--checkpoint", out.parent / "base", "--task", out.parent / "task.py"]
    words += [*OPTIONS.split(), "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MINIR1_WAIT_MINUTES": "1"}
    with open(out.with_suffix(".txt"), "w", encoding="utf-8") as file:
        return subprocess.Popen([*map(str, words)], cwd=ROOT, env=environment, stdout=file, stderr=file)


def rows(out: Path) -> int:
    """The steps that a run has logged, the validation before the first included."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: subprocess.Popen, out: Path, count: int) -> float:
    """Wait until a run has logged `count` steps or has ended; the time then."""
    while process.poll() is None and rows(out) < count:
        time.sleep(0.01)
    return time.perf_counter()


def processes(torchrun: int) -> list[int]:
    """The processes that torchrun has started, the ranks."""
    return [*map(int, Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split())]


def differing(out: Path, whole: Path) -> list[str]:
    """What is not equal in two runs."""
    found = sorted(names(out) ^ names(whole))
    both = [name for name in sorted(names(out) & names(whole)) if sharded_state.FOLDER not in Path(name).parts]
    return found + [name for name in both if content(out / name, out) != content(whole / name, whole)]


def trial(out: Path, whole: Path, ranks: int, rank: int, after: int, delay: float) -> tuple[str, str, float]:
    """Start a run, kill a rank, wait for the end: (how it ended, what differs, seconds from the kill to the end)."""
    process = start(out, ranks)
    wait_for(process, out, after)
    time.sleep(delay)
    while process.poll() is None and len(processes(process.pid)) < ranks:
        time.sleep(0.01)
    if process.poll() is not None:
        return "ended before", "", 0.0
    os.kill(processes(process.pid)[rank], signal.SIGKILL)
    killed = time.perf_counter()
    code, seconds = process.wait(), time.perf_counter() - killed
    if code or "exitcode: -9" not in out.with_suffix(".txt").read_text(encoding="utf-8"):
        return "fails", f"see {out.with_suffix('.txt')}", seconds
    why = ", ".join(differing(out, whole))
    return ("differs" if why else "equal"), why, seconds


def main(config: Config) -> dict[str, int]:
    """Kill, wait, compare; print a table; returns how many runs ended how. SystemExit unless all are equal."""
    out = config.out.resolve()
    if out.exists():
        raise ValueError(f"out = {config.out} is there already: choose a new folder")
    out.mkdir(parents=True)
    (out / "task.py").write_text(TASK, encoding="utf-8")
    pretrain.main(replace(BASE, out=out / "base"))
    whole, began = out / "whole", time.perf_counter()
    process = start(whole, config.ranks)
    moments = [began, *(wait_for(process, whole, count) for count in range(1, 10))]  # 8 steps, and the one before them
    if process.wait():
        raise ValueError(f"the run that nobody kills fails: see {whole.with_suffix('.txt')}")
    rng, seconds = random.Random(f"kill ranks {config.seed}"), []
    ends = dict.fromkeys(("equal", "differs", "fails"), 0)
    with progress(config.kills, "kills") as advance:
        while len(seconds) < config.kills:
            folder, after, rank = out / f"killed-{len(seconds)}", rng.randrange(9), rng.randrange(config.ranks)
            delay = rng.random() * (moments[after + 1] - moments[after])
            end, why, took = trial(folder, whole, config.ranks, rank, after, delay)
            if end in ("ended before", "equal"):
                shutil.rmtree(folder)
                folder.with_suffix(".txt").unlink()
            else:
                print(f"{folder.name}: rank {rank} killed after {after} rows and {delay:.2f} s: {end}: {why}")
            if end != "ended before":
                ends[end] += 1
                seconds.append(took)
                advance()
    last = [moments[-1] - began, sum(seconds) / len(seconds)]
    columns = ["", "killed", *ends, "seconds of a whole run", "from the kill to the end, on average"]
    row = ["r1_zero", config.kills, *ends.values(), *(f"{x:.1f}" for x in last)]
    table(f"one of {config.ranks} ranks killed, seed {config.seed}", columns, [row])
    if ends["equal"] < config.kills:
        sys.exit(1)
    return ends


if __name__ == "__main__":
    cli.run(main, Config)

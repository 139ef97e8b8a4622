"""Runs of scripts that are killed, resumed and compared to the bit."""

import importlib
import json
import os
import pickle
import pkgutil
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minir1 import checkpoint
from minir1.log import read_metrics
from minir1.model import hf

ROOT = Path(__file__).parent.parent
LETHAL = """
import importlib, os, pickle, pkgutil, signal, sys
script, config, owner, name, count = sys.argv[1:]
script, holder, calls = importlib.import_module(f"experiments.{script}"), pkgutil.resolve_name(owner), 0
real = getattr(holder, name)
def lethal(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(holder, name, lethal)
script.main(pickle.load(open(config, "rb")))
"""


def command(*words, **more) -> subprocess.CompletedProcess:
    """Run python with these arguments."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": path}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, **more)


def result_of(out: Path) -> dict:
    """The result.json of a run."""
    return json.loads((out / "result.json").read_text())


def kill(script: str, config, owner: str, name: str, count: int, scratch: Path) -> None:
    """Run a script in a process that gets SIGKILL when it calls owner.name for the count-th time."""
    scratch.write_bytes(pickle.dumps(config))
    done = command("-c", LETHAL, script, scratch, owner, name, count)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


class Killed(BaseException):
    """Stands for SIGKILL where a new process would take too long."""


def stop(monkeypatch, script: str, config, owner: str, name: str, count: int) -> None:
    """As `kill`, by an exception that nothing catches, in this process."""
    calls, holder = 0, pkgutil.resolve_name(owner)
    real = getattr(holder, name)

    def lethal(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(holder, name, lethal)
        importlib.import_module(f"experiments.{script}").main(config)


def plain_metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in read_metrics(out)]


def assert_equal_bits(a, b, where="state"):
    """Two checkpoint states are equal to the bit, but for the seconds."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "seconds":  # the clock
                assert_equal_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b)):
            assert_equal_bits(x, y, f"{where}/{n}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """All metrics but time/ and perf/, samples, rollouts, checkpoints, optimizers and results are equal to the bit."""
    assert plain_metrics(a) == plain_metrics(b)
    if (a / "samples.jsonl").exists():
        assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    stored = [{path.name: path.read_bytes() for path in (out / "rollouts").glob("*")} for out in (a, b)]
    assert stored[0] == stored[1]
    names = [sorted(path.name for path in (out / "checkpoint").iterdir()) for out in (a, b)]
    assert names[0] == names[1]
    for pointer in (checkpoint.latest, checkpoint.best):
        x, y = pointer(a / "checkpoint"), pointer(b / "checkpoint")
        assert (x and x.name) == (y and y.name)
        if x:
            files = sorted(path.name for path in x.iterdir())
            assert files == sorted(path.name for path in y.iterdir()) and len(files) >= 3
            for file in files:
                if file != checkpoint.STATE:
                    assert (x / file).read_bytes() == (y / file).read_bytes()
            assert_equal_bits(checkpoint.load_state(x), checkpoint.load_state(y))
    clock = ("seconds/", "memory/")
    results = [{k: v for k, v in result_of(out).items() if not k.startswith(clock)} for out in (a, b)]
    assert results[0] == results[1]


def assert_resumes_by_itself(main, config, whole: Path, folder: Path) -> None:
    """A copy of the run `whole` resumes without its base, but not once a byte of its weights has changed."""
    out = shutil.copytree(whole, folder / "run")
    resumed = replace(config, out=out, resume=True)
    away = config.checkpoint.rename(folder / "away")
    try:
        main(resumed)
        assert_same_run(out, whole)
        path = checkpoint.latest(out / "checkpoint") / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{path} has changed since the run saved its digest: put the old file"):
            main(resumed)
    finally:
        away.rename(config.checkpoint)


def assert_learns_nothing_unjudged(monkeypatch, script, config, out: Path) -> dict:
    """A second step none of whose answers could be judged changes no state of a run; returns its metrics."""
    script.main(replace(config, steps=1, out=out / "one"))
    real, calls = script.judge_rollout, []

    def down(*args):
        calls.append(args)
        judged = real(*args)
        return judged if len(calls) == 1 else [[replace(a, right=False, unjudged=True) for a in g] for g in judged]

    monkeypatch.setattr(script, "judge_rollout", down)
    script.main(replace(config, steps=2, out=out / "two"))
    one, two = (checkpoint.load_state(checkpoint.latest(out / run / "checkpoint")) for run in ("one", "two"))
    kept = one.keys() - {"step", "best", "seconds"}
    assert_equal_bits({key: one[key] for key in kept}, {key: two[key] for key in kept})
    weights = [hf.load(checkpoint.latest(out / run / "checkpoint"))[0].state_dict() for run in ("one", "two")]
    assert_equal_bits(*weights)
    samples = [json.loads(line) for line in (out / "two" / "samples.jsonl").read_text().splitlines()]
    assert {sample["right"] for sample in samples if sample["step"] == 2} == {None}  # neither right nor wrong
    return read_metrics(out / "two")[2]

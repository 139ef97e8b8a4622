"""faults.py: torchrun's runs in which a rank fails, each way; all end soon, name it, and the restarts are equal."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from ranks import on_ranks
from runs import ROOT

from experiments.tools import kill_ranks
from minir1 import faults

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kill_ranks reads /proc")
WAIT = 6.0  # seconds, of MINIR1_WAIT_MINUTES; a rank of a busy machine is late by one or two
FAULTS = {  # with its micro-batch: what the other rank says, and seconds in which all ranks have ended
    "kill:3": (r"rank 1 ended without an error of its own: it was killed", 12),  # before the first checkpoint
    "hang:11": (r"rank 1 did not come within 0\.1 min: it is at tests/faulty\.py, line \d+, in faulty", WAIT + 12),
    "memory:8": (r"rank 1 failed: out of memory: .*DefaultCPUAllocator: can't allocate memory", 12),
    "nan:3": (r"step \d: the gradient of .* is not finite, first on rank 1, in its own loss or backward pass", 12),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of kill_ranks, with a run that was never killed in `whole`, after one kill."""
    out = tmp_path_factory.mktemp("faults") / "out"
    assert kill_ranks.main(kill_ranks.Config(kills=1, out=out)) == {"equal": 1, "differs": 0, "fails": 0}
    return out


def three(folder):
    """What ranks 0 and 2 say of rank 1, which hangs."""
    rank, store = dist.get_rank(), dist.FileStore(str(folder / "faults"), 3)
    try:
        with faults.named(store, rank, 3, timedelta(minutes=2)):
            if rank == 1:
                time.sleep(4)
            else:
                raise RuntimeError("[gloo/transport/tcp/pair.cc] Timed out")
    except RuntimeError as error:
        return str(error)


def test_only_the_rank_that_hangs_is_named(tmp_path):
    first, none, last = on_ranks(3, three, tmp_path)
    assert none is None and first == last
    assert re.fullmatch(r"rank 1 did not come within 2 min: it is at tests/test_faults\.py, line \d+, in three", first)


def alone(folder):
    """What a rank says that is ended before it has met the others, of which none has failed."""
    try:
        with faults.named(dist.FileStore(str(folder / "faults"), 2), dist.get_rank(), 2, timedelta(minutes=2)):
            if dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
    except RuntimeError as error:
        return str(error)


def test_a_rank_that_torchrun_ends_still_asks_who_has_failed(tmp_path):
    first, other = on_ranks(2, alone, tmp_path)
    assert re.fullmatch(r"rank 1 did not come within 2 min: it is at tests/test_faults\.py, line \d+, in alone", first)
    assert other is None


def torchrun(restarts: int, faults: str, runs, out) -> subprocess.CompletedProcess:
    """kill_ranks' run with these faults."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", restarts]
    words += [ROOT / "tests" / "faulty.py", faults, "--checkpoint", runs / "base", "--task", runs / "task.py"]
    words += [*kill_ranks.OPTIONS.split(), "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MINIR1_WAIT_MINUTES": f"{WAIT / 60}", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_every_fault_ends_all_ranks_is_named_and_resumed(runs):
    done = torchrun(4, "+".join(FAULTS), runs, runs / "faulty")
    assert done.returncode == 0, done.stderr
    assert kill_ranks.differing(runs / "faulty", runs / "whole") == []
    starts = re.split("(?m)^rank 0 starts at ", done.stderr)[1:]
    assert len(starts) == 5
    for (fault, (words, most)), text, after in zip(FAULTS.items(), starts, starts[1:]):
        ended = float(after.split()[0]) - float(re.search(r"has the fault .* at ([\d.]+)", text)[1])
        print(f"{fault}: {ended:.1f} s")
        assert re.search(f"(?m)^rank 0: error: {words}", text), text
        assert ended < most, (fault, ended)
    assert re.search("(?m)^rank 1: error: out of memory: ", starts[2]) and "exitcode: -9" in starts[0]


def test_a_refusal_is_not_resumed_by_restarts(tmp_path):
    """The second start would resume the run that the first refused to touch."""
    (tmp_path / "whole").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "whole" / name).write_text('{"step": 1}\n')
    done = torchrun(1, "none", tmp_path, tmp_path / "whole")
    errors = re.findall("(?m)^rank [01]: error: (.*)", done.stderr)
    assert done.returncode == 1 and len(errors) >= 2
    assert all("whole already holds a run: continue it with --resume" in error for error in errors), errors
    assert {path.name: path.read_text() for path in (tmp_path / "whole").iterdir()} == dict.fromkeys(
        ("config.json", "metrics.jsonl"), '{"step": 1}\n'
    )

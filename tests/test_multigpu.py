"""Scripts on two GPUs, over NCCL, against one: `pytest -m multigpu`, on a machine that has two. It needs no network."""

import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import rank_runs
from runs import ROOT, plain_metrics
from test_distributed_scripts import configs

NAMES = ("pretrain", "sft", "r1_zero")
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
pytestmark = pytest.mark.multigpu


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def both(request, tmp_path_factory, toy_base):
    """The dtype, and the folder with the runs on one GPU, in `one`, and on two, in `two`."""
    folder = tmp_path_factory.mktemp(request.param)
    wanted = configs(folder, toy_base("moe"), toy_base("dense"))
    runs = {name: wanted[name] for name in NAMES}
    runs = {
        name: (script.__name__, replace(config, device="auto", dtype=request.param))
        for name, (script, config) in runs.items()
    }
    rank_runs.run_all(runs, folder / "one")
    (folder / "runs.pickle").write_bytes(pickle.dumps(runs))
    words = [*TWO, rank_runs.__file__, str(folder / "runs.pickle"), str(folder / "two")]
    subprocess.run(words, check=True, timeout=900, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return request.param, folder


@pytest.mark.parametrize("name", NAMES)
def test_two_gpus_train_as_one(both, name):
    """All training metrics in float32; the losses in bfloat16, in which another rounding may sample another token."""
    dtype, folder = both
    one, two = plain_metrics(folder / "one" / name), plain_metrics(folder / "two" / name)
    assert [row["step"] for row in one] == [row["step"] for row in two] and one[-1]["step"] == 3
    for row, other in zip(one, two):
        assert row.keys() == other.keys() and all(map(math.isfinite, other.values()))
        for key, value in row.items():
            if key.startswith("train/") and dtype == "float32":
                assert other[key] == pytest.approx(value, rel=1e-2, abs=1e-3), (row["step"], key)
            if key == "train/loss" and dtype == "bfloat16":
                assert other[key] == pytest.approx(value, rel=5e-2), row["step"]
    assert list(Path(folder / "two" / name / "checkpoint").glob("step-*/model.safetensors"))

"""Runs that stop at a checkpoint of one number of ranks and resume on another, against runs that never stop."""

import shutil
from dataclasses import replace

import pytest
import torch
from rank_runs import run_all, stop_all
from ranks import on_ranks
from runs import assert_equal_bits, plain_metrics
from safetensors.torch import load_file
from test_distributed_scripts import RL, TRAIN
from test_preference_pairs import write_pairs
from toys import BASE

from experiments import ppo, pretrain, r1_zero, reward_model
from minir1 import checkpoint

RL = RL | {"steps": 2, "eval_every": 1}
NAMES = ("pretrain", "lora", "ppo", "reward_model", "bfloat16")
WAYS = {"2 to 2": (2, 2), "2 to 1": (2, 1), "2 to 3": (2, 3), "1 to 2": (1, 2)}  # ranks before, ranks after


def configs(folder, base) -> dict:
    """Name -> (module of the script, config) of each run."""
    on_pairs = TRAIN | {"checkpoint": base, "batch": 5, "eval_every": 1, "microbatch": 300} | write_pairs(folder)
    small = replace(BASE, steps=2, batch=256, microbatch=128, checkpoint_every=1)
    wanted = {
        "pretrain": (pretrain, small),
        "bfloat16": (r1_zero, r1_zero.Config(base, **RL, dtype="bfloat16")),
        "lora": (r1_zero, r1_zero.Config(base, **RL, lora_rank=4)),
        "ppo": (ppo, ppo.Config(base, **RL, critic="own", value_warmup=0)),
        "reward_model": (reward_model, reward_model.Config(**on_pairs | {"steps": 2})),
    }
    return {name: (script.__name__, config) for name, (script, config) in wanted.items()}


def start(ranks: int, function, runs: dict, out) -> None:
    """function(runs, out) on so many ranks."""
    function(runs, out) if ranks == 1 else on_ranks(ranks, function, runs, out, timeout=300)


def test_resumed_on_another_number_of_ranks(tmp_path_factory, toy_base):
    """One test, so that the runs are made once; those that never stop, on two ranks, are in `whole`."""
    folder = tmp_path_factory.mktemp("resume")
    runs = configs(folder, toy_base("moe"))
    start(2, run_all, runs, folder / "whole")
    for ranks in (1, 2):
        start(ranks, stop_all, runs, folder / f"stopped {ranks}")
    resumed = {name: (script, replace(config, resume=True)) for name, (script, config) in runs.items()}
    for way, (before, after) in WAYS.items():
        if way != "2 to 2":  # in 16 bits another number of ranks rounds otherwise
            resumed.pop("bfloat16", None)
        shutil.copytree(folder / f"stopped {before}", folder / way)
        start(after, run_all, resumed, folder / way)
    for way in WAYS:
        for name in NAMES if way == "2 to 2" else NAMES[:-1]:  # without bfloat16
            same(folder, name, way)


def same(folder, name: str, way: str) -> None:
    """Metrics and weights are those of the run that never stopped: to the bit on as many ranks, else within 1e-6."""
    whole, resumed = folder / "whole" / name, folder / way / name
    assert len(plain_metrics(folder / "stopped 2" / name)) == len(plain_metrics(whole)) - 1
    rows = plain_metrics(whole), plain_metrics(resumed)
    paths = [checkpoint.latest(out / "checkpoint") for out in (whole, resumed)]
    weights = [load_file(next(path.glob("*model.safetensors"))) for path in paths]
    if way == "2 to 2":
        assert rows[0] == rows[1]
        assert_equal_bits(*map(checkpoint.load_state, paths))
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for row, other in zip(*rows):
        for key, value in row.items():
            assert other[key] == pytest.approx(value, rel=2e-6, abs=1e-6), (row["step"], key)
    for tensor in weights[0]:
        torch.testing.assert_close(weights[1][tensor], weights[0][tensor], rtol=0, atol=0 if way == "2 to 2" else 1e-6)

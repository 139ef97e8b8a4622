"""The scripts on two ranks (gloo, CPU) against one process: the same samples, losses, gradients and weights."""

import sys, time, tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_runs import run_all
from ranks import on_ranks
from runs import plain_metrics, result_of
from safetensors.torch import load_file
from test_preference_pairs import save_base, write_pairs
from test_sft import write_dialogues
from toys import BASE, MOE

from experiments import distill, distill_on_policy, dpo, evaluate, ppo, pretrain, r1_zero, reinforce, reward_model, sft
from minir1 import checkpoint

RL = {"prompts": 3, "num_generations": 2, "max_completion_length": 12, "min_mixed": 0.0, "eval_answers": 1}
RL |= {"steps": 3, "eval_every": 2, "eval_problems": 3, "microbatch": 120, "warmup": 1, "device": "cpu"}
TRAIN = {"steps": 3, "warmup": 1, "device": "cpu"}


def configs(folder: Path) -> dict:
    """Name -> (script, config) of each run, in an order in which later ones may read what earlier ones wrote."""
    base, pairs = folder / "base", write_pairs(folder)
    save_base(base)
    data = (write_dialogues(folder / "dialogues.jsonl", 12),)
    fitted = TRAIN | {"checkpoint": base, "data": data, "batch": 6, "eval_every": 2, "microbatch": 200}
    on_pairs = TRAIN | {"checkpoint": base, "batch": 5, "eval_every": 2, "microbatch": 300} | pairs
    mtp = replace(MOE, mtp_depth=1)
    return {
        "pretrain": (pretrain, replace(BASE, steps=3, batch=256, microbatch=128, checkpoint_every=2)),
        "pretrain-mtp": (pretrain, replace(BASE, model=mtp, steps=3, batch=256, microbatch=128, checkpoint_every=3)),
        "pretrain-dense": (pretrain, replace(BASE, model=pretrain.ModelConfig(), dense=True, steps=2, batch=256)),
        "sft": (sft, sft.Config(**fitted, balance_speed=0.01)),
        "r1_zero": (r1_zero, r1_zero.Config(base, **RL)),
        "r1_zero-lora": (r1_zero, r1_zero.Config(base, **RL, lora_rank=4)),
        "r1_zero-reset": (r1_zero, r1_zero.Config(base, **RL, reference_reset=1, recompute=True)),
        "reinforce": (reinforce, reinforce.Config(base, **RL)),
        "ppo": (ppo, ppo.Config(base, **RL, beta=0.01)),
        "ppo-own": (ppo, ppo.Config(base, **RL, critic="own", value_warmup=1)),
        "reward_model": (reward_model, reward_model.Config(**on_pairs)),
        "dpo": (dpo, dpo.Config(**on_pairs, task=None)),
        "distill": (distill, distill.Config(student=base, teacher=base, ce_weight=0.5, **on(fitted))),
        "distill-top": (distill, distill.Config(student=base, teacher=base, top_k=3, **on(fitted))),
    }


def on(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != "checkpoint"}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder with the runs of one process, in `one`, and of two ranks, in `two`."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = {name: (script.__name__, config) for name, (script, config) in configs(folder).items()}
    run_all(runs, folder / "one")
    on_ranks(2, run_all, runs, folder / "two", timeout=550)
    return folder


NAMES = list(configs.__annotations__) and ["pretrain", "pretrain-mtp", "pretrain-dense", "sft", "r1_zero", "r1_zero-lora",
"r1_zero-reset","reinforce","ppo","ppo-own","reward_model","dpo","distill","distill-top"]
@pytest.mark.parametrize("name", NAMES)
def test_it(both, name):
    folder = both
    a, b = (plain_metrics(folder / k / name) for k in ("one", "two"))
    worst = max((abs(x[k] - y[k]) / max(1, abs(x[k])), k, x["step"]) for x, y in zip(a, b) for k in x if x[k] is not None and "memory" not in k)
    print(name, len(a), len(b), worst)
    one, two = (load_file(next(checkpoint.latest(folder / k / name / "checkpoint").glob("*model.safetensors"))) for k in ("one", "two"))
    print("    weights", max(((one[n] - two[n]).abs().max().item(), n) for n in one))

"""The scripts on two ranks (gloo, CPU) against one process: the same samples, losses, gradients and weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_runs import run_all
from ranks import on_ranks
from runs import plain_metrics
from safetensors.torch import load_file
from test_preference_pairs import save_base, write_pairs
from test_sft import write_dialogues
from toys import BASE, MOE

from experiments import distill, distill_on_policy, dpo, evaluate, ppo, pretrain, r1_zero, reinforce, reward_model, sft
from experiments.variants import ema_reference, replayed_routes, self_check
from minir1 import checkpoint

RL = {"prompts": 4, "num_generations": 4, "max_completion_length": 24, "min_mixed": 0.0, "eval_answers": 1}
RL |= {"steps": 3, "eval_every": 2, "eval_problems": 3, "microbatch": 200, "warmup": 1, "device": "cpu"}
RL |= {"task": str(Path(__file__).parent / "rank_task.py")}
TRAIN = {"steps": 3, "warmup": 1, "device": "cpu"}
SAMPLED = ("r1_zero", "r1_zero-lora", "r1_zero-dense", "reinforce", "ppo", "ppo-own", "on_policy")
SAMPLED += ("ema_reference", "replayed_routes", "self_check")


def configs(folder: Path, base: Path, dense: Path) -> dict:
    """Name -> (script, config) of each run."""
    other, pairs = save_base(folder / "other"), write_pairs(folder)
    data = (write_dialogues(folder / "dialogues.jsonl", 12),)
    fitted = TRAIN | {"data": data, "batch": 6, "eval_every": 2, "microbatch": 200}
    on_pairs = TRAIN | {"checkpoint": base, "batch": 5, "eval_every": 2, "microbatch": 300} | pairs
    taught = fitted | {"student": other, "teacher": base}
    on_policy = {name: value for name, value in RL.items() if name != "min_mixed"}
    small = replace(BASE, steps=3, batch=256, microbatch=128, checkpoint_every=2)
    return {
        "pretrain": (pretrain, small),
        "pretrain-mtp": (pretrain, replace(small, model=replace(MOE, mtp_depth=1))),
        "pretrain-3-experts": (pretrain, replace(small, model=replace(MOE, experts=3, tied=True))),
        "sft": (sft, sft.Config(checkpoint=base, **fitted, balance_speed=0.01)),
        "r1_zero": (r1_zero, r1_zero.Config(base, **RL, reference_reset=2, recompute=True)),
        "r1_zero-lora": (r1_zero, r1_zero.Config(base, **RL, lora_rank=4)),
        "r1_zero-dense": (r1_zero, r1_zero.Config(dense, **RL)),
        "reinforce": (reinforce, reinforce.Config(base, **RL)),
        "ppo": (ppo, ppo.Config(base, **RL, beta=0.01)),
        "ppo-own": (ppo, ppo.Config(base, **RL, critic="own", value_warmup=1)),
        "replayed_routes": (replayed_routes, replayed_routes.Config(base, **RL)),
        "self_check": (self_check, self_check.Config(base, **RL)),
        "ema_reference": (ema_reference, ema_reference.Config(base, **RL)),
        "reward_model": (reward_model, reward_model.Config(**on_pairs)),
        "dpo": (dpo, dpo.Config(**on_pairs, task=None)),
        "distill": (distill, distill.Config(**taught, ce_weight=0.5)),
        "distill-top": (distill, distill.Config(**taught, top_k=3)),
        "on_policy": (distill_on_policy, distill_on_policy.Config(student=other, teacher=base, **on_policy)),
        "evaluate": (evaluate, evaluate.Config(base, problems=5, num_generations=2, max_completion_length=24)),
    }


def test_two_ranks_are_one_process(tmp_path_factory, toy_base):
    """One test, so that the runs are made once, and the ranks started once."""
    folder = tmp_path_factory.mktemp("ranks")
    wanted = configs(folder, toy_base("moe"), toy_base("dense"))
    runs = {name: (script.__name__, config) for name, (script, config) in wanted.items()}
    run_all(runs, folder / "one")
    on_ranks(2, run_all, runs, folder / "two", timeout=550)
    for name, (script, _) in wanted.items():
        check = same_evaluation if script is evaluate else same_training
        check(folder / "one" / name, folder / "two" / name)


def same_training(one: Path, two: Path) -> None:
    """Metrics (losses, norms of gradients, rewards, lengths, validation), samples, and the last weights within 1e-6."""
    alone, together = plain_metrics(one), plain_metrics(two)
    assert len(alone) == len(together) and alone[-1]["step"] == 3
    for row, other in zip(alone, together):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert other[key] == pytest.approx(value, rel=2e-6, abs=1e-6), (one.name, row["step"], key)
    if one.name in SAMPLED:
        assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text(), one.name
    folders = (checkpoint.latest(path / "checkpoint") for path in (one, two))
    stored, other = (load_file(next(folder.glob("*model.safetensors"))) for folder in folders)
    assert stored.keys() == other.keys()
    for tensor in stored:
        torch.testing.assert_close(other[tensor], stored[tensor], rtol=0, atol=1e-6)


def same_evaluation(one: Path, two: Path) -> None:
    """Texts, verdicts and figures to the last digit; entropies but for the rounding of sums over other batches."""
    texts = ((path / "answers.jsonl").read_text().splitlines()[1:] for path in (one, two))
    for line, other in zip(*([json.loads(line) for line in text] for text in texts), strict=True):
        for answer in line["answers"]:
            answer["entropy"] = pytest.approx(answer["entropy"], abs=1e-5)
        assert line == other
    values, others = (json.loads((path / "result.json").read_text()) for path in (one, two))
    entropies = {key: pytest.approx(value, abs=1e-5) for key, value in values.items() if key.startswith("entropy")}
    assert len(entropies) > 1 and values | entropies | {"tokens_per_s": others["tokens_per_s"]} == others

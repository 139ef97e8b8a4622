"""The trainings that experiments/tools/kill_everywhere.py kills, at toy size.

A number made of the weights replaces the validation, so that best checkpoints change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments import (
    all_scenarios,
    distill,
    distill_on_policy,
    dpo,
    ppo,
    pretrain,
    pretrain_text,
    r1_zero,
    reinforce,
    reward_model,
    sft,
)  # fmt: skip
from experiments.variants import hybrid
from minir1 import checkpoint
from minir1.log import open_run
from minir1.model.config import ModelConfig
from minir1.tokenizer_training import PRESETS, train

SCRIPTS = (
    "bare", "pretrain", "pretrain_text", "r1_zero", "lora", "reinforce", "ppo", "hybrid", "all_scenarios", "dpo",
    "reward_model", "sft", "distill", "distill_on_policy",
)  # fmt: skip
BASE = pretrain.Config(
    model=ModelConfig(dim=16, layers=2, heads=2, kv_lora=8, nope=8, rope=8, v_dim=8, ffn=32, experts=4, expert_ffn=8),
    steps=7, batch=128, microbatch=128, warmup=2, checkpoint_every=2, device="cpu",
)  # fmt: skip
RL = {"steps": 7, "eval_every": 2, "prompts": 2, "num_generations": 2, "max_completion_length": 6, "min_mixed": 0.0}
RL |= {"eval_problems": 2, "eval_answers": 1, "warmup": 1, "beta": 0.01, "learning_rate": 1e-2, "device": "cpu"}
PAIRS = {"steps": 7, "batch": 4, "warmup": 2, "eval_every": 2, "device": "cpu"}


TALK = """
from minir1.tasks import Problem, Verdict
SPLITS = ("train", "validation")
def problems(split, data):
    return [Problem(f"make {n} from {n},1,1", "", language="en") for n in range(3, 9)]
def verify(problem, text):
    return Verdict("right" if len(text) % 2 else "wrong", {"preference": len(text) % 5 / 4})
"""  # a task of general prompts


@dataclass(frozen=True)
class Bare:
    """The configuration of a training without a model."""

    out: Path = Path("runs/bare")
    resume: bool = False
    wandb: str = "off"


def bare(config: Bare) -> None:
    """What the trainings do to the file system, and nothing else."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    folder = config.out / "checkpoint"
    resumed = checkpoint.resume(folder) if config.resume else None
    state = checkpoint.load_state(resumed) if resumed else {"step": 0, "best": -1.0}
    run.start(state["step"] if resumed else -1)
    for step in range(state["step"] + 1, 9):
        score = step * 5 % 8
        run.log(step, {"train/score": score})
        if step % 2 == 0:
            run.samples(step, [{"text": f"é {step}"}] * 2)
            best = score > state["best"]
            state |= {"step": step, "best": max(state["best"], score)}

            def write(path: Path) -> None:
                (path / "model.safetensors").write_bytes(bytes([step]) * 99)
                (path / "nested").mkdir()
                (path / "nested" / "tokenizer.json").write_text("{}")

            checkpoint.save(folder, step, write, state | {"moments": torch.full((9,), float(step))}, best=best)
    run.result({"after": state["best"]})
    run.close()


def score(model, *_) -> dict[str, float]:
    """A number made of the weights, in place of a validation."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"eval/pass@1": (1000 * weights.double().sum().item()) % 1.0}


def lines(path: Path, rows: list[dict]) -> Path:
    """The path of a new file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dialogues(folder: Path) -> tuple[Path, ...]:
    """A file of dialogues."""
    rows = [{"prompt": f"make {n} from 3,4,{n}", "completion": "<answer>3+4</answer>"} for n in "1234"]
    return (lines(folder / "dialogues.jsonl", rows),)


def pairs(folder: Path) -> dict:
    """Two files of pairs, and the settings of what learns from them."""
    answers = {"chosen": "<think> 3+4=7 </think> <answer>3+4</answer>", "rejected": "<answer>3</answer>"}
    rows = [{"prompt": f"make {n} from 3,4,{n}", **answers} for n in range(2, 8)]
    files = {"pairs": lines(folder / "train.jsonl", rows), "held_out": lines(folder / "held_out.jsonl", rows)}
    return files | PAIRS


def own_text(folder: Path, child: Callable) -> pretrain_text.Config:
    """Pre-training on some lines of code, with a tokenizer of them, whose training has threads."""
    texts = [f"def add_{n}(x):\n    return x + {n}\n" for n in range(20)]
    (folder / "tokenizer").mkdir()
    recipe = replace(PRESETS["code"], size=300)
    child(lambda: train(texts, recipe).save(folder / "tokenizer"), folder / "tokenizer.txt")
    short = {"steps": 7, "batch": 128, "microbatch": 128, "window": 32, "warmup": 2, "eval_every": 2}
    short |= {"held_out": 0.3, "sample_tokens": 4, "device": "cpu", "model": BASE.model}
    data = (lines(folder / "texts.jsonl", [{"text": text} for text in texts]),)
    return pretrain_text.Config(data, tokenizer=folder / "tokenizer", **short)


def training(script: str, folder: Path, child: Callable[[Callable[[], None], Path], int]) -> tuple[Callable, object]:
    """The `main` of a script and its configuration; what they need is put into `folder`, by child processes.

    child(work, log): does some work in a process of its own, which prints to a file.
    """
    if script == "bare":
        return bare, Bare()
    if script == "pretrain":
        return pretrain.main, BASE
    if script == "pretrain_text":
        return pretrain_text.main, own_text(folder, child)
    child(lambda: pretrain.main(replace(BASE, out=folder / "base")), folder / "base.txt")
    base = folder / "base" / "checkpoint"
    start = {"checkpoint": base}
    for module in (r1_zero, reinforce, ppo, hybrid, all_scenarios, distill_on_policy):
        module.evaluate = score
    if script in ("r1_zero", "lora"):
        return r1_zero.main, r1_zero.Config(**start, **RL, lora_rank=2 * (script == "lora"))
    if script in ("reinforce", "ppo"):
        module = {"reinforce": reinforce, "ppo": ppo}[script]
        return module.main, module.Config(**start, **RL)
    if script == "hybrid":
        return hybrid.main, hybrid.Config(**start, **RL, sft_data=dialogues(folder)[0], sft_batch=2)
    if script == "all_scenarios":
        (folder / "talk.py").write_text(TALK)
        learned = reward_model.Config(**start, **pairs(folder), out=folder / "reward")
        child(lambda: reward_model.main(learned), folder / "reward.txt")
        general = {"general_task": str(folder / "talk.py"), "reward_model": folder / "reward" / "checkpoint"}
        return all_scenarios.main, all_scenarios.Config(**start, **RL, **general, preference_steps=3, general_prompts=1)
    if script == "distill_on_policy":
        own = {key: value for key, value in RL.items() if key not in ("min_mixed", "beta")}
        return distill_on_policy.main, distill_on_policy.Config(base, base, reward_weight=1.0, **own)
    short = {"steps": 7, "batch": 4, "warmup": 2, "eval_every": 2, "held_out": 0.2, "device": "cpu"}
    if script == "sft":
        return sft.main, sft.Config(**start, data=dialogues(folder), **short)
    if script == "distill":
        return distill.main, distill.Config(base, base, data=dialogues(folder), ce_weight=0.5, **short)
    if script == "dpo":
        return dpo.main, dpo.Config(**start, **pairs(folder), task=None)
    return reward_model.main, reward_model.Config(**start, **pairs(folder))

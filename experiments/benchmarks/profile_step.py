"""Time of one reinforcement-learning step by part and by operator, and tokens per second.

    python -m experiments.benchmarks.profile_step
    python -m experiments.benchmarks.profile_step --dense --out docs/results/profile_dense.json

The weights are untrained, so that every answer uses its whole token budget: 512 rows of 72 tokens. The update is that
of r1_zero.py in one mini-batch, with the forward pass of the reference; the pre-training step is that of pretrain.py.
Medians of several repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import profile

from experiments import pretrain, r1_zero
from experiments.benchmarks.bench_timing import timed
from minir1 import cli
from minir1.device import pick, pick_dtype, synchronize
from minir1.files import write_json
from minir1.log import table
from minir1.model.config import ModelConfig, dense
from minir1.model.transformer import Transformer
from minir1.optim import adamw, muon, split_parameters
from minir1.policy import frozen_copy, reference_logprobs
from minir1.rollout import Rollout, collect
from minir1.settings import at_least, new_file


@dataclass(frozen=True)
class Config:
    """Profile of one step."""

    dense: bool = False  # instead of MLA + MoE
    prompts: int = 32  # P
    num_generations: int = 16  # G
    prompt_tokens: int = 11
    max_completion_length: int = 72
    pretrain_tokens: int = 2080  # of a pre-training step, in rows of 80
    microbatch: int = 8192
    repeats: int = 5
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    out: Path | None = None  # a JSON file for the figures

    def __post_init__(self):
        at_least(self, 1, "prompts", "num_generations", "prompt_tokens", "max_completion_length", "repeats")
        at_least(self, 1, "microbatch")
        at_least(self, 80, "pretrain_tokens")  # a row
        new_file(self, "out")


def rollout(model: Transformer, config: Config) -> Rollout:
    """P·G rows, each of the full length."""
    prompts = [[1 + i % 40] * config.prompt_tokens for i in range(config.prompts)]
    tokens = config.max_completion_length
    return collect(model, prompts, answers=config.num_generations, max_tokens=tokens, stop=[], seed=0)


def update(model: Transformer, config: Config, sampled: Rollout) -> Callable[[], object]:
    """A call that makes one optimizer step of R1-Zero on all rows, forward pass of the reference included."""
    reference, optimizer = frozen_copy(model), adamw(model.parameters(), 1e-5)
    step = r1_zero.Config(num_minibatches=1, microbatch=config.microbatch)
    advantage = torch.ones(len(sampled.length), device=model.device)

    def call():
        ref_logp = reference_logprobs(reference, sampled, config.microbatch)
        return r1_zero.learn(model, optimizer, sampled, advantage, ref_logp, step, 1)

    return call


def pretraining(model: Transformer, config: Config) -> Callable[[], object]:
    """A call that makes one step of Muon and AdamW on full rows."""
    matrices, rest = split_parameters(model)
    optimizers = muon(matrices, 1e-5), adamw(rest, 1e-5)
    rows = torch.randint(0, 128, (config.pretrain_tokens // 80, 80)).tolist()

    def call():
        pretrain.loss_backward(model, rows, pretrain.Config(microbatch=config.microbatch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return call


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median duration after one warm-up."""
    work()
    return statistics.median(timed(work, device)[1] for _ in range(repeats))


def operators(work: Callable[[], object], device: torch.device, most: int = 12) -> list[tuple[str, float]]:
    """(operator, share of the time on the device) of one call, the most expensive first."""
    with profile() as trace:
        work()
        synchronize(device)
    clock = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    spent = sorted(((e.key, getattr(e, clock)) for e in trace.key_averages()), key=lambda item: -item[1])
    total = sum(time for _, time in spent)
    return [(name, time / total) for name, time in spent[:most]]


def main(config: Config) -> dict[str, float]:
    """Measure, print, and write the figures."""
    torch.manual_seed(0)
    device = pick(config.device)
    shape = dense(vocab=128) if config.dense else ModelConfig(vocab=128)
    model = Transformer(shape).to(device, pick_dtype(config.dtype, device))
    sampled = rollout(model, config)
    tokens = int(sampled.mask.sum())
    work = {"rollout": (lambda: rollout(model, config), tokens), "update": (update(model, config, sampled), tokens)}
    work["pretrain"] = pretraining(model, config), config.pretrain_tokens // 80 * 80
    result, rows = {}, []
    for name, (call, tokens) in work.items():
        took = seconds(call, config.repeats, device)
        result |= {f"{name}/seconds": took, f"{name}/tok_s": tokens / took}
        rows.append([name, f"{took:.2f} s", f"{tokens / took:,.0f}"])
    kind, count = "dense GQA" if config.dense else "MLA + MoE", config.prompts * config.num_generations
    table(f"{kind}, {count} rows, {torch.get_num_threads()} threads", ["", "median", "tokens/s"], rows)
    for name in ("rollout", "update"):
        shares = operators(work[name][0], device)
        result |= {f"{name}/{op}": share for op, share in shares}
        table(f"time of the {name} by operator", ["operator", "share"], [[op, f"{share:.1%}"] for op, share in shares])
    if config.out:
        write_json(config.out, result)
    return result


if __name__ == "__main__":
    cli.run(main, Config)

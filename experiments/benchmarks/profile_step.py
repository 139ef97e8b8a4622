"""Time of one reinforcement-learning step by part and by operator, against the time of its matrix products alone.

    python -m experiments.benchmarks.profile_step
    python -m experiments.benchmarks.profile_step --dense --out docs/results/profile_dense.json

The weights are untrained, so that every answer uses its whole token budget: 512 rows of 72 tokens. The update is that
of r1_zero.py in one mini-batch, with the forward pass of the reference, which is also measured by itself; the
pre-training step is that of pretrain.py; a decode step is `hidden` and `logits` of one token after about 40 in the
cache. The floor of each part is that of floor.py, measured in the same run. Medians of several repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile

from experiments import pretrain, r1_zero
from experiments.benchmarks import floor
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

LENGTH = 40  # tokens in the cache of a decode step


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
    decode_rows: tuple[int, ...] = (1, 16, 64, 256, 512)
    decode_steps: int = 21
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    out: Path | None = None  # a JSON file for the figures

    def __post_init__(self):
        at_least(self, 1, "prompts", "num_generations", "prompt_tokens", "max_completion_length", "repeats")
        at_least(self, 1, "microbatch", "decode_rows", "decode_steps")
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


def decoding(model: Transformer, rows: int, length: int, steps: int) -> Callable[[], object]:
    """A call, possible `steps` times and once to warm up, that decodes one token in each row. In the median over the
    calls there are `length` tokens in the cache, or steps // 2 + 1 if that is more. They are zeros."""
    begin = max(1, length - steps // 2)
    cache, matrix = model.cache(rows, begin + steps + 1), model.head_matrix()
    cache.advance(begin, begin)
    tokens = torch.randint(model.config.vocab, (rows, 1), device=model.device)
    return torch.no_grad()(lambda: model.logits(model.hidden(tokens, cache=cache)[:, 0], matrix))


def floors(model: Transformer, config: Config) -> dict[str, float]:
    """part -> its floor in seconds. The rollout decodes at its mean length; micro-batches are full ones."""
    P, B, answer = config.prompts, config.prompts * config.num_generations, config.max_completion_length
    T = config.prompt_tokens + answer
    mean = config.prompt_tokens + answer // 2
    prompts = floor.seconds(floor.forward(model, P, config.prompt_tokens, P), model)
    at_once = max(1, min(B, config.microbatch // T))
    scoring = floor.forward(model, at_once, T, at_once * answer)
    reference = B / at_once * floor.seconds(scoring, model)
    gradients = B / at_once * floor.seconds(floor.backward(scoring), model)
    lines = config.pretrain_tokens // 80
    corpus = floor.forward(model, lines, 80, 79 * lines)
    training = corpus + floor.backward(corpus) + floor.newton_schulz(model)
    return {
        "rollout": prompts + (answer - 1) * floor.decode_step(model, B, mean),
        "reference": reference,
        "update": 2 * reference + gradients,
        "pretrain": floor.seconds(training, model),
    } | {f"decode {rows}": floor.decode_step(model, rows, LENGTH) for rows in config.decode_rows}


def seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median duration after one warm-up."""
    work()
    return statistics.median(timed(work, device)[1] for _ in range(repeats))


def operators(work: Callable[[], object], device: torch.device, most: int = 12) -> list[tuple[str, float]]:
    """(operator, share of the time on the device) of one call, the most expensive first."""
    gpu = [] if device.type == "cpu" else [ProfilerActivity.CUDA]
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as trace:
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
    reference = frozen_copy(model)
    work = {
        "rollout": (lambda: rollout(model, config), tokens),
        "reference": (lambda: reference_logprobs(reference, sampled, config.microbatch), tokens),
        "update": (update(model, config, sampled), tokens),
        "pretrain": (pretraining(model, config), config.pretrain_tokens // 80 * 80),
    }
    result, rows, least = {}, [], floors(model, config)
    taken = {name: seconds(call, config.repeats, device) for name, (call, _) in work.items()}
    for count in config.decode_rows:
        call = decoding(model, count, LENGTH, config.decode_steps)
        taken[f"decode {count}"] = seconds(call, config.decode_steps, device)
    for name, took in taken.items():
        per_second = (work[name][1] if name in work else int(name.split()[1])) / took
        result |= {f"{name}/seconds": took, f"{name}/tok_s": per_second, f"{name}/floor": least[name]}
        ratio = f"{took / least[name]:.1f}"
        rows.append([name, f"{1000 * took:,.1f}", f"{per_second:,.0f}", f"{1000 * least[name]:,.1f}", ratio])
    kind, count = "dense GQA" if config.dense else "MLA + MoE", config.prompts * config.num_generations
    columns = ["", "median, ms", "tokens/s", "floor, ms", "times the floor"]
    table(f"{kind}, {count} rows, {torch.get_num_threads()} threads", columns, rows)
    for name in ("rollout", "update"):
        shares = operators(work[name][0], device)
        result |= {f"{name}/{op}": share for op, share in shares}
        table(f"time of the {name} by operator", ["operator", "share"], [[op, f"{share:.1%}"] for op, share in shares])
    if config.out:
        write_json(config.out, result)
    return result


if __name__ == "__main__":
    cli.run(main, Config)

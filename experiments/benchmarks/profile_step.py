"""Where does a step of reinforcement learning spend its time, and how many tokens a second is that?

    python -m experiments.benchmarks.profile_step
    python -m experiments.benchmarks.profile_step --dense --out docs/results/profile_dense.json

Untrained weights, so answers run to the budget: 512 rows of 72 tokens. The update has the forward pass of the
reference in it. With --compare, transformers generates the same number of tokens with the same weights in the same run.
Medians of several repeats.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from minir1.data import by_tokens
from minir1.files import replace_text
from minir1.log import table
from minir1.losses import clipped_surrogate, kl_k3, nll
from minir1.model import hf
from minir1.model.config import ModelConfig, dense
from minir1.model.transformer import Transformer
from minir1.optim import Muon, split_parameters
from minir1.rollout import Rollout, collect
from minir1.tokenizer import word_level


@dataclass(frozen=True)
class Config:
    """Profile of one step."""

    dense: bool = False  # instead of MLA + MoE
    prompts: int = 32  # P
    answers: int = 16  # G
    prompt_tokens: int = 11
    max_tokens: int = 72
    microbatch: int = 8192
    repeats: int = 5
    compare: bool = False  # with transformers.generate
    out: Path | None = None  # a JSON file for the figures


def rollout(model: Transformer, config: Config) -> Rollout:
    """P·G rows, each to the budget."""
    prompts = [[1 + i % 40] * config.prompt_tokens for i in range(config.prompts)]
    return collect(model, prompts, answers=config.answers, max_tokens=config.max_tokens, stop=[], seed=0)


def update(model: Transformer, reference: Transformer, optimizer, sampled: Rollout, config: Config) -> None:
    """One optimizer step of the clipped surrogate with KL on all rows."""
    for rows in by_tokens(sampled.length.tolist(), config.microbatch):
        part = sampled.select(torch.tensor(rows))
        logp = model.logprob(part.tokens, lengths=part.length, mask=part.mask)
        with torch.no_grad():
            ref_logp = reference.logprob(part.tokens, lengths=part.length, mask=part.mask)
        loss = clipped_surrogate(logp, part.logp, torch.ones_like(logp)) + 0.001 * kl_k3(logp, ref_logp)
        (loss * part.mask).mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def pretrain_step(model: Transformer, optimizers, tokens: torch.Tensor) -> None:
    """One step of Muon and AdamW on full rows [B, T]."""
    nll(model.logprob(tokens)).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def transformers_generate(model: Transformer, config: Config):
    """The same weights in transformers, as a call that samples as many tokens of as many rows."""
    from transformers import AutoModelForCausalLM  # of the extra [test]

    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, word_level((), 100), folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = torch.ones(config.prompts * config.answers, config.prompt_tokens, dtype=torch.int64)
    length = {"min_new_tokens": config.max_tokens, "max_new_tokens": config.max_tokens}
    sampling = {"do_sample": True, "top_k": 0, "pad_token_id": 0, **length}
    return lambda: theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **sampling)


def seconds(work, repeats: int) -> float:
    """The median duration after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def operators(work, most: int = 12) -> list[tuple[str, float]]:
    """(operator, share of the time) of one call, the dearest first."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        work()
    spent = sorted(((e.key, e.self_cpu_time_total) for e in trace.key_averages()), key=lambda item: -item[1])
    return [(name, used / sum(used for _, used in spent)) for name, used in spent[:most]]


def main(config: Config) -> dict[str, float]:
    """Measure, print, and write the figures."""
    torch.manual_seed(0)
    shape = dense(vocab=128) if config.dense else ModelConfig(vocab=128)
    model, reference = Transformer(shape), Transformer(shape).requires_grad_(False)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    sampled = rollout(model, config)
    matrices, rest = split_parameters(model)
    both = (Muon(matrices, lr=1e-5), torch.optim.AdamW(rest, lr=1e-5, fused=True))
    batch = torch.randint(0, 128, (26, 80))  # about the 2,048 tokens of pretrain.py
    work = {
        "rollout": (lambda: rollout(model, config), int(sampled.mask.sum())),
        "update": (lambda: update(model, reference, adam, sampled, config), int(sampled.mask.sum())),
        "pretrain": (lambda: pretrain_step(model, both, batch), batch.numel()),
    }
    if config.compare:
        work["transformers.generate"] = (transformers_generate(model, config), int(sampled.mask.sum()))
    found = {}
    for name, (call, tokens) in work.items():
        took = seconds(call, config.repeats)
        found |= {f"{name}/seconds": took, f"{name}/tok_s": tokens / took}
    rows = [[name, f"{found[f'{name}/seconds']:.2f} s", f"{found[f'{name}/tok_s']:,.0f}"] for name in work]
    kind = "dense GQA" if config.dense else "MLA + MoE"
    table(
        f"{kind}, {config.prompts * config.answers} rows, {torch.get_num_threads()} threads",
        ["", "median", "tokens/s"],
        rows,
    )
    for name in ("rollout", "update"):
        shares = operators(work[name][0])
        found |= {f"{name}/{op}": share for op, share in shares}
        table(f"where the {name} goes", ["operator", "share"], [[op, f"{share:.1%}"] for op, share in shares])
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(config.out, json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))

"""Pre-train a tiny base on a task's synthetic corpus: next-token and, optionally, multi-token prediction.

    python -m experiments.pretrain --out runs/base
    python -m experiments.pretrain --out runs/base-dense --dense
    python -m experiments.pretrain --out runs/base-mtp --model.mtp-depth 1
    python -m experiments.pretrain --out runs/base-wide --task countdown:wide --mix patient 0.3

Muon updates the matrices, AdamW the rest; after every step each expert's selection bias moves against its load
(auxiliary-loss-free balancing, DeepSeek-V3, section 2.1.2), with V3's small sequence-wise balance loss. At the end the
task's probes measure the skills that reinforcement learning will build on. experiments/pretrain_text.py pre-trains on
a user's own text instead, with the same loss.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minir1 import checkpoint, cli, memory, policy, tasks
from minir1.data import batches, by_tokens, pad_rows
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.distributed import deal, load_target, sum_of_ranks
from minir1.log import open_run, progress_line, steps
from minir1.losses import nll
from minir1.model import hf
from minir1.model.config import ModelConfig, dense
from minir1.model.hf_config import to_hf_config
from minir1.model.moe import (
    MoE,
    Routing,
    balance_step,
    expert_load,
    idle_share,
    maximal_violation,
    sequence_balance_loss,
)
from minir1.model.shards import gathered, shard
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients, muon, split_parameters, warmup_stable_decay
from minir1.reduction import token_mean, weighted_sum
from minir1.seed import seed_everything
from minir1.settings import above, at_least, same_steps
from minir1.tokenizer import Tokenizer, word_level


@dataclass(frozen=True)
class Config:
    """Pre-training. The defaults are those of the ten-minute demonstration."""

    task: str = "countdown"  # one with a corpus of its own
    data: str | None = None  # the folder or file that the task reads
    mix: dict[str, float] = field(default_factory=dict)  # of the corpus, as the task's `documents` takes it
    dense: bool = False  # grouped-query attention and SwiGLU instead of MLA and experts
    model: ModelConfig = field(default_factory=ModelConfig)  # shape of the MLA + MoE model
    steps: int = 1800
    batch: int = 2048  # tokens per step
    muon_lr: float = 0.005  # matrices inside the blocks
    adam_lr: float = 0.01  # embedding, head, router, norms
    warmup: int = 60  # steps
    clip: float = 1.0  # largest norm of the gradient
    balance_speed: float = 0.003  # γ, step of the experts' selection bias
    balance_loss: float = 1e-4  # α, weight of the sequence-wise balance loss
    mtp_weight: float = 0.3  # λ, weight of multi-token prediction, with --model.mtp-depth above 0
    seed: int = 0
    out: Path = Path("runs/base")
    resume: bool = False
    microbatch: int = 2048  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    checkpoint_every: int = 600  # steps
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "steps", "batch", "microbatch", "checkpoint_every")
        at_least(self, 0, "muon_lr", "adam_lr", "warmup", "balance_speed", "balance_loss", "mtp_weight", "seed")
        above(self, 0, "clip")


def task_of(config: Config) -> tasks.Task:
    """The task. ValueError for one without a corpus of its own."""
    task = tasks.load(config.task, config.data)
    if task.documents is None or task.vocabulary is None:
        raise ValueError(f"task {config.task} has no corpus to pre-train on: countdown has one")
    return task


def check_shape(config: Config) -> None:
    """ValueError for a model that `hf.save` would refuse, and so the first checkpoint of a run."""
    shape = dense() if config.dense else config.model
    to_hf_config(shape)
    if shape.score == "softmax" and shape.moe_layers and config.balance_speed:
        raise ValueError(
            f"balance_speed = {config.balance_speed}: 0 with model.score = 'softmax', as no Hugging Face class with "
            "softmax scores has a selection bias"
        )


def build_model(config: Config, tokenizer: Tokenizer) -> Transformer:
    """The model of this run with the tokenizer's vocabulary, rounded up to a multiple of 16; fp32, on the CPU."""
    if config.dense and config.model != ModelConfig():
        raise ValueError("--model.* is the shape of the MLA + MoE model: it does not go with --dense")
    shape = dense() if config.dense else config.model
    return Transformer(replace(shape, vocab=-(-tokenizer.size // 16) * 16, eos=tokenizer.eos, pad=tokenizer.pad))


def check_vocabulary(config: Config, task: tasks.Task, tokenizer: Tokenizer) -> None:
    """ValueError if a part of the corpus, by its first documents, has no token: the model would read and write
    <|unk|> in its place."""
    for text in itertools.islice(task.documents(config.seed, **config.mix), 100):
        if parts := tokenizer.lacking(text):
            named = ", ".join(map(repr, parts[:5]))
            raise ValueError(f"task {config.task}: vocabulary() lacks {named} of the document {text[:80]!r}")


def token_batches(config: Config, task: tasks.Task, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """Batches of tokenised documents of the corpus, a function of the seed alone. ValueError for one without text."""
    texts = task.documents(config.seed, **config.mix)

    def documents() -> Iterator[list[int]]:
        while chunk := [text + tokenizer.eos_token for text in itertools.islice(texts, 512)]:
            for text, row in zip(chunk, tokenizer.encode_batch(chunk)):
                if len(row) < 2:  # the end token alone: nothing is predicted
                    raise ValueError(f"task {config.task}: documents() yields one without text, {text!r}")
                yield row

    return batches(documents(), config.batch, pool=16, rng=random.Random(f"batches {config.seed}"))


def loss_backward(model: Transformer, rows: list[list[int]], config: Config) -> tuple[float, float, list[Tensor]]:
    """Gradients of L_main + λ/D · Σ_k L_k, and the balance loss (V3, section 2.2, equations 24 and 25).

        L_k = -1/T · Σ_t log π_k(x_t), over tokens t > k      T: tokens that the model itself predicts, whatever k

    Returns L_main, Σ_k L_k / D (0 without modules for multi-token prediction) and the load of each MoE layer.
    """
    total, depth = sum(len(row) - 1 for row in rows), model.config.mtp_depth
    main_loss, mtp_loss, loads = 0.0, 0.0, []
    for part, share in deal(by_tokens([len(row) for row in rows], config.microbatch)):
        tokens, lengths = pad_rows([rows[i] for i in part], model.device)
        record: list[Routing] = []
        logp, *ahead = model.mtp_logprob(tokens, lengths=lengths, record=record)
        columns = torch.arange(tokens.shape[1], device=model.device)
        mask = (columns > 0) & (columns < lengths.unsqueeze(1))
        loss = weighted_sum(share * token_mean(mask, total), nll(logp))
        main_loss += loss.item()
        for k, logp_k in enumerate(ahead, start=1):
            loss_k = weighted_sum(share * token_mean(mask & (columns > k), total), nll(logp_k)) / depth
            mtp_loss += loss_k.item()
            loss = loss + config.mtp_weight * loss_k
        if config.balance_loss:
            loss = loss + config.balance_loss * share * balance(record, lengths, rows, depth)
        loss.backward()
        loads.append([share * expert_load(routing) for routing in record])
    loads = [sum_of_ranks(sum(layer)) for layer in zip(*loads)]
    return sum_of_ranks(main_loss), sum_of_ranks(mtp_loss), loads


def balance(record: list[Routing], lengths: Tensor, rows: list[list[int]], depth: int) -> Tensor | float:
    """The sequence-wise balance loss of a micro-batch, summed over MoE layers, as its share of the mean over all rows.

    record: one Routing per layer, those of the MTP modules last; module k works on k fewer tokens per row.
    """
    blocks = len(record) - depth
    penalty = 0.0
    for routing, k in zip(record, [0] * blocks + list(range(1, depth + 1))):
        used = (lengths - k).clamp(min=0)
        share = (used > 0).sum() / max(1, sum(len(row) > k for row in rows))
        penalty = penalty + share * sequence_balance_loss(routing, used)
    return penalty


@torch.no_grad()
def skills(model: Transformer, tokenizer: Tokenizer, probes: list[list[tuple[str, str]]]) -> dict[str, float]:
    """How often the most likely next token is the right one, by the label of the probed piece (see minir1/tasks)."""
    rows, asked = [], []  # asked: (label, row, position)
    for pieces in probes:
        rows.append([])
        for text, label in pieces:
            asked += [(label, len(rows) - 1, len(rows[-1]))] if label else []
            rows[-1] += tokenizer.encode(text)
    tokens, lengths = pad_rows(rows, model.device)
    labels, row, position = zip(*asked)
    row, position = torch.tensor(row, device=model.device), torch.tensor(position, device=model.device)
    with gathered(model):
        best = model.logits(model.hidden(tokens, lengths=lengths)[row, position - 1]).argmax(-1)
    hits = defaultdict(list)
    for label, hit in zip(labels, (best == tokens[row, position]).tolist()):
        hits[label].append(hit)
    return {f"skill/{label}": sum(hits[label]) / len(hits[label]) for label in hits}


def main(config: Config) -> dict[str, float]:
    """Train; save the base under out/checkpoint; return the skills."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    check_shape(config)
    seed_everything(config.seed)
    device = pick(config.device)
    folder = config.out / "checkpoint"
    resumed = checkpoint.resume(folder) if config.resume else None
    task = task_of(config)
    tokenizer = word_level(*task.vocabulary())
    check_vocabulary(config, task, tokenizer)
    dtype = pick_dtype(config.dtype, device)
    model = build_model(config, tokenizer).to(*load_target(device, dtype))
    model.recompute(config.recompute)
    shard(device, dtype, model)
    matrices, rest = split_parameters(model)
    parts = {"muon": muon(matrices, config.muon_lr), "adam": adamw(rest, config.adam_lr)}
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    corpus = token_batches(config, task, tokenizer)
    start, spent = 0, 0.0
    if resumed:
        state = policy.restore(resumed, model, parts)
        same_steps(config.steps, state["steps"])
        start, spent = state["step"], state["seconds"]
    run.start(start)

    corpus = corpus if start < config.steps else []  # a finished run must not read through it
    parameters = sum(p.numel() for p in model.parameters())
    print(f"pre-training {parameters / 1e6:.2f}M parameters for {config.steps} steps of {config.batch} tokens")
    memory.show(memory.step_memory(model, microbatch=config.microbatch, muon=True, recompute=config.recompute), device)
    began, trained = time.perf_counter() - spent, 0
    batches, step = itertools.islice(corpus, start, config.steps), start
    for step, rows in zip(steps(start, config.steps, "pre-training"), batches):
        factor = warmup_stable_decay(step - 1, config.steps, config.warmup)
        parts["muon"].param_groups[0]["lr"] = config.muon_lr * factor
        parts["adam"].param_groups[0]["lr"] = config.adam_lr * factor
        loss, mtp_loss, loads = loss_backward(model, rows, config)
        norm = clip_gradients(model, config.clip, step)
        for optimizer in parts.values():
            optimizer.step()
        model.zero_grad(set_to_none=True)
        for layer, load in zip(layers, loads):
            balance_step(layer.bias, load, config.balance_speed)

        trained += sum(len(row) for row in rows)
        speed = trained / (time.perf_counter() - began - spent)
        metrics = {"train/loss": loss, "train/grad_norm": norm, "train/lr": config.muon_lr * factor}
        if model.mtp:
            metrics["train/mtp_loss"] = mtp_loss
        if loads:
            metrics["train/max_violation"] = max(maximal_violation(load) for load in loads)
            metrics["train/idle_experts"] = max(idle_share(load) for load in loads)
        run.log(step, metrics | {"perf/train_tok_s": speed})
        if step % 100 == 0 or step == config.steps:
            fields = [("loss", f"{loss:.3f}"), ("grad", f"{norm:.2f}"), ("tok/s", f"{speed:,.0f}")]
            progress_line(step, config.steps, fields)
        if step % config.checkpoint_every == 0 or step == config.steps:
            state = {"step": step, "steps": config.steps, "seconds": time.perf_counter() - began}
            state |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(folder, step, lambda path: hf.save(model, tokenizer, path), state)

    if step < config.steps:
        raise ValueError(f"task {config.task}: documents() ended after step {step}, before steps = {config.steps}")
    result = skills(model, tokenizer, task.probes()) if task.probes else {}
    seconds = time.perf_counter() - began
    print("  ".join(f"{name.removeprefix('skill/')} {value:.1%}" for name, value in result.items()))
    run.result(result | {"seconds/pretrain": seconds, "memory/peak_gib": peak_memory_gib(device)})
    run.close()
    return result


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)

"""Supervised fine-tuning: a policy learns to write the answers of given dialogues (DeepSeek-R1, section 2.3).

    python -m experiments.sft --checkpoint runs/base/checkpoint --data dialogues.jsonl --out runs/sft
    python -m experiments.sft --checkpoint Qwen2.5-0.5B --data chat.jsonl --lora-rank 16 --learning-rate 1e-4
    python -m experiments.sft --checkpoint Qwen2.5-32B-bnb-4bit --data chat.jsonl --lora-rank 16 --packed

    L(θ) = -1/N Σ_t log π_θ(x_t | x_<t)        over the N answer tokens x_t of the dialogues in a batch

Only what the assistant says is trained, in every turn, and the token that ends the turn. --data takes files of any
layout that minir1/chat_data.py reads; the checkpoint's own chat template turns them into tokens. Dialogues are packed:
several in one forward pass, without padding, and none attends to another. The learning rate falls along a cosine to a
tenth. With experts, the selection bias moves once a step against the load of the batch, as in pre-training. Modules for
multi-token prediction stay as they are. With --packed the frozen weights under the adapters stay in 4 bits (QLoRA,
arXiv:2305.14314).

R1's cold start: 2 to 3 epochs, learning rate 5e-5 to 5e-6, batches of 128 (here --epochs 3 --learning-rate 5e-5 --batch
128). The default learning rate is twenty times as large: the model of the demonstration has two million parameters.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from experiments import sft_figure
from minir1 import chat_data, checkpoint, cli, memory, policy
from minir1.chat_data import Document, microbatches
from minir1.data import passes
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.distributed import sum_of_ranks
from minir1.log import open_run, progress_line, read_metrics, steps
from minir1.losses import nll
from minir1.model.moe import MoE, Routing, balance_step, expert_load, maximal_violation
from minir1.model.shards import gathered, shard
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients, warmup_cosine
from minir1.policy import load_policy
from minir1.reduction import token_mean, weighted_sum
from minir1.seed import seed_everything
from minir1.settings import above, at_least, fraction, same_steps
from minir1.templates import TEMPLATES


@dataclass(frozen=True)
class Config:
    """Supervised fine-tuning. The defaults suit the model of the ten-minute demonstration."""

    checkpoint: Path = Path("runs/base/checkpoint")  # where to start: a Hugging Face folder, or a folder of checkpoints
    data: tuple[Path, ...] = (Path("runs/cold-start/kept.jsonl"),)  # files of dialogues
    max_length: int = 1024  # tokens; longer documents are left out
    template: Literal[TEMPLATES] = "chat"  # of the dialogues
    epochs: int = 2  # passes over the documents
    steps: int | None = None  # optimizer steps; None: as many as the epochs need
    batch: int = 32  # documents per step
    learning_rate: float = 1e-3  # AdamW; rises over the warm-up, falls along a cosine to a tenth
    warmup: int = 10  # steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # largest norm of the gradient
    balance_speed: float | None = None  # γ, step of the experts' selection bias; None: 0.001 where it is saved, else 0
    lora_rank: int = 0  # r: train adapters only; 0: train all weights
    lora_alpha: float = 32.0  # α
    packed: bool = False  # with lora_rank: keep the weights of a checkpoint in bitsandbytes' 4 bits as they are (QLoRA)
    held_out: float = 0.05  # share of the prompts whose documents are not trained but measured; 0: none
    eval_every: int = 25  # steps
    seed: int = 0
    out: Path = Path("runs/sft")
    resume: bool = False
    microbatch: int = 8192  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "epochs", "steps", "batch", "eval_every", "max_length", "microbatch")
        at_least(self, 0, "learning_rate", "warmup", "weight_decay", "balance_speed", "lora_rank", "lora_alpha", "seed")
        above(self, 0, "grad_clip")
        fraction(self, "held_out")
        if not self.data:
            raise ValueError("data = (): at least one file")
        if self.packed and not self.lora_rank:
            raise ValueError("packed = True with lora_rank = 0: weights in 4 bits are not trained, adapters are")


def speed_of_balance(model: Transformer, config: Config) -> float:
    """γ. ValueError for a selection bias that would move and could not be saved."""
    saved = model.config.moe_layers and model.config.score == "sigmoid" and not config.lora_rank
    if config.balance_speed and not saved:
        raise ValueError(
            f"balance_speed = {config.balance_speed}: 0 for a model without a selection bias, and with lora_rank, as "
            "the files of adapters hold none"
        )
    return (0.001 if saved else 0.0) if config.balance_speed is None else config.balance_speed


def loss_backward(model: Transformer, documents: list[Document], microbatch: int) -> tuple[float, list[Tensor]]:
    """Adds the gradient of the loss on these documents; returns the loss, and the load of each MoE layer."""
    total, loss, loads = sum(sum(document.trained) for document in documents), 0.0, []
    for tokens, cu_seqlens, trained, share in microbatches(documents, microbatch, model.device):
        record: list[Routing] = []
        logp = model.logprob(tokens, cu_seqlens=cu_seqlens, mask=trained, record=record)
        part = weighted_sum(share * token_mean(trained, total), nll(logp))
        part.backward()
        loss += part.item()
        loads.append([share * expert_load(routing) for routing in record])
    return sum_of_ranks(loss), [sum_of_ranks(sum(layer)) for layer in zip(*loads)]


@torch.no_grad()
def measure(model: Transformer, documents: list[Document], microbatch: int) -> dict[str, float]:
    """The loss on held-out documents, over all of their answer tokens; nothing without documents."""
    total, loss = sum(sum(document.trained) for document in documents), 0.0
    with gathered(model):
        for tokens, cu_seqlens, trained, share in microbatches(documents, microbatch, model.device):
            logp = model.logprob(tokens, cu_seqlens=cu_seqlens, mask=trained)
            loss += weighted_sum(share * token_mean(trained, total), nll(logp)).item()
    return {"eval/loss": sum_of_ranks(loss)} if documents else {}


def main(config: Config) -> dict[str, float]:
    """Train; save the policy under out/checkpoint; return the held-out loss before and after."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    seed_everything(config.seed)
    device = pick(config.device)
    folder = config.out / "checkpoint"
    resumed = checkpoint.resume(folder) if config.resume else None
    opening = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha, "recompute": config.recompute}
    opening |= {"packed": config.packed}
    start = policy.origin(config.checkpoint, resumed)
    dtype = pick_dtype(config.dtype, device)
    model, tokenizer, source = load_policy(start, device, dtype, **opening)
    speed, layers = speed_of_balance(model, config), [module for module in model.modules() if isinstance(module, MoE)]
    documents = chat_data.load(config.data, tokenizer, config.max_length, config.template)
    train, held_out = chat_data.split(documents, config.held_out)
    end = config.steps or math.ceil(config.epochs * len(train) / config.batch)
    shard(device, dtype, model)
    optimizer = adamw(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    parts = {"optimizer": optimizer}
    most = max(config.microbatch, *(len(document.tokens) for document in train))
    memory.show(memory.step_memory(model, microbatch=most, recompute=config.recompute), device)

    state = policy.restore(resumed, model, parts) if resumed else {"step": 0, "steps": end, "seconds": 0.0, "tokens": 0}
    same_steps(end, state["steps"])
    run.start(state["step"] if resumed else -1)
    spent, tokens = state["seconds"], state["tokens"]
    began, earlier = time.perf_counter() - spent, tokens
    if not resumed:
        run.log(0, measure(model, held_out, config.microbatch))
    print(f"fine-tuning for {end:,} steps on {len(train):,} documents; {len(held_out):,} documents are held out")

    batches = itertools.islice(passes(len(train), config.batch, config.seed), state["step"], end)
    for step, batch in zip(steps(state["step"], end, config.out.name), batches):
        documents = [train[i] for i in batch]
        tokens += sum(len(document.tokens) for document in documents)
        factor = warmup_cosine(step - 1, end, config.warmup)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        loss, loads = loss_backward(model, documents, config.microbatch)
        norm = clip_gradients(model, config.grad_clip, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer, load in zip(layers, loads):
            balance_step(layer.bias, load, speed)

        metrics = {"train/loss": loss, "train/lr": config.learning_rate * factor, "train/grad_norm": norm}
        if loads:
            metrics["train/max_violation"] = max(map(maximal_violation, loads))
        metrics["perf/train_tok_s"] = (tokens - earlier) / (time.perf_counter() - began - spent)
        due = step % config.eval_every == 0 or step == end
        if due:
            metrics |= measure(model, held_out, config.microbatch)
            names = [name for name in ("train/loss", "eval/loss") if name in metrics]
            progress_line(step, end, [(name, f"{metrics[name]:.3f}") for name in names])
        run.log(step, metrics)
        if due:
            state = {"step": step, "steps": end, "seconds": time.perf_counter() - began, "tokens": tokens}
            state |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(folder, step, lambda path: policy.save(model, tokenizer, path, source), state)

    rows = read_metrics(config.out)
    sft_figure.draw_loss(rows, config.out / "figures" / "sft.png")
    result = {f"{when}/loss": row["eval/loss"] for when, row in (("before", rows[0]), ("after", rows[-1])) if held_out}
    counts = {"examples": len(train), "examples/held_out": len(held_out), "tokens": tokens}
    seconds = {"seconds/sft": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib(device)}
    run.result(result | counts | seconds)
    run.close()
    return result


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)

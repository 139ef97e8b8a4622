"""Distillation off policy: a student learns the texts of a teacher, or the teacher's whole distribution at each token.

    python -m experiments.distill --student runs/small/checkpoint --data runs/kept/kept.jsonl
    python -m experiments.distill --student runs/small/checkpoint --teacher runs/r1/rl-2/checkpoint --data kept.jsonl
    python -m experiments.distill --student Qwen2.5-0.5B --teacher Qwen2.5-7B --data a.jsonl --top-k 64 --lora-rank 16

    L(θ) = λ·CE + (1-λ)·τ²·D_β(T, S)        averaged over the answer tokens of a batch
    D_0  = KL(T‖S),  D_1 = KL(S‖T),  else D_β = β KL(T‖M) + (1-β) KL(S‖M),  M = β T + (1-β) S

λ is --ce-weight, τ --temperature of both distributions, β --beta. The first command is sequence-level distillation as
in DeepSeek-R1 (arXiv:2501.12948, section 2.4): fine-tuning on texts that reject_sample.py kept, without the teacher; it
is the only way for a teacher with another tokenizer. The second adds the teacher's distributions (Hinton et al.,
arXiv:1503.02531; D_β: arXiv:2306.13649). --data are files of dialogues of any layout (minir1/chat_data.py). On the
student's own texts: distill_on_policy.py.

--top-k: the teacher runs once, before training, or not at all if --stored names the file of an earlier run on the same
texts. Its k likeliest tokens at each position are stored, and all others count as one more token, so that D is a lower
bound of the whole one. Without it, the teacher runs beside the student. Neither's logits of all tokens are ever in
memory.

Otherwise as sft.py: packed dialogues, a cosine to a tenth, a held-out part. R1's learning rates are 1e-4 (1.5B) to 2e-5
(70B), with batches of 64.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments import sft_figure
from experiments.sft import speed_of_balance
from minir1 import chat_data, checkpoint, cli, memory, policy
from minir1.chat_data import Document, laid_out
from minir1.data import packed, passes
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.distill import mixed
from minir1.distributed import deal, exchanged, my_share, on_first, sum_of_ranks
from minir1.log import open_run, progress, progress_line, read_metrics, steps
from minir1.losses import nll
from minir1.model.divergence import divergence, log_probs, top_divergence, top_log_probs
from minir1.model.moe import MoE, Routing, balance_step, expert_load
from minir1.model.shards import gathered, shard
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients, warmup_cosine
from minir1.policy import load_policy, load_teacher
from minir1.seed import seed_everything
from minir1.settings import above, at_least, fraction, new_file, same_steps
from minir1.templates import TEMPLATES

STORED = "teacher_top_k.safetensors"


@dataclass(frozen=True)
class Config:
    """Distillation. The defaults suit models of a million parameters."""

    student: Path = Path("runs/small/checkpoint")  # where to start: a Hugging Face folder, or a folder of checkpoints
    teacher: Path | None = None  # likewise; None: the texts alone are learned
    data: tuple[Path, ...] = (Path("runs/rejection/kept.jsonl"),)  # files of dialogues
    max_length: int = 1024  # tokens; longer documents are left out
    template: Literal[TEMPLATES] = "chat"  # of the dialogues
    beta: float = 0.0  # β, of the divergence: 0 KL(T‖S), 1 KL(S‖T), between them generalised Jensen-Shannon
    temperature: float = 1.0  # τ, of both distributions
    ce_weight: float | None = None  # λ, of the cross-entropy, below 1 with a teacher; None: 0, or 1 without one
    top_k: int | None = None  # k, stored log-probs of the teacher per token; None: it runs beside the student
    stored: Path | None = None  # their file, made if it is not there; None: teacher_top_k.safetensors in --out
    epochs: int = 2  # passes over the documents
    steps: int | None = None  # optimizer steps; None: as many as the epochs need
    batch: int = 32  # documents per step
    learning_rate: float = 2e-3  # AdamW; rises over the warm-up, falls along a cosine to a tenth
    warmup: int = 10  # steps
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # largest norm of the gradient
    balance_speed: float | None = None  # γ, step of the experts' selection bias; None: 0.001 where it is saved, else 0
    lora_rank: int = 0  # r: train adapters only; 0: train all weights
    lora_alpha: float = 32.0  # α
    held_out: float = 0.05  # share of the prompts whose documents are not trained but measured; 0: none
    eval_every: int = 25  # steps
    seed: int = 0
    out: Path = Path("runs/distill")
    resume: bool = False
    microbatch: int = 8192  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the student; None: bfloat16 on CUDA, else float32
    teacher_dtype: Literal["float32", "bfloat16"] | None = None  # None: that of the student
    wandb: str = "off"

    @property
    def texts(self) -> float:
        """λ."""
        return float(self.teacher is None) if self.ce_weight is None else self.ce_weight

    def __post_init__(self):
        at_least(self, 1, "epochs", "steps", "batch", "eval_every", "max_length", "microbatch", "top_k")
        at_least(self, 0, "learning_rate", "warmup", "weight_decay", "balance_speed", "lora_rank", "lora_alpha", "seed")
        at_least(self, 1e-6, "temperature")
        above(self, 0, "grad_clip")
        fraction(self, "held_out", "beta", "ce_weight")
        new_file(self, "stored")
        if not self.data:
            raise ValueError("data = (): at least one file")
        if self.teacher is None and self.texts < 1:
            raise ValueError(f"ce_weight = {self.ce_weight}: give a --teacher; without one the texts alone are learned")
        if self.teacher is not None and self.texts == 1:
            raise ValueError(f"ce_weight = {self.ce_weight}: the teacher has no part in the loss; leave --teacher out")
        of_a_teacher = {"beta": 0.0, "temperature": 1.0, "top_k": None, "teacher_dtype": None}  # name -> default
        for name, default in of_a_teacher.items():
            if self.teacher is None and getattr(self, name) != default:
                raise ValueError(f"{name} = {getattr(self, name)}: of which --teacher?")
        if self.stored and not self.top_k:
            raise ValueError(f"stored = {self.stored}: how many log-probs per token? Give --top-k")


class Example(NamedTuple):
    """A document, and the teacher's stored log-probs at its n trained tokens: ids [n, k], lp [n, k]; or None."""

    document: Document
    top: tuple[Tensor, Tensor] | None


def loss_parts(
    model: Transformer, teacher: Transformer | None, examples: list[Example], config: Config, record: list
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(L, CE, D_β) at every trained token, [M] each, of micro-batches; what has no part in the loss is 0.

    Of several ranks each has its own micro-batches, times their share (`distributed.deal`). record: receives, of each
    micro-batch, the load of each MoE layer, times the share.
    """
    for rows, share in deal(packed([len(example.document.tokens) for example in examples], config.microbatch)):
        tokens, cu_seqlens, trained = laid_out([examples[i].document for i in rows], model.device)
        where, how = {"cu_seqlens": cu_seqlens, "mask": trained}, (config.beta, config.temperature)
        routing: list[Routing] = []
        h = model.states(tokens, **where, record=routing)
        record.append([share * expert_load(layer) for layer in routing])
        ce, distance = (torch.zeros(len(h), device=h.device) for _ in range(2))
        if config.texts or not torch.is_grad_enabled():  # measured also where it is not trained
            ce = nll(log_probs(model, h, tokens[trained]))
        if config.top_k:
            ids, lp = (torch.cat(part).to(model.device) for part in zip(*(examples[i].top for i in rows)))
            distance = top_divergence(model, h, ids.long(), lp, *how)
        elif teacher is not None:
            with torch.no_grad():
                h_t = teacher.states(tokens, **where)
            distance = divergence(model, h, teacher, h_t, *how)
        yield share * mixed(ce, distance, config.texts, config.temperature), share * ce, share * distance


def trained_tokens(examples: list[Example]) -> int:
    """How many tokens the examples train."""
    return sum(sum(example.document.trained) for example in examples)


def loss_backward(
    model: Transformer, teacher: Transformer | None, examples: list[Example], config: Config
) -> tuple[float, list[Tensor]]:
    """Adds the gradient of the loss on these examples, the mean over their trained tokens.

    Returns the loss, and the load of each MoE layer.
    """
    total, sum_of_all = trained_tokens(examples), 0.0
    record: list[list[Tensor]] = []
    for loss, _, _ in loss_parts(model, teacher, examples, config, record):
        part = loss.sum() / total
        part.backward()
        sum_of_all += part.item()
    return sum_of_ranks(sum_of_all), [sum_of_ranks(sum(layer)) for layer in zip(*record)]


@torch.no_grad()
def measure(
    model: Transformer, teacher: Transformer | None, examples: list[Example], config: Config
) -> dict[str, float]:
    """The loss on held-out examples and its two parts, over all of their answer tokens; nothing without examples."""
    if not examples:
        return {}
    with gathered(model), nullcontext() if teacher is None else gathered(teacher):
        parts = [[x.sum() for x in batch] for batch in loss_parts(model, teacher, examples, config, [])]
    loss, ce, distance = (sum_of_ranks(sum(part).item()) / trained_tokens(examples) for part in zip(*parts))
    return {"eval/loss": loss, "eval/ce": ce} | ({} if config.texts == 1 else {"eval/divergence": distance})


@torch.no_grad()
def store(teacher: Transformer, vocab: int, documents: list[Document], config: Config, path: Path) -> None:
    """Write the teacher's top k at every trained token of the documents, whose order it keeps, and what they are of.

    vocab: of the student. ValueError if the teacher's is smaller.
    """
    if teacher.config.vocab < vocab:
        raise ValueError(
            f"top_k = {config.top_k}: the teacher's vocabulary of {teacher.config.vocab:,} is smaller than the "
            f"student's of {vocab:,}; compare whole distributions, without --top-k"
        )
    tops: dict[int, tuple[Tensor, Tensor]] = {}
    with progress(len(documents), "teacher") as advance, gathered(teacher):
        for rows in my_share(packed([len(document.tokens) for document in documents], config.microbatch)):
            tokens, cu_seqlens, trained = laid_out([documents[i] for i in rows], teacher.device)
            h = teacher.states(tokens, cu_seqlens=cu_seqlens, mask=trained)
            ids, lp = top_log_probs(teacher, h, config.top_k, config.temperature, vocab)
            sizes = [sum(documents[i].trained) for i in rows]
            for i, *top in zip(rows, ids.int().cpu().split(sizes), lp.float().cpu().split(sizes)):
                tops[i] = top
            advance(len(rows))
    tops = dict(itertools.chain.from_iterable(part.items() for part in exchanged(tops)))
    ids, lp = (torch.cat(part) for part in zip(*(tops[i] for i in range(len(documents)))))
    facts = about(documents, vocab, config)

    def write() -> None:
        unfinished = path.with_suffix(".unfinished")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids, "lp": lp}, unfinished, facts)
        unfinished.replace(path)

    on_first(write)


def about(documents: list[Document], vocab: int, config: Config) -> dict[str, str]:
    """What stored log-probs depend on."""
    texts = hashlib.sha256(repr([(document.tokens, document.trained) for document in documents]).encode()).hexdigest()
    teacher = checkpoint.digests(checkpoint.resolve(config.teacher, prefer="best"))
    values = {"teacher": teacher, "k": config.top_k, "temperature": config.temperature, "texts": texts}
    values |= {"vocabulary": vocab, "dtype": pick_dtype(config.teacher_dtype or config.dtype, pick(config.device))}
    return {name: str(value) for name, value in values.items()}


def read_stored(documents: list[Document], vocab: int, config: Config, path: Path) -> list[Example]:
    """The documents with what `store` wrote. ValueError if that was of other texts, or with other settings."""
    try:
        with safe_open(path, "pt") as file:
            stated, (ids, lp) = file.metadata() or {}, (file.get_tensor(name) for name in ("ids", "lp"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no file of stored log-probs: {error}") from error
    if changed := [name for name, value in about(documents, vocab, config).items() if stated.get(name) != value]:
        raise ValueError(f"{path} was stored with another {' and '.join(changed)}: choose another file, or delete it")
    sizes = [sum(document.trained) for document in documents]
    return [Example(document, top) for document, top in zip(documents, zip(ids.split(sizes), lp.split(sizes)))]


def main(config: Config) -> dict[str, float]:
    """Train; save the student under out/checkpoint; return the held-out loss and its parts, before and after."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    seed_everything(config.seed)
    device = pick(config.device)
    folder, path = config.out / "checkpoint", config.stored or config.out / STORED
    resumed = checkpoint.resume(folder) if config.resume else None
    opening = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha, "recompute": config.recompute}
    dtype = pick_dtype(config.dtype, device)
    model, tokenizer, source = load_policy(policy.origin(config.student, resumed), device, dtype, **opening)
    speed, layers = speed_of_balance(model, config), [module for module in model.modules() if isinstance(module, MoE)]
    teacher = None
    if config.teacher is not None and not (config.top_k and path.exists()):
        used = pick_dtype(config.teacher_dtype or config.dtype, device)
        teacher = load_teacher(config.teacher, tokenizer, device, used)
        shard(device, used, teacher)
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
    began = time.perf_counter() - state["seconds"]
    if config.top_k:  # before `start` writes to the folder of the run, so that a refusal leaves nothing behind
        if teacher is not None:
            store(teacher, model.config.vocab, [*train, *held_out], config, path)
            teacher = None  # its memory is free for the training
        examples = read_stored([*train, *held_out], model.config.vocab, config, path)
    else:
        examples = [Example(document, None) for document in (*train, *held_out)]
    train, held_out = examples[: len(train)], examples[len(train) :]
    run.start(state["step"] if resumed else -1)
    tokens = earlier = state["tokens"]
    if not resumed:
        run.log(0, measure(model, teacher, held_out, config))
    print(f"distilling for {end:,} steps on {len(train):,} documents; {len(held_out):,} documents are held out")

    stepping = time.perf_counter()
    batches = itertools.islice(passes(len(train), config.batch, config.seed), state["step"], end)
    for step, batch in zip(steps(state["step"], end, config.out.name), batches):
        examples = [train[i] for i in batch]
        tokens += trained_tokens(examples)
        factor = warmup_cosine(step - 1, end, config.warmup)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        loss, loads = loss_backward(model, teacher, examples, config)
        norm = clip_gradients(model, config.grad_clip, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer, load in zip(layers, loads):
            balance_step(layer.bias, load, speed)

        metrics = {"train/loss": loss, "train/lr": config.learning_rate * factor, "train/grad_norm": norm}
        metrics["perf/train_tok_s"] = (tokens - earlier) / (time.perf_counter() - stepping)
        due = step % config.eval_every == 0 or step == end
        if due:
            metrics |= measure(model, teacher, held_out, config)
            names = ("train/loss", "eval/loss", "eval/ce", "eval/divergence")
            progress_line(step, end, [(name, f"{metrics[name]:.3f}") for name in names if name in metrics])
        run.log(step, metrics)
        if due:
            state = {"step": step, "steps": end, "seconds": time.perf_counter() - began, "tokens": tokens}
            state |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(folder, step, lambda path: policy.save(model, tokenizer, path, source), state)

    rows = read_metrics(config.out)
    sft_figure.draw_loss(rows, config.out / "figures" / "distill.png", "distillation")
    result = {
        f"{when}/{name}": row[f"eval/{name}"]
        for when, row in (("before", rows[0]), ("after", rows[-1]))
        for name in ("loss", "ce", "divergence")
        if f"eval/{name}" in row
    }
    counts = {"examples": len(train), "examples/held_out": len(held_out), "tokens": tokens}
    seconds = {"seconds/distill": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib(device)}
    run.result(result | counts | seconds)
    run.close()
    return result


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)

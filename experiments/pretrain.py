"""Pre-train the tiny base on the synthetic Countdown corpus: next-token prediction, and if asked for the tokens behind.

    python -m experiments.pretrain --out runs/base
    python -m experiments.pretrain --out runs/base-dense --dense
    python -m experiments.pretrain --out runs/base-mtp --model.mtp-depth 1

Muon moves the matrices, AdamW the rest; after every step each expert's selection bias moves against its load
(auxiliary-loss-free balancing, DeepSeek-V3, section 2.1.2), beside V3's small sequence-wise balance loss. The run ends
by measuring the skills that reinforcement learning will build on: sums, and verdicts on tries.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

from minir1 import checkpoint
from minir1.data import batches, by_tokens, pad_rows
from minir1.log import open_run, peak_memory_gib, progress, progress_line
from minir1.losses import nll
from minir1.model import hf
from minir1.model.config import ModelConfig, dense
from minir1.model.moe import MoE, balance_step, expert_load, maximal_violation, sequence_balance_loss
from minir1.model.transformer import Transformer
from minir1.optim import Muon, clip_gradients, split_parameters, warmup_stable_decay
from minir1.reduction import token_mean
from minir1.seed import seed_everything
from minir1.tasks import countdown, countdown_corpus
from minir1.tasks.countdown_corpus import Mix
from minir1.tokenizer import EOS, Tokenizer, word_level


@dataclass(frozen=True)
class Config:
    """Pre-training. The defaults are those of the ten-minute demonstration."""

    level: str = "default"  # of Countdown: default | wide | four
    dense: bool = False  # grouped-query attention and SwiGLU instead of MLA and experts
    model: ModelConfig = field(default_factory=ModelConfig)  # shape of the MLA + MoE model
    mix: Mix = field(default_factory=Mix)  # of the corpus
    steps: int = 1800
    batch: int = 2048  # tokens a step
    muon_lr: float = 0.005  # matrices inside the blocks
    adam_lr: float = 0.01  # embedding, head, router, gains
    warmup: int = 60  # steps
    clip: float = 1.0  # largest norm of the gradient
    balance_speed: float = 0.003  # γ, step of the experts' selection bias
    balance_loss: float = 1e-4  # α, weight of the sequence-wise balance loss
    mtp_weight: float = 0.3  # λ, weight of multi-token prediction, if --model.mtp-depth asks for it
    seed: int = 0
    out: Path = Path("runs/base")
    resume: bool = False
    microbatch: int = 2048  # most tokens of one forward pass; no result depends on it
    checkpoint_every: int = 600  # steps
    wandb: str = "off"

    def __post_init__(self):
        for name in ("steps", "batch", "microbatch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1")
        if self.mtp_weight < 0:
            raise ValueError(f"mtp_weight = {self.mtp_weight}: must not be negative")


def build_tokenizer(level: str) -> Tokenizer:
    """A token for every number that the level can show, every sign, and every word of the corpus."""
    limit = countdown.level_of(level)
    return word_level(countdown_corpus.WORDS, largest_number=max(100, limit.value, limit.high))


def build_model(config: Config, tokenizer: Tokenizer) -> Transformer:
    """The model of this run with the tokenizer's vocabulary, rounded up to a multiple of 16."""
    if config.dense and config.model != ModelConfig():
        raise ValueError("--model.* is the shape of the MLA + MoE model: it does not go with --dense")
    shape = dense() if config.dense else config.model
    return Transformer(replace(shape, vocab=-(-tokenizer.size // 16) * 16, eos=tokenizer.eos, pad=tokenizer.pad))


def token_batches(config: Config, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """The endless corpus as batches of tokenised documents, a function of the seed alone."""
    texts = countdown_corpus.documents(config.level, config.seed, config.mix)
    chunks = iter(lambda: tokenizer.encode_batch([text + EOS for text in itertools.islice(texts, 512)]), None)
    documents = itertools.chain.from_iterable(chunks)
    return batches(documents, config.batch, pool=16, rng=random.Random(f"batches {config.seed}"))


def loss_backward(
    model: Transformer, rows: list[list[int]], config: Config
) -> tuple[float, float, list[torch.Tensor]]:
    """Gradients of L_main + λ/D · Σ_k L_k, and the balance loss (V3, section 2.2, equations 24 and 25).

        L_k = -1/T · Σ_t log π_k(x_t), over tokens t > k      T: tokens that the model itself predicts, whatever k

    Returns L_main, Σ_k L_k / D (0 without modules for multi-token prediction) and the load of each MoE layer.
    """
    total = sum(len(row) - 1 for row in rows)
    depth = model.config.mtp_depth
    value, ahead_value, loads = 0.0, 0.0, []
    for part in by_tokens([len(row) for row in rows], config.microbatch):
        tokens, lengths = pad_rows([rows[i] for i in part])
        record = []
        logp, *ahead = model.mtp_logprob(tokens, lengths=lengths, record=record)
        columns = torch.arange(tokens.shape[1])
        mask = (columns > 0) & (columns < lengths.unsqueeze(1))
        loss = (token_mean(mask, total) * nll(logp)).sum()
        value += loss.item()
        for k, logp_k in enumerate(ahead, start=1):
            loss_k = (token_mean(mask & (columns > k), total) * nll(logp_k)).sum() / depth
            ahead_value += loss_k.item()
            loss = loss + config.mtp_weight * loss_k
        if config.balance_loss:
            blocks = len(record) - depth if record else 0  # a dense model records nothing
            for k, layers in enumerate([record[:blocks], *([module] for module in record[blocks:])]):
                seen = (lengths - k).clamp(min=0)  # module k works on k tokens less a row
                share = int((seen > 0).sum()) / max(1, sum(len(row) > k for row in rows))
                loss = loss + share * config.balance_loss * sum(sequence_balance_loss(r, seen) for r in layers)
        loss.backward()
        loads.append([expert_load(r) for r in record])
    return value, ahead_value, [sum(layer) for layer in zip(*loads)]


@torch.no_grad()
def skills(model: Transformer, tokenizer: Tokenizer, level: str, problems: int = 100) -> dict[str, float]:
    """What reinforcement learning will build on, on held-out problems: how often the most likely token is right.

    `sums`: the result of each step of a legal try; `verdicts`: the yes or no behind a right try of a problem, where
    right and wrong count half each.
    """
    held_out = countdown.held_out(level, "validation", problems)
    rng = random.Random(0)
    rows, results, verdicts = [], [], []
    equals, ends = tokenizer.id("="), {tokenizer.id(" yes\n"): True, tokenizer.id(" no\n"): False}
    for problem in held_out:
        numbers, target = countdown.parse(problem)
        everything = countdown.tries(numbers, problem.level)
        chosen = rng.sample(everything, min(4, len(everything))) + [rng.choice(countdown.solutions(problem))]
        words = [" yes\n" if countdown.value_of(t) == target else " no\n" for t in chosen]
        lines = "".join(f"{countdown.try_text(t)}:{target}{word}" for t, word in zip(chosen, words))
        rows.append(tokenizer.encode(tokenizer.chat(problem.prompt) + "<think>" + lines))
    tokens, lengths = pad_rows(rows)
    asked = (tokens == equals) | torch.isin(tokens, torch.tensor([*ends])).roll(-1, 1)  # logits here, not of all
    guess = torch.full_like(tokens, -1)
    guess[asked] = model.logits(model.hidden(tokens, lengths=lengths)[asked]).argmax(-1)
    for row, best in zip(rows, guess.tolist()):
        results += [best[i] == row[i + 1] for i, token in enumerate(row[:-1]) if token == equals]
        verdicts += [(ends[row[i + 1]], best[i] == row[i + 1]) for i in range(len(row) - 1) if row[i + 1] in ends]
    yes, no = ([right for truth, right in verdicts if truth == wanted] for wanted in (True, False))
    share = {"sums": results, "yes": yes, "no": no}
    return {f"skill/{name}": sum(hits) / len(hits) for name, hits in share.items()}


def main(config: Config) -> dict[str, float]:
    """Train, save the base under out/checkpoint, return the skills."""
    seed_everything(config.seed)
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    folder = config.out / "checkpoint"
    tokenizer = build_tokenizer(config.level)
    model = build_model(config, tokenizer)
    matrices, rest = split_parameters(model)
    muon = Muon(matrices, lr=config.muon_lr)
    adam = torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    start, spent = 0, 0.0
    if config.resume and checkpoint.latest(folder):
        start, spent = resume(folder, model, muon, adam, config.steps)
    run.cut_back(start)

    corpus = token_batches(config, tokenizer) if start < config.steps else []
    stream = itertools.islice(corpus, start, config.steps)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"pre-training {parameters / 1e6:.2f}M parameters for {config.steps} steps of {config.batch} tokens")
    began, seen = time.perf_counter() - spent, 0
    with progress(config.steps, "pre-training") as bar:
        bar.advance(start)
        for step, rows in enumerate(stream, start=start + 1):
            factor = warmup_stable_decay(step - 1, config.steps, config.warmup)
            for optimizer, lr in ((muon, config.muon_lr), (adam, config.adam_lr)):
                optimizer.param_groups[0]["lr"] = lr * factor
            loss, mtp_loss, loads = loss_backward(model, rows, config)
            norm = clip_gradients(model, config.clip, step)
            muon.step()
            adam.step()
            model.zero_grad(set_to_none=True)
            for layer, load in zip(layers, loads):
                balance_step(layer.bias, load, config.balance_speed)

            seen += sum(len(row) for row in rows)
            speed = seen / (time.perf_counter() - began - spent)
            metrics = {"train/loss": loss, "train/grad_norm": norm, "train/lr": config.muon_lr * factor}
            if model.mtp:
                metrics["train/mtp_loss"] = mtp_loss
            if loads:
                metrics["train/max_violation"] = max(maximal_violation(load) for load in loads)
            run.log(step, metrics | {"perf/train_tok_s": speed})
            bar.advance()
            if step % 100 == 0 or step == config.steps:
                shown = [("loss", f"{loss:.3f}"), ("grad", f"{norm:.2f}"), ("tok/s", f"{speed:,.0f}")]
                progress_line(step, config.steps, shown)
            if step % config.checkpoint_every == 0 or step == config.steps:
                state = {"step": step, "muon": muon.state_dict(), "adam": adam.state_dict()}
                state |= {"steps": config.steps, "seconds": time.perf_counter() - began}
                checkpoint.save(folder, step, lambda path: hf.save(model, tokenizer, path), state)

    result = skills(model, tokenizer, config.level)
    seconds = time.perf_counter() - began
    print("  ".join(f"{name.removeprefix('skill/')} {value:.1%}" for name, value in result.items()))
    run.result(result | {"seconds/pretrain": seconds, "memory/peak_gib": peak_memory_gib()})
    run.close()
    return result


def resume(folder: Path, model: Transformer, muon, adam, steps: int) -> tuple[int, float]:
    """Put the latest checkpoint into the model and the optimizers; returns its step and the seconds spent."""
    path = checkpoint.latest(folder)
    model.load_state_dict(hf.load(path)[0].state_dict())
    state = checkpoint.load_state(path)
    if state["steps"] != steps:
        raise ValueError(f"steps = {steps}: the learning rate follows it, so {path} goes on with {state['steps']} only")
    muon.load_state_dict(state["muon"])
    adam.load_state_dict(state["adam"])
    return state["step"], state["seconds"]


if __name__ == "__main__":
    main(tyro.cli(Config))

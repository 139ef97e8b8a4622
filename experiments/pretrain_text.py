"""Pre-train a base on one's own text, measured in bits per byte of documents that it has not seen.

    python -m experiments.pretrain_text --data papers corpus.jsonl --tokenizer runs/tokenizer --out runs/own-text
    python -m experiments.pretrain_text --data src --skip tests --tokenizer runs/tokenizer --sample-prompts "def"

The same loss and optimizers as experiments/pretrain.py, which trains on a task's synthetic corpus instead. --data takes
files and folders of plain text and of JSON lines with a `text` field; --tokenizer a folder as train_tokenizer.py writes
it, or any checkpoint's. The tokens go to a file in the run folder first, so the text may be larger than memory; they
are read in an order that depends on the seed alone, pass after pass. Documents do not attend to each other, and one of
more tokens than the window is cut into pieces.

    bits per byte = 1/ln 2 · Σ_t -log π(x_t | x_<t) / bytes          over all tokens of the held-out documents

is nats per token / ln 2 · tokens / bytes: comparable across tokenizers, if they give back the text as it was. As a
yardstick, the same documents are compressed, one after another, by gzip -9.
"""

from __future__ import annotations

import gzip
import io
import itertools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from experiments import pretrain_text_figure
from experiments.pretrain import build_model, check_shape, loss_backward
from minir1 import checkpoint, cli, memory, policy, text_data, text_files
from minir1.data import end_to_end, packed
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.distributed import load_target, my_share, on_first, sum_of_ranks
from minir1.files import read_json
from minir1.log import markdown_table, open_run, progress_line, read_metrics, steps, table
from minir1.losses import nll
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.model.moe import MoE, balance_step, maximal_violation
from minir1.model.shards import gathered, shard
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients, muon, split_parameters, warmup_stable_decay
from minir1.sample import generate
from minir1.seed import hashed, seed_everything
from minir1.settings import above, at_least, fraction, same_steps, zero_or_at_least
from minir1.text_data import Corpus
from minir1.tokenizer import Tokenizer

COLUMNS = ["", "bits per byte", "times smaller"]


@dataclass(frozen=True)
class Config:
    """Pre-training on text. The defaults take a few minutes on two CPU cores."""

    data: tuple[Path, ...]  # files and folders: plain text, and JSON lines with a text field
    skip: tuple[str, ...] = ()  # names of folders below those of --data that are left out
    tokenizer: Path = Path("runs/tokenizer")  # a folder with tokenizer.json and tokenizer_config.json
    dense: bool = False  # grouped-query attention and SwiGLU instead of MLA and experts
    model: ModelConfig = field(default_factory=ModelConfig)  # shape of the MLA + MoE model
    window: int = 512  # tokens that are read together; longer documents are cut
    held_out: float = 0.05  # share of the documents that are not trained on but measured; 0: none
    eval_every: int = 250  # steps, also from checkpoint to checkpoint
    sample_prompts: tuple[str, ...] = ("",)  # beginnings of documents that the model continues, before and after
    sample_tokens: int = 120  # of each sample
    temperature: float = 0.8  # of the samples; 0: greedy
    steps: int = 1500
    batch: int = 4096  # tokens per step
    muon_lr: float = 0.005  # matrices inside the blocks
    adam_lr: float = 0.01  # embedding, head, router, norms
    warmup: int = 60  # steps
    clip: float = 1.0  # largest norm of the gradient
    balance_speed: float = 0.003  # γ, step of the experts' selection bias
    balance_loss: float = 1e-4  # α, weight of the sequence-wise balance loss
    mtp_weight: float = 0.3  # λ, weight of multi-token prediction, with --model.mtp-depth above 0
    seed: int = 0
    out: Path = Path("runs/own-text")
    resume: bool = False
    microbatch: int = 4096  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "window", "eval_every", "sample_tokens", "steps", "batch", "microbatch")
        at_least(self, 0, "muon_lr", "adam_lr", "warmup", "balance_speed", "balance_loss", "mtp_weight", "seed")
        zero_or_at_least(self, 1e-6, "temperature")
        above(self, 0, "clip")
        fraction(self, "held_out")
        if not self.data or not self.sample_prompts:
            raise ValueError(f"{'sample_prompts' if self.data else 'data'} = (): at least one")


def gzip_bits(config: Config, corpus: Corpus) -> float:
    """Bits per byte of the held-out documents, one after another, compressed by gzip -9."""
    largest, size, buffer = text_data.bound(corpus, config.held_out), 0, io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=9, mtime=0) as file:
        for _, text in text_files.documents(config.data, config.skip, quiet=True):
            if hashed(text) <= largest:
                size += file.write(text.encode())
    return 8 * len(buffer.getvalue()) / size


@torch.no_grad()
def measure(model: Transformer, corpus: Corpus, documents: np.ndarray, config: Config) -> dict[str, float]:
    """Bits per byte, and nats per token, of whole documents; nothing without documents."""
    chosen = text_data.pieces(corpus, documents, config.window)
    nats, tokens = 0.0, 0
    with gathered(model):
        for part in my_share(packed((chosen[:, 1] - chosen[:, 0]).tolist(), config.microbatch)):
            flat, cu_seqlens = end_to_end(text_data.rows(corpus, chosen[part]), model.device)
            nats += nll(model.logprob(flat, cu_seqlens=cu_seqlens)).sum().item()  # 0 for the first token of each piece
            tokens += len(flat) - len(part)
    if not len(documents):
        return {}
    nats, tokens = sum_of_ranks(nats), sum_of_ranks(tokens)
    bits = nats / math.log(2) / int(corpus.sizes[documents].sum())
    return {"eval/bits_per_byte": bits, "eval/nats_per_token": nats / tokens}


def samples(model: Transformer, tokenizer: Tokenizer, config: Config) -> list[str]:
    """What the model makes of the beginnings of documents: their text and its own."""
    prompts = [[text_data.start_token(tokenizer), *tokenizer.encode(prompt)] for prompt in config.sample_prompts]
    settings = {"temperature": config.temperature, "stop": [tokenizer.eos], "seed": config.seed}
    with gathered(model):
        drawn = generate(model, prompts, max_tokens=config.sample_tokens, **settings)
    answers = [tokens[:count].tolist() for tokens, count in zip(drawn.tokens, drawn.count)]
    return [tokenizer.decode([*p[1:], *a], keep_special=False) for p, a in zip(prompts, answers)]


def show(result: dict) -> None:
    """Print the samples before and after, and the table of bits per byte."""
    for when in ("before", "after"):
        for text in result[f"{when}/samples"]:
            print(f"--- {when}\n{text}")
    if rows := table_rows(result):
        table("held-out documents", COLUMNS, rows)


def table_rows(result: dict) -> list[list[str]]:
    """A line for the model before and after, and for gzip; none without held-out documents."""
    named = {"before": "the model before training", "gzip": "gzip -9", "after": "the model after training"}
    values = {name: result.get(f"{when}/bits_per_byte") for when, name in named.items()}
    return [[name, f"{value:.3f}", f"{8 / value:.2f}"] for name, value in values.items() if value is not None]


def page(result: dict) -> str:
    """The table, what was trained on, and each sample before and after, as indented text."""
    trained, held_out = (f"{result[f'bytes/{name}'] / 1e6:.1f} MB" for name in ("trained", "held_out"))
    facts = f"{result['parameters'] / 1e6:.2f} million parameters, {result['tokens'] / 1e6:.1f} million tokens in "
    facts += f"{result['documents/trained']:,} documents of {trained}; {result['documents/held_out']:,} documents of "
    facts += f"{held_out} are held out; {result['seconds/pretrain']:.0f} s."
    parts = [markdown_table(COLUMNS, table_rows(result)), facts]
    for when in ("before", "after"):
        parts.append(f"Samples {when} training:")
        for text in result[f"{when}/samples"]:
            text = text.expandtabs().replace("<!--", "<! --")  # what would end the block
            shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
            indented = "\n".join(f"    {line}".rstrip() for line in shown.split("\n")).rstrip()
            parts.append(f"{indented}\n\n<!-- -->")  # which divides it from the next one
    return "\n\n".join(parts)


def main(config: Config) -> dict[str, float]:
    """Train; save the base under out/checkpoint; return the bits per byte before and after, and gzip's."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    check_shape(config)
    seed_everything(config.seed)
    device = pick(config.device)
    folder = config.out / "checkpoint"
    resumed = checkpoint.resume(folder) if config.resume else None
    tokenizer = Tokenizer.load(resumed or config.tokenizer)
    dtype = pick_dtype(config.dtype, device)
    model = build_model(config, tokenizer).to(*load_target(device, dtype))
    model.recompute(config.recompute)
    shard(device, dtype, model)
    if not resumed:
        documents = text_files.documents(config.data, config.skip)

        def write() -> None:
            text_data.write(config.out / "tokens", documents, tokenizer, config.held_out)

        on_first(write)
    corpus = text_data.read(config.out / "tokens")
    train, held_out = text_data.split(corpus, config.held_out)
    matrices, rest = split_parameters(model)
    parts = {"muon": muon(matrices, config.muon_lr), "adam": adamw(rest, config.adam_lr)}
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    most = max(config.microbatch, config.window + 1)
    memory.show(memory.step_memory(model, microbatch=most, muon=True, recompute=config.recompute), device)
    state = policy.restore(resumed, model, parts) if resumed else {"step": 0, "steps": config.steps, "seconds": 0.0}
    same_steps(config.steps, state["steps"])
    run.start(state["step"] if resumed else -1)

    spent, trained = state["seconds"], 0
    began = time.perf_counter() - spent
    chosen = text_data.pieces(corpus, train, config.window)
    parameters, tokens = sum(p.numel() for p in model.parameters()), int((chosen[:, 1] - chosen[:, 0]).sum())
    print(
        f"pre-training {parameters / 1e6:.2f}M parameters for {config.steps} steps of {config.batch} tokens, "
        f"{config.steps * config.batch / tokens:.2g} passes over {len(train):,} documents of {tokens:,} tokens; "
        f"{len(held_out):,} documents are held out"
    )
    if not resumed:
        run.log(0, measure(model, corpus, held_out, config))
        facts = {"parameters": parameters, "tokens": tokens, "before/samples": samples(model, tokenizer, config)}
        for name, documents in (("trained", train), ("held_out", held_out)):
            facts |= {f"documents/{name}": len(documents), f"bytes/{name}": int(corpus.sizes[documents].sum())}
        run.result(facts | ({"gzip/bits_per_byte": gzip_bits(config, corpus)} if len(held_out) else {}))

    stream = text_data.batches((chosen[:, 1] - chosen[:, 0]).tolist(), config.batch, config.seed)
    batches = itertools.islice(stream, state["step"], config.steps)
    for step, batch in zip(steps(state["step"], config.steps, "pre-training"), batches):
        factor = warmup_stable_decay(step - 1, config.steps, config.warmup)
        parts["muon"].param_groups[0]["lr"] = config.muon_lr * factor
        parts["adam"].param_groups[0]["lr"] = config.adam_lr * factor
        rows = text_data.rows(corpus, chosen[batch])
        loss, mtp_loss, loads = loss_backward(model, rows, config)
        norm = clip_gradients(model, config.clip, step)
        for optimizer in parts.values():
            optimizer.step()
        model.zero_grad(set_to_none=True)
        for layer, load in zip(layers, loads):
            balance_step(layer.bias, load, config.balance_speed)

        trained += sum(len(row) for row in rows)
        metrics = {"train/loss": loss, "train/grad_norm": norm, "train/lr": config.muon_lr * factor}
        if model.mtp:
            metrics["train/mtp_loss"] = mtp_loss
        if loads:
            metrics["train/max_violation"] = max(map(maximal_violation, loads))
        metrics["perf/train_tok_s"] = trained / (time.perf_counter() - began - spent)
        due = step % config.eval_every == 0 or step == config.steps
        if due:
            metrics |= measure(model, corpus, held_out, config)
            names = [("loss", "train/loss"), ("bits per byte", "eval/bits_per_byte")]
            fields = [(name, f"{metrics[key]:.3f}") for name, key in names if key in metrics]
            progress_line(step, config.steps, [*fields, ("tok/s", f"{metrics['perf/train_tok_s']:,.0f}")])
        run.log(step, metrics)
        if due:
            state = {"step": step, "steps": config.steps, "seconds": time.perf_counter() - began}
            state |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(folder, step, lambda path: hf.save(model, tokenizer, path), state)

    metrics = read_metrics(config.out)
    ends = {"before": metrics[0], "after": metrics[-1]} if len(held_out) else {}
    result = {f"{when}/{key[5:]}": row[key] for when, row in ends.items() for key in row if key.startswith("eval/")}
    seconds = {"seconds/pretrain": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib(device)}
    after = samples(model, tokenizer, config)
    run.result(result | {"after/samples": after} | seconds)
    saved = read_json(config.out / "result.json")
    pretrain_text_figure.draw(metrics, saved, config.out / "figures" / "bits_per_byte.png")
    show(saved)
    run.close()
    return {key: value for key, value in saved.items() if key.endswith("bits_per_byte")}


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)

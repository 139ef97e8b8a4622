"""A reward model from comparisons: a scalar head on a language model, by Bradley and Terry.

    python -m experiments.reward_model --checkpoint runs/base/checkpoint --out runs/reward-model

    L(φ) = -1/N Σ log σ(r_φ(x, y_c) - r_φ(x, y_r) - m)

r is computed from the state of the last token, the end of the answer, by a new head; all weights of --checkpoint are
trained with it, and the selection bias of experts stays as it is. m is --margin times the difference of the two scores
in the file (Llama 2, arXiv:2307.09288, section 3.2.2). --label-smoothing is the ε of minir1/preference.py.

--pairs takes any file that minir1/preference_data.py reads: plain lines (those of preference_pairs.py), HH-RLHF's,
UltraFeedback's. On held-out pairs the script measures how often the model agrees with the preference, how often a rule
that always prefers the longer answer does, and whether σ(r_c - r_r) is calibrated. The checkpoint opens with `--reward
model:PATH` of ppo.py, and in transformers as a sequence classifier with one label.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from experiments import preference_figures
from minir1 import checkpoint, cli
from minir1.data import passes
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.distributed import load_target
from minir1.log import open_run, progress_line, steps, table
from minir1.model import heads
from minir1.model.heads import ScalarModel, ValueHead
from minir1.model.shards import gathered, shard
from minir1.optim import adamw, clip_gradients, warmup_stable_decay
from minir1.policy import load_policy, put_back
from minir1.preference import bradley_terry, calibration, calibration_error
from minir1.preference_data import Rows, accuracy, in_parts, load, padded
from minir1.seed import seed_everything
from minir1.settings import above, at_least, same_steps
from minir1.templates import TEMPLATES


@dataclass(frozen=True)
class Config:
    """A reward model. The defaults are those of docs/preferences.md."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the trunk: a Hugging Face folder, or a folder of checkpoints
    pairs: Path = Path("runs/pairs/train.jsonl")
    held_out: Path = Path("runs/pairs/held_out.jsonl")
    max_length: int = 1024  # tokens of prompt and answer; longer pairs are left out
    template: Literal[TEMPLATES] = "chat"  # of the pairs
    steps: int = 90
    batch: int = 32  # N, pairs per step
    learning_rate: float = 1e-3  # AdamW; rises over the warm-up, falls to 0 over the second half
    warmup: int = 10  # steps
    margin: float = 0.0  # m per point of difference between the scores
    label_smoothing: float = 0.0  # ε
    grad_clip: float = 1.0  # largest norm of the gradient
    bins: int = 5  # of the confidence, for the calibration
    eval_every: int = 30  # steps
    seed: int = 0
    out: Path = Path("runs/reward-model")
    resume: bool = False
    microbatch: int = 8192  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "steps", "batch", "eval_every", "max_length", "microbatch", "bins")
        at_least(self, 0, "learning_rate", "warmup", "margin", "seed")
        above(self, 0, "grad_clip")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: 0 to below 0.5")


def score(model: ScalarModel, pairs: list[Rows], config: Config) -> dict[str, Tensor]:
    """Loss and both rewards of each pair, [N]."""
    tokens, lengths, _ = padded(pairs, model.trunk.device)
    chosen, rejected = model.score(tokens, lengths=lengths).chunk(2)
    margin = 0.0
    if config.margin:
        margin = config.margin * torch.tensor([pair.score_gap for pair in pairs], device=chosen.device)
    loss = bradley_terry(chosen, rejected, margin, config.label_smoothing)
    return {"loss": loss, "chosen": chosen, "rejected": rejected}


def learn(model: ScalarModel, optimizer, pairs: list[Rows], config: Config, step: int = 0) -> dict[str, float]:
    """One step on N pairs; returns averages over them."""

    def backward(part: list[Rows], share: float) -> dict[str, Tensor]:
        scores = score(model, part, config)
        (share * scores["loss"].sum() / len(pairs)).backward()
        return scores

    scores = in_parts(pairs, config.microbatch, backward)
    norm = clip_gradients(model, config.grad_clip, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gap = scores["chosen"] - scores["rejected"]
    means = {"loss": scores["loss"], "gap": gap, "accuracy": (gap > 0).float()}
    return {f"train/{name}": x.mean().item() for name, x in means.items()} | {"train/grad_norm": norm}


@torch.no_grad()
def measure(model: ScalarModel, pairs: list[Rows], config: Config) -> tuple[dict[str, float], Tensor]:
    """The rewards of held-out pairs: flat figures, and the gaps r_c - r_r, [N]."""
    with gathered(model):
        scores = in_parts(pairs, config.microbatch, lambda part, share: score(model, part, config))
    gap = scores["chosen"] - scores["rejected"]
    values = {"loss": scores["loss"].mean().item(), "gap": gap.mean().item()}
    values |= accuracy(scores["chosen"], scores["rejected"], pairs)
    values["calibration_error"] = calibration_error(calibration(gap, config.bins))
    return {f"eval/{name}": value for name, value in values.items()}, gap


def closing(gap: Tensor, pairs: list[Rows], config: Config) -> dict[str, float]:
    """The rule that prefers the longer answer, and the bins of the calibration, as flat figures."""
    lengths = [torch.tensor([len(row) for row in rows]) for rows in zip(*((p.chosen, p.rejected) for p in pairs))]
    values = {f"longer/{name}": value for name, value in accuracy(*lengths, pairs).items()}
    bins = calibration(gap, config.bins)
    for b, columns in enumerate(zip(*(column.tolist() for column in bins))):
        values |= {f"calibration/{b}/{name}": value for name, value in zip(bins._fields, columns)}
    return values


BINS = ["confidence", "pairs", "claimed", "right"]


def bin_rows(result: dict[str, float]) -> list[list[str]]:
    """The calibration, one row per bin, columns as in BINS. result: contains what `closing` returns."""
    count = sum(key.startswith("calibration/") and key.endswith("/count") for key in result)
    lines = []
    for b in range(count):
        pairs, confidence, right = (result[f"calibration/{b}/{key}"] for key in ("count", "confidence", "accuracy"))
        edges = f"{0.5 + b / (2 * count):.2f} to {0.5 + (b + 1) / (2 * count):.2f}"
        lines.append([edges, f"{pairs:.0f}", *(f"{x:.1%}" if pairs else "-" for x in (confidence, right))])
    return lines


def show(result: dict[str, float]) -> None:
    """Print the last measurement and the calibration."""
    for name, key in (("reward model", "eval"), ("the longer answer", "longer")):
        middle, low, high = (result[f"{key}/accuracy{end}"] for end in ("", "_low", "_high"))
        print(f"{name}: {middle:.1%} of held-out pairs [{100 * low:.1f}, {100 * high:.1f}]")
    print(f"expected calibration error {result['eval/calibration_error']:.1%}")
    table("calibration on held-out pairs", BINS, bin_rows(result))


def main(config: Config) -> dict[str, float]:
    """Train; save the reward model under out/checkpoint; return the last measurement."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    seed_everything(config.seed)
    device = pick(config.device)
    folder = config.out / "checkpoint"
    resumed = checkpoint.resume(folder) if config.resume else None
    dtype = pick_dtype(config.dtype, device)
    if resumed:
        model, tokenizer = heads.load(resumed, *load_target(device, dtype))
        model.trunk.recompute(config.recompute)
    else:
        trunk, tokenizer, _ = load_policy(config.checkpoint, device, dtype, recompute=config.recompute)
        heads.scalar_class(trunk.config)  # what cannot be saved is refused before it is trained
        model = ScalarModel(trunk, ValueHead(trunk.config.dim).to(trunk.embedding.weight))
    reading = tokenizer, config.max_length, config.template
    train, held_out = (load(path, *reading) for path in (config.pairs, config.held_out))
    if config.margin and any(pair.score_gap is None for pair in train + held_out):
        raise ValueError(f"margin = {config.margin}: some pairs have no score_chosen and score_rejected; 0 without")
    shard(device, dtype, model)
    optimizer = adamw(model.parameters(), config.learning_rate)
    if resumed:
        state = checkpoint.load_state(resumed, device)
        checkpoint.verify(resumed, state.pop("sha256", {}))
        same_steps(config.steps, state["steps"])
        put_back(optimizer, state["optimizer"])
    else:
        state = {"step": 0, "seconds": 0.0}
    run.start(state["step"] if resumed else -1)
    start, spent = state["step"], state["seconds"]
    began, tokens = time.perf_counter() - spent, 0

    batches = itertools.islice(passes(len(train), config.batch, config.seed), start, config.steps)
    for step, batch in zip(steps(start, config.steps, "reward model"), batches):
        factor = warmup_stable_decay(step - 1, config.steps, config.warmup)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        metrics = learn(model, optimizer, [train[i] for i in batch], config, step)
        tokens += sum(len(train[i].chosen) + len(train[i].rejected) for i in batch)
        metrics["perf/train_tok_s"] = tokens / (time.perf_counter() - began - spent)
        due = step % config.eval_every == 0 or step == config.steps
        if due:
            metrics |= measure(model, held_out, config)[0]
            shown = [(name, f"{metrics[name]:.3f}") for name in ("train/loss", "eval/loss", "eval/gap")]
            progress_line(step, config.steps, [*shown, ("eval/accuracy", f"{metrics['eval/accuracy']:.1%}")])
        run.log(step, metrics)
        if due:
            state = {"step": step, "steps": config.steps, "seconds": time.perf_counter() - began}
            state["optimizer"] = optimizer.state_dict()
            checkpoint.save(folder, step, lambda path: heads.save(model, tokenizer, path), state)

    result, gap = measure(model, held_out, config)
    result |= closing(gap, held_out, config) | {"pairs/train": len(train), "pairs/held_out": len(held_out)}
    show(result)
    preference_figures.reliability(result, config.out / "figures" / "reliability.png")
    run.result(result | {"seconds/train": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib(device)})
    run.close()
    return result


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)

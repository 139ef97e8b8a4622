"""Direct preference optimisation: a policy from comparisons, without a reward model and without sampling.

    python -m experiments.dpo --checkpoint runs/base/checkpoint --out runs/dpo

    L(θ)    = -1/N Σ log σ(r(x, y_c) - r(x, y_r))                     (arXiv:2305.18290, equation 7)
    r(x, y) = β log π_θ(y|x) / π_ref(y|x)                              the implicit reward

π_ref is the policy at the start, and stays. ε (--label-smoothing) is the chance that a label is wrong. The loss knows
only the difference of the two rewards: watch `logp_chosen`, which may fall, as long as `logp_rejected` falls faster.

--pairs takes any file that minir1/preference_data.py reads: plain lines (those of preference_pairs.py), HH-RLHF's,
UltraFeedback's; for the last two say --level none. With a level of Countdown the policy is also sampled on its
validation problems, and judged by the rules. All weights are trained; the selection bias of experts stays.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from experiments import preference_figures as figures_preference
from experiments.preference_common import accuracy, check, in_parts, load_pairs, padded, resume
from experiments.rl_common import validate
from minir1 import checkpoint
from minir1.data import passes
from minir1.log import open_run, peak_memory_gib, progress, progress_line, read_metrics
from minir1.model import hf
from minir1.model.lora import merge
from minir1.model.transformer import Transformer
from minir1.optim import clip_gradients, warmup_stable_decay
from minir1.preference import dpo, implicit_reward
from minir1.preference_data import Rows
from minir1.seed import seed_everything
from minir1.tasks import countdown


@dataclass(frozen=True)
class Config:
    """DPO. The defaults are those of docs/preferences.md."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the start: a Hugging Face folder, or a folder of checkpoints
    pairs: Path = Path("runs/pairs/train.jsonl")
    held_out: Path = Path("runs/pairs/held_out.jsonl")
    longest: int = 1024  # tokens of prompt and answer; pairs that are longer are left out
    steps: int = 90
    batch: int = 32  # N, pairs a step
    lr: float = 1e-4  # AdamW; up over the warm-up, down to 0 over the second half
    warmup: int = 10  # steps
    beta: float = 0.1  # β
    label_smoothing: float = 0.0  # ε
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 30  # steps
    level: str = "default"  # of Countdown, to sample validation problems: default | wide | four; or none
    eval_answers: int = 2  # a validation problem
    max_tokens: int = 384  # budget of such an answer
    temperature: float = 1.0  # of such an answer
    seed: int = 0
    out: Path = Path("runs/dpo")
    resume: bool = False
    microbatch: int = 8192  # most tokens of one forward pass; no result depends on it
    wandb: str = "off"

    @property
    def forced(self) -> str:
        """What every sampled answer is made to begin with."""
        return ""

    def __post_init__(self):
        check(self)
        if not self.beta > 0:
            raise ValueError(f"beta = {self.beta}: above 0")
        if self.level != "none":
            countdown.level_of(self.level)


def score(model: Transformer, reference: Transformer, pairs: list[Rows], config: Config) -> dict[str, Tensor]:
    """Loss, implicit rewards and log-probs of each pair, [N]."""
    tokens, lengths, mask = padded(pairs)
    logp = model.logprob(tokens, lengths=lengths, mask=mask).sum(1)
    with torch.no_grad():
        ref_logp = reference.logprob(tokens, lengths=lengths, mask=mask).sum(1)
    found = {"loss": dpo(*logp.chunk(2), *ref_logp.chunk(2), config.beta, config.label_smoothing)}
    for name, values in (("logp", logp), ("reward", implicit_reward(logp, ref_logp, config.beta))):
        found |= dict(zip((f"{name}_chosen", f"{name}_rejected"), values.chunk(2)))
    return found


def means(found: dict[str, Tensor], prefix: str) -> dict[str, float]:
    """Averages over pairs, the gap of the rewards and how often it is positive among them."""
    gap = found["reward_chosen"] - found["reward_rejected"]
    found = found | {"gap": gap, "accuracy": (gap > 0).float()}
    return {f"{prefix}/{name}": values.mean().item() for name, values in found.items()}


def learn(model, reference, optimizer, pairs: list[Rows], config: Config, step: int = 0) -> dict[str, float]:
    """One step on N pairs; returns means over them."""

    def backward(part: list[Rows]) -> dict[str, Tensor]:
        found = score(model, reference, part, config)
        (found["loss"].sum() / len(pairs)).backward()
        return found

    found = in_parts(pairs, config.microbatch, backward)
    norm = clip_gradients(model, config.clip, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means(found, "train") | {"train/grad_norm": norm}


@torch.no_grad()
def measure(model, reference, tokenizer, pairs: list[Rows], config: Config) -> dict[str, float]:
    """Held-out pairs, and answers to validation problems if there is a level."""
    found = in_parts(pairs, config.microbatch, lambda part: score(model, reference, part, config))
    values = accuracy(found["reward_chosen"], found["reward_rejected"], pairs)
    values = means(found, "eval") | {f"eval/{name}": value for name, value in values.items()}
    return values | (validate(model, tokenizer, config) if config.level != "none" else {})


def show(step: int, steps: int, metrics: dict[str, float]) -> None:
    """One line a measurement, on held-out pairs."""
    names = ("loss", "gap", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
    fields = [(name, f"{metrics[f'eval/{name}']:.3g}") for name in names]
    fields += [(name, f"{metrics[f'eval/{name}']:.1%}") for name in ("accuracy", "pass@1") if f"eval/{name}" in metrics]
    progress_line(step, steps, fields)


def main(config: Config) -> dict[str, float]:
    """Train, save the policy under out/checkpoint; returns the last measurement."""
    seed_everything(config.seed)
    source = checkpoint.latest(config.checkpoint) or config.checkpoint
    model, tokenizer = hf.load(source)
    model, reference = merge(model), merge(hf.load(source)[0]).requires_grad_(False)
    train, held_out = load_pairs(config, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    kept = {"optimizer": optimizer, "reference": reference}
    folder, run = config.out / "checkpoint", open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    path = checkpoint.latest(folder) if config.resume else None
    start, spent = 0, 0.0
    if path:
        model.load_state_dict(hf.load(path)[0].state_dict())
        state = resume(path, config.steps, kept)
        start, spent = state["step"], state["seconds"]
    run.cut_back(start if path else -1)
    began, seen = time.perf_counter() - spent, 0
    if not path:
        run.log(0, measure(model, reference, tokenizer, held_out, config))
    show(0, config.steps, read_metrics(config.out)[0])

    batches = itertools.islice(passes(len(train), config.batch, config.seed), start, config.steps)
    with progress(config.steps, "DPO") as bar:
        bar.advance(start)
        for step, batch in enumerate(batches, start=start + 1):
            factor = warmup_stable_decay(step - 1, config.steps, config.warmup)
            optimizer.param_groups[0]["lr"] = config.lr * factor
            metrics = learn(model, reference, optimizer, [train[i] for i in batch], config, step)
            seen += sum(len(train[i].chosen) + len(train[i].rejected) for i in batch)
            metrics["perf/train_tok_s"] = seen / (time.perf_counter() - began - spent)
            due = step % config.eval_every == 0 or step == config.steps
            if due:
                metrics |= measure(model, reference, tokenizer, held_out, config)
                show(step, config.steps, metrics)
            run.log(step, metrics)
            if due:
                state = {"step": step, "steps": config.steps, "seconds": time.perf_counter() - began}
                state |= {name: part.state_dict() for name, part in kept.items()}
                checkpoint.save(folder, step, lambda path: hf.save(model, tokenizer, path), state)
            bar.advance()

    rows = read_metrics(config.out)
    figures_preference.dpo(rows, config.out / "figures" / "dpo.png")
    result = {}
    for when, row in (("before", rows[0]), ("after", rows[-1])):
        result |= {key.replace("eval/", f"{when}/"): value for key, value in row.items() if key.startswith("eval/")}
    run.result(result | {"seconds/train": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib()})
    run.close()
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))

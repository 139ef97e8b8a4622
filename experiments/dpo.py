"""Direct preference optimisation: a policy from comparisons, without a reward model and without sampling.

    python -m experiments.dpo --checkpoint runs/base/checkpoint --out runs/dpo

    L(θ)    = -1/N Σ log σ(r(x, y_c) - r(x, y_r))                     (arXiv:2305.18290, equation 7)
    r(x, y) = β log π_θ(y|x) / π_ref(y|x)                              the implicit reward

π_ref is the policy at the start. ε (--label-smoothing) is the probability that a label is wrong. The loss depends only
on the difference of the two rewards: watch `logp_chosen`, which may fall if `logp_rejected` falls faster.

--pairs takes any file that minir1/preference_data.py reads: plain lines (those of preference_pairs.py), HH-RLHF's,
UltraFeedback's; with the last two use --task None. With a task the policy also answers its validation problems, judged
by the task's verifier. All weights are trained; the selection bias of experts stays as it is.
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
from minir1 import checkpoint, cli, policy, tasks, templates
from minir1.data import passes
from minir1.device import peak_memory_gib, pick, pick_dtype
from minir1.judge import sample_answers, summary
from minir1.log import open_run, progress_line, read_metrics, steps
from minir1.model import hf
from minir1.model.shards import gathered, shard
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients, warmup_stable_decay
from minir1.policy import frozen_copy, load_policy
from minir1.preference import dpo, implicit_reward
from minir1.preference_data import Rows, accuracy, in_parts, load, padded
from minir1.seed import seed_everything
from minir1.settings import above, at_least, same_steps, zero_or_at_least
from minir1.templates import TEMPLATES


@dataclass(frozen=True)
class Config:
    """DPO. The defaults are those of docs/preferences.md."""

    checkpoint: Path = Path("runs/base/checkpoint")  # where to start: a Hugging Face folder, or a folder of checkpoints
    pairs: Path = Path("runs/pairs/train.jsonl")
    held_out: Path = Path("runs/pairs/held_out.jsonl")
    max_length: int = 1024  # tokens of prompt and answer; longer pairs are left out
    template: Literal[TEMPLATES] = "chat"  # of the pairs, and of the sampled problems
    steps: int = 90
    batch: int = 32  # N, pairs per step
    learning_rate: float = 1e-4  # AdamW; rises over the warm-up, falls to 0 over the second half
    warmup: int = 10  # steps
    beta: float = 0.1  # β
    label_smoothing: float = 0.0  # ε
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 30  # steps
    task: str | None = "countdown"  # whose problems the policy answers at each evaluation; None: no task
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    eval_split: str = "validation"
    eval_problems: int = 200  # at most
    eval_answers: int = 2  # per problem
    max_completion_length: int = 384  # token budget of such an answer
    temperature: float = 1.0  # of such an answer
    seed: int = 0
    out: Path = Path("runs/dpo")
    resume: bool = False
    microbatch: int = 8192  # most tokens of a forward pass; no result depends on it
    recompute: bool = False  # save memory: compute activations again in the backward pass
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "steps", "batch", "eval_every", "max_length", "microbatch")
        at_least(self, 1, "eval_problems", "eval_answers", "max_completion_length")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: 0 to below 0.5")
        at_least(self, 0, "learning_rate", "warmup", "seed")
        zero_or_at_least(self, 1e-6, "temperature")
        above(self, 0, "beta", "grad_clip")


def score(model: Transformer, reference: Transformer, pairs: list[Rows], config: Config) -> dict[str, Tensor]:
    """Loss, implicit rewards and log-probs of each pair, [N]."""
    tokens, lengths, mask = padded(pairs, model.device)
    logp = model.logprob(tokens, lengths=lengths, mask=mask).sum(1)
    with torch.no_grad():
        ref_logp = reference.logprob(tokens, lengths=lengths, mask=mask).sum(1)
    scores = {"loss": dpo(*logp.chunk(2), *ref_logp.chunk(2), config.beta, config.label_smoothing)}
    for name, values in (("logp", logp), ("reward", implicit_reward(logp, ref_logp, config.beta))):
        scores |= dict(zip((f"{name}_chosen", f"{name}_rejected"), values.chunk(2)))
    return scores


def means(scores: dict[str, Tensor], prefix: str) -> dict[str, float]:
    """Averages over pairs, also of the gap of the rewards and of how often it is positive."""
    gap = scores["reward_chosen"] - scores["reward_rejected"]
    scores = scores | {"gap": gap, "accuracy": (gap > 0).float()}
    return {f"{prefix}/{name}": values.mean().item() for name, values in scores.items()}


def learn(model, reference, optimizer, pairs: list[Rows], config: Config, step: int = 0) -> dict[str, float]:
    """One step on N pairs; returns averages over them."""

    def backward(part: list[Rows], share: float) -> dict[str, Tensor]:
        scores = score(model, reference, part, config)
        (share * scores["loss"].sum() / len(pairs)).backward()
        return scores

    scores = in_parts(pairs, config.microbatch, backward)
    norm = clip_gradients(model, config.grad_clip, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means(scores, "train") | {"train/grad_norm": norm}


@torch.no_grad()
def measure(model, reference, pairs: list[Rows], config: Config) -> dict[str, float]:
    """Losses, rewards and accuracy on held-out pairs."""
    with gathered(model):
        scores = in_parts(pairs, config.microbatch, lambda part, share: score(model, reference, part, config))
    values = accuracy(scores["reward_chosen"], scores["reward_rejected"], pairs)
    return means(scores, "eval") | {f"eval/{name}": value for name, value in values.items()}


def evaluate(model, tokenizer, task: tasks.Task, problems: list[tasks.Problem], config: Config) -> dict[str, float]:
    """The policy's own answers to held-out problems."""
    sampling = {"answers": config.eval_answers, "max_tokens": config.max_completion_length, "seed": config.seed}
    sampling |= {"temperature": config.temperature, "template": config.template}
    grid = sample_answers(model, tokenizer, task, problems, **sampling)
    return {f"eval/{name}": value for name, value in summary(task, problems, grid).items()}


def show(step: int, steps: int, metrics: dict[str, float]) -> None:
    """Print a measurement on held-out pairs in one line."""
    names = ("loss", "gap", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
    fields = [(name, f"{metrics[f'eval/{name}']:.3g}") for name in names]
    fields += [(name, f"{metrics[f'eval/{name}']:.1%}") for name in ("accuracy", "pass@1") if f"eval/{name}" in metrics]
    progress_line(step, steps, fields)


def main(config: Config) -> dict[str, float]:
    """Train; save the policy under out/checkpoint; return the first and the last measurement."""
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    seed_everything(config.seed)
    device = pick(config.device)
    folder = config.out / "checkpoint"
    resumed = checkpoint.resume(folder) if config.resume else None
    task = tasks.load(config.task, config.data, allow_code=config.allow_code) if config.task else None
    problems = tasks.spread(task.problems(config.eval_split), config.eval_problems) if task else []
    dtype = pick_dtype(config.dtype, device)
    start = policy.origin(config.checkpoint, resumed)
    model, tokenizer, _ = load_policy(start, device, dtype, recompute=config.recompute)
    templates.encode(tokenizer, problems, config.template)  # what it has no tokens for is refused before the training
    reference = frozen_copy(model)
    opening = tokenizer, config.max_length, config.template
    train, held_out = (load(path, *opening) for path in (config.pairs, config.held_out))
    shard(device, dtype, model, reference)
    optimizer = adamw(model.parameters(), config.learning_rate)
    parts = {"optimizer": optimizer, "reference": reference}

    def measured() -> dict[str, float]:
        values = measure(model, reference, held_out, config)
        return values | (evaluate(model, tokenizer, task, problems, config) if task else {})

    if resumed:
        state = policy.restore(resumed, model, parts)
        same_steps(config.steps, state["steps"])
    else:
        state = {"step": 0, "seconds": 0.0}
    run.start(state["step"] if resumed else -1)
    start, spent = state["step"], state["seconds"]
    began, tokens = time.perf_counter() - spent, 0
    if not resumed:
        run.log(0, measured())
    show(0, config.steps, read_metrics(config.out)[0])

    batches = itertools.islice(passes(len(train), config.batch, config.seed), start, config.steps)
    for step, batch in zip(steps(start, config.steps, "DPO"), batches):
        factor = warmup_stable_decay(step - 1, config.steps, config.warmup)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        metrics = learn(model, reference, optimizer, [train[i] for i in batch], config, step)
        tokens += sum(len(train[i].chosen) + len(train[i].rejected) for i in batch)
        metrics["perf/train_tok_s"] = tokens / (time.perf_counter() - began - spent)
        due = step % config.eval_every == 0 or step == config.steps
        if due:
            metrics |= measured()
            show(step, config.steps, metrics)
        run.log(step, metrics)
        if due:
            state = {"step": step, "steps": config.steps, "seconds": time.perf_counter() - began}
            state |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(folder, step, lambda path: hf.save(model, tokenizer, path), state)

    rows = read_metrics(config.out)
    preference_figures.dpo(rows, config.out / "figures" / "dpo.png")
    result = {}
    for when, row in (("before", rows[0]), ("after", rows[-1])):
        result |= {key.replace("eval/", f"{when}/"): value for key, value in row.items() if key.startswith("eval/")}
    run.result(result | {"seconds/train": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib(device)})
    run.close()
    return result


if __name__ == "__main__":
    cli.run(main, Config, on_ranks=True)

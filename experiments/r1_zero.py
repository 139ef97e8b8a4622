"""R1-Zero: reinforcement learning with rule rewards alone, from the base, by GRPO (DeepSeek-R1, section 2.2).

    python experiments/r1_zero.py --checkpoint runs/base/checkpoint --out runs/r1-zero

    J(θ) = E_q,{o_i}~π_old  1/G Σ_i 1/|o_i| Σ_t [ min(r_it A_i, clip(r_it, 1-ε, 1+ε) A_i) - β k3_it ]
    A_i  = (R_i - mean R) / (std R + 1e-6)         R_i = accuracy + 0.1·form
    r_it = π_θ(o_it | q, o_i<t) / π_old(…)         k3 = π_ref/π_θ - log(π_ref/π_θ) - 1

This is DeepSeekMath's token form (arXiv:2402.03300, equation 3). R1's paper writes one ratio a whole answer,
r_i = π_θ(o_i | q) / π_old(o_i | q), clips that, and has no 1/|o_i|; at r = 1 its gradient is this one with every token
of the batch weighted 1/G. `--reduction` chooses the weights: per_answer (1/G·1/|o_i|), token (DAPO), fixed (Dr. GRPO).

Departures from R1: the paper weighs accuracy and form equally; here form is worth a tenth, since at equal weights a
tidy wrong answer is worth as much as the step from wrong to right, and form is learned in a few steps anyway. Answers
that the budget cuts are rewarded as judged (--mask-truncated leaves them out of the loss). The learning rate is a
hundred times R1's: the model has a million parameters.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from minir1 import checkpoint
from minir1.advantages import group_advantages
from minir1.data import by_tokens
from minir1.evaluate import NO_THINK, Answer, habits, judge_rollout, sample_answers, summary
from minir1.log import open_run, peak_memory_gib, progress, progress_line, read_metrics
from minir1.losses import clipped_surrogate, is_clipped, kl_k3
from minir1.model import hf
from minir1.model.lora import adapters, adapters_off, add_adapters, merge, save_adapters
from minir1.model.transformer import Transformer
from minir1.optim import clip_gradients
from minir1.rollout import BUDGET, Rollout, collect
from minir1.seed import seed_everything
from minir1.tasks import Problem, countdown
from minir1.tokenizer import Tokenizer
from minir1.weights import fixed_length, per_answer_mean, token_mean


@dataclass(frozen=True)
class Config:
    """R1-Zero. The defaults are those of the ten-minute demonstration."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base: a Hugging Face folder, or a folder of checkpoints
    level: str = "default"  # of Countdown: default | wide | four
    steps: int = 40
    prompts: int = 32  # P, problems a step
    answers: int = 8  # G, answers a problem
    max_tokens: int = 384  # budget of an answer
    temperature: float = 1.0
    lr: float = 3e-4  # AdamW
    warmup: int = 5  # steps
    clip_low: float = 0.2  # ε
    clip_high: float = 0.2  # ε
    kl: float = 0.001  # β
    refresh: int = 0  # the policy becomes the reference every so many steps; 0: never
    lora_rank: int = 0  # r: train adapters only, and without them the model is the reference; 0: train all weights
    lora_alpha: float = 32.0  # α
    minibatches: int = 2  # optimizer steps a rollout
    epochs: int = 1  # passes over a rollout
    reduction: Literal["per_answer", "token", "fixed"] = "per_answer"
    accuracy_weight: float = 1.0
    form_weight: float = 0.1
    mask_truncated: bool = False  # answers that the budget cut take no part in the loss
    no_think: bool = False  # the control: every answer begins with an empty thinking
    grad_clip: float = 1.0
    max_ratio_deviation: float = 0.5  # of any first ratio from 1, and a fiftieth of it in the mean; else the run stops
    min_mixed: float = 0.05  # fewest groups with right and wrong answers to start from
    eval_every: int = 10  # steps
    eval_answers: int = 2  # a validation problem
    seed: int = 0
    out: Path = Path("runs/r1-zero")
    resume: bool = False
    microbatch: int = 8192  # most tokens of one forward pass; no result depends on it
    wandb: str = "off"

    @property
    def forced(self) -> str:
        """What every answer is made to begin with."""
        return NO_THINK if self.no_think else ""

    def __post_init__(self):
        for name in ("steps", "prompts", "minibatches", "epochs", "eval_every", "eval_answers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1")
        if self.answers < 2 or self.temperature <= 0:
            raise ValueError(f"answers = {self.answers} (a group needs 2), temperature = {self.temperature} (above 0)")
        if self.prompts % self.minibatches:
            raise ValueError(f"minibatches = {self.minibatches} must divide prompts = {self.prompts}")
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise ValueError(f"lora_rank = {self.lora_rank} (0 or more), lora_alpha = {self.lora_alpha} (above 0)")
        if self.lora_rank and self.refresh:
            raise ValueError("refresh: with lora_rank the reference is the model without its adapters, and stays")
        shortest = 4 if self.no_think else 8  # tags, an answer, the end token
        if self.max_tokens < shortest:
            raise ValueError(f"max_tokens = {self.max_tokens}: the tags of an answer alone need {shortest}")


# Act: sample a group of answers to each problem.


def act(model: Transformer, tokenizer: Tokenizer, problems: list[Problem], config: Config, step: int) -> Rollout:
    """P·G rows from the present policy, at the temperature that the loss uses, untruncated."""
    prompts = [tokenizer.encode(tokenizer.chat(p.prompt) + config.forced) for p in problems]
    sampling = {"answers": config.answers, "max_tokens": config.max_tokens, "temperature": config.temperature}
    return collect(model, prompts, stop=tokenizer.eos, seed=config.seed * 1_000_003 + step, **sampling)


# Judge: rules alone.


def judge(answers: list[list[Answer]], config: Config) -> torch.Tensor:
    """rewards fp32 [P, G]"""
    return torch.tensor(
        [[config.accuracy_weight * a.right + config.form_weight * a.form for a in group] for group in answers]
    )


# Learn: a few steps of the clipped surrogate on what was sampled.


def reduction(mask: torch.Tensor, config: Config, answers: int, tokens: int) -> torch.Tensor:
    """Weights of the loss, fp32 [B, T]; answers and tokens count those of the whole mini-batch."""
    if config.reduction == "per_answer":
        return per_answer_mean(mask, answers)
    return token_mean(mask, tokens) if config.reduction == "token" else fixed_length(mask, config.max_tokens, answers)


def learn(
    model, reference, optimizer, rollout: Rollout, advantage: torch.Tensor, config: Config, step: int = 0
) -> dict[str, float]:
    """Update the policy on B = P·G rows; advantage: fp32 [B]. Returns what was measured, averaged as the loss is."""
    averaged, first = ("clip_fraction", "grad_norm"), ("ratio_deviation", "ratio_deviation_max")
    averaged += ("kl",) if config.kl else ()  # without the term it is not measured
    measured: dict[str, float] = {f"train/{name}": 0.0 for name in averaged + first}
    trained = rollout.mask & (rollout.stop != BUDGET).unsqueeze(1) if config.mask_truncated else rollout.mask
    updates = config.epochs * config.minibatches
    for update in range(updates):
        part = torch.arange(len(advantage)).chunk(config.minibatches)[update % config.minibatches]
        answers, tokens = int(trained[part].any(1).sum()), int(trained[part].sum())
        if answers == 0:  # every answer was cut and masked
            continue
        for rows in by_tokens(rollout.length[part].tolist(), config.microbatch):
            batch = rollout.select(part[rows])
            mask = trained[part[rows], : batch.tokens.shape[1]]
            weight = reduction(mask, config, answers, tokens)
            seen = {"lengths": batch.length, "mask": mask, "temperature": rollout.temperature}
            logp = model.logprob(batch.tokens, **seen)
            A = advantage[part[rows]].unsqueeze(1).expand_as(logp)
            loss = clipped_surrogate(logp, batch.logp, A, config.clip_low, config.clip_high)
            if config.kl:
                with torch.no_grad(), adapters_off(reference):
                    ref_logp = reference.logprob(batch.tokens, **seen)
                kl = kl_k3(logp, ref_logp)
                loss = loss + config.kl * kl
                measured["train/kl"] += (weight * kl).sum().item() / updates
            (weight * loss).sum().backward()
            clipped = is_clipped(logp, batch.logp, A, config.clip_low, config.clip_high)
            measured["train/clip_fraction"] += (weight * clipped).sum().item() / updates
            if update == 0:
                deviation = ((logp.detach() - batch.logp).exp() - 1).abs() * mask
                measured["train/ratio_deviation"] += deviation.sum().item() / tokens
                worst = max(measured["train/ratio_deviation_max"], deviation.max().item())
                measured["train/ratio_deviation_max"] = worst
        worst, mean = measured["train/ratio_deviation_max"], measured["train/ratio_deviation"]
        if max(worst, 50 * mean) > config.max_ratio_deviation:
            raise RuntimeError(
                f"step {step}: the first ratios are off 1 by up to {worst:.3g}, {mean:.3g} in the mean: "
                "sampler and trainer do not compute the same policy"
            )
        measured["train/grad_norm"] += clip_gradients(model, config.grad_clip, step) / updates
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return measured


# Report.


def report(problems, rollout: Rollout, answers: list[list[Answer]], rewards: torch.Tensor) -> dict[str, float]:
    """What the sampled answers were like."""
    flat = [a for group in answers for a in group]
    mean = {
        "train/reward": rewards.mean().item(),
        "train/accuracy": sum(a.right for a in flat) / len(flat),
        "train/form": sum(a.form for a in flat) / len(flat),
        "train/length": sum(a.tokens for a in flat) / len(flat),
        "train/truncated": sum(a.truncated for a in flat) / len(flat),
        "train/entropy": (rollout.entropy.sum() / rollout.mask.sum()).item(),
        "train/mixed_groups": (rewards != rewards[:, :1]).any(1).float().mean().item(),
    }
    return mean | {f"train/{name}": value for name, value in habits(problems, answers, countdown.behaviour).items()}


def validate(model: Transformer, tokenizer: Tokenizer, config: Config) -> dict[str, float]:
    """The policy on the validation split, at the temperature of training."""
    problems = countdown.held_out(config.level, "validation", 200)
    sampling = {"answers": config.eval_answers, "max_tokens": config.max_tokens, "temperature": config.temperature}
    sampling |= {"seed": config.seed, "forced": config.forced}
    grid = sample_answers(model, tokenizer, problems, countdown.verify, **sampling)
    return {f"eval/{name}": value for name, value in summary(problems, grid, countdown.behaviour).items()}


def preflight(model: Transformer, tokenizer: Tokenizer, problems: list[Problem], config: Config) -> dict[str, float]:
    """Is there anything to learn from? ValueError, with advice, if almost no group holds right and wrong answers."""
    part = random.Random(config.seed).sample(problems, min(64, len(problems)))
    rollout = act(model, tokenizer, part, config, step=0)
    answers = judge_rollout(rollout, tokenizer, part, countdown.verify, config.forced)
    right = torch.tensor([[a.right for a in group] for group in answers]).float()
    mixed = ((right.mean(1) > 0) & (right.mean(1) < 1)).float().mean().item()
    G = config.answers
    found = {"preflight/pass@1": right.mean().item(), f"preflight/pass@{G}": right.amax(1).mean().item()}
    found["preflight/mixed_groups"] = mixed
    print("preflight: " + "  ".join(f"{name.split('/')[1]} {value:.1%}" for name, value in found.items()))
    if mixed < config.min_mixed:
        raise ValueError(
            f"only {mixed:.1%} of the groups hold both right and wrong answers, so there is no signal: start from a "
            f"better base or an easier --level (pass@1 is {right.mean():.1%}), or raise --answers or --temperature"
        )
    return found


def main(config: Config) -> dict[str, float]:
    """Train, keep the latest and the best checkpoint under out/checkpoint; returns the last validation."""
    seed_everything(config.seed)
    problems = [p for p in countdown.problems(config.level) if countdown.split(p) == "train"]
    source = checkpoint.latest(config.checkpoint) or config.checkpoint
    model, tokenizer = hf.load(source)
    if config.lora_rank and adapters(model):
        raise ValueError(f"checkpoint = {source} is made of adapters: merge and save them first, or lora_rank = 0")
    merge(model)
    folder = config.out / "checkpoint"
    fresh = not (config.resume and checkpoint.latest(folder))
    if fresh:  # before the folder is opened: a refusal leaves nothing behind
        found = preflight(model, tokenizer, problems, config)
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    if config.lora_rank:
        reference, trained = model, add_adapters(model, config.lora_rank, config.lora_alpha)
    else:
        reference, trained = merge(hf.load(source)[0]).requires_grad_(False), list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start, best, spent = (0, -1.0, 0.0) if fresh else resume(folder, model, reference, optimizer)
    run.cut_back(start if start else -1)
    began = time.perf_counter() - spent
    if fresh:
        found |= validate(model, tokenizer, config)
        run.log(0, found)
        print(f"before: validation pass@1 {found['eval/pass@1']:.1%}")

    with progress(config.steps, "R1-Zero") as bar:
        bar.advance(start)
        for step in range(start + 1, config.steps + 1):
            clock = [time.perf_counter()]
            chosen = random.Random(f"problems {config.seed} {step}").sample(problems, config.prompts)
            rollout = act(model, tokenizer, chosen, config, step)
            clock.append(time.perf_counter())
            answers = judge_rollout(rollout, tokenizer, chosen, countdown.verify, config.forced)
            rewards = judge(answers, config)
            advantage = group_advantages(rewards).flatten()
            clock.append(time.perf_counter())
            optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / max(1, config.warmup))
            measured = learn(model, reference, optimizer, rollout, advantage, config, step)
            clock.append(time.perf_counter())
            if config.refresh and step % config.refresh == 0:
                reference.load_state_dict(model.state_dict())

            metrics = report(chosen, rollout, answers, rewards) | measured | timing(rollout, clock)
            is_best = False
            if step % config.eval_every == 0 or step == config.steps:
                metrics |= validate(model, tokenizer, config)
                is_best, best = metrics["eval/pass@1"] > best, max(best, metrics["eval/pass@1"])
            run.log(step, metrics)
            show(step, config.steps, metrics)
            bar.advance()
            if "eval/pass@1" in metrics:
                shown = [(p.prompt, group[0]) for p, group in zip(chosen[:8], answers)]
                run.samples(step, [{"problem": prompt, "text": a.text, "right": a.right} for prompt, a in shown])
                state = {"step": step, "best": best, "seconds": time.perf_counter() - began}
                state |= {} if config.lora_rank else {"reference": reference.state_dict()}
                state["optimizer"] = optimizer.state_dict()
                checkpoint.save(folder, step, lambda path: save(model, tokenizer, path, source), state, best=is_best)
    run.result({"seconds/rl": time.perf_counter() - began, "memory/peak_gib": peak_memory_gib()})
    run.close()
    return [row for row in read_metrics(config.out) if "eval/pass@1" in row][-1]


def timing(rollout: Rollout, clock: list[float]) -> dict[str, float]:
    """Seconds of acting, judging and learning, and tokens a second."""
    act_s, judge_s, learn_s = (b - a for a, b in zip(clock, clock[1:]))
    return {
        "time/rollout_s": act_s,
        "time/judge_s": judge_s,
        "time/update_s": learn_s,
        "perf/rollout_tok_s": int(rollout.mask.sum()) / act_s,
        "perf/update_tok_s": int(rollout.length.sum()) / learn_s,
    }


def show(step: int, steps: int, metrics: dict[str, float]) -> None:
    """One line a step. The loss is not among them: in GRPO it is near zero by construction."""
    names = ("reward", "accuracy", "form", "length", "tries", "said_yes", "false_yes", "entropy", "kl")
    fields = [(name, f"{metrics[f'train/{name}']:.3g}") for name in names if f"train/{name}" in metrics]
    fields += [("clip", f"{metrics['train/clip_fraction']:.1%}"), ("mixed", f"{metrics['train/mixed_groups']:.0%}")]
    fields += [("grad", f"{metrics['train/grad_norm']:.2f}"), ("ratio", f"{metrics['train/ratio_deviation_max']:.0e}")]
    fields += [("tok/s", f"{metrics['perf/rollout_tok_s']:,.0f}|{metrics['perf/update_tok_s']:,.0f}")]
    if "eval/pass@1" in metrics:
        fields.append(("validation", f"{metrics['eval/pass@1']:.1%}"))
    progress_line(step, steps, fields)
    for alarm in alarms(metrics):
        print(f"warning, step {step}: {alarm}")


def alarms(metrics: dict[str, float]) -> list[str]:
    """Signs of a collapse, in words; the best checkpoint is kept in any case."""
    found = []
    if metrics["train/entropy"] < 1e-3:
        found.append("the entropy is gone: every answer is nearly certain; lower --lr or raise --kl")
    if metrics["train/entropy"] > 2.0:
        found.append("the entropy runs away: the answers are nearly noise; lower --lr or raise --kl")
    if metrics["train/truncated"] > 0.5:
        found.append("the budget cuts more than half of the answers: raise --max-tokens or see what repeats")
    return found


def save(model: Transformer, tokenizer: Tokenizer, path: Path, base: Path) -> None:
    """The whole model, or its adapters alone: hf.load opens both."""
    save_adapters(model, path, base.resolve()) if adapters(model) else hf.save(model, tokenizer, path)


def resume(folder: Path, model, reference, optimizer) -> tuple[int, float, float]:
    """Put the latest checkpoint into place; returns its step, the best validation so far and the seconds spent."""
    path = checkpoint.latest(folder)
    model.load_state_dict(hf.load(path)[0].state_dict())
    state = checkpoint.load_state(path)
    optimizer.load_state_dict(state["optimizer"])
    if "reference" in state:
        reference.load_state_dict(state["reference"])
    return state["step"], state["best"], state["seconds"]


if __name__ == "__main__":
    main(tyro.cli(Config))

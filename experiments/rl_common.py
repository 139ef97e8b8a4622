"""What a script of reinforcement learning on Countdown does beside its algorithm: draw, sample, watch, keep.

Each function takes the script's own `Config` and reads the fields that all of them have: checkpoint, level, steps,
prompts, answers, max_tokens, temperature, minibatches, eval_every, eval_answers, min_mixed, max_ratio_deviation,
forced, seed, out, resume, wandb. Nothing here knows an objective.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from minir1 import checkpoint
from minir1.data import by_tokens
from minir1.judge import Answer, habits, judge_rollout, sample_answers, summary
from minir1.log import Run, open_run, peak_memory_gib, progress, progress_line, read_metrics
from minir1.model import hf
from minir1.model.lora import adapters, merge, save_adapters
from minir1.model.moe import Routing, rerouted, routes_of
from minir1.model.transformer import Transformer
from minir1.rollout import Rollout, collect
from minir1.tasks import Problem, countdown
from minir1.tokenizer import Tokenizer


def check(config) -> None:
    """ValueError for settings with which no script can run, naming the field, its value and what is allowed."""
    for name in ("steps", "prompts", "answers", "minibatches", "epochs", "eval_every", "eval_answers"):
        if getattr(config, name, 1) < 1:
            raise ValueError(f"{name} = {getattr(config, name)}: at least 1")
    if config.temperature <= 0:
        raise ValueError(f"temperature = {config.temperature}: above 0")
    for name in ("clip_low", "clip_high"):
        if getattr(config, name, 0) < 0:
            raise ValueError(f"{name} = {getattr(config, name)}: 0 or more")
    if config.prompts % config.minibatches:
        raise ValueError(f"minibatches = {config.minibatches} must divide prompts = {config.prompts}")
    shortest = 4 if config.forced else 8  # tags, an answer, the end token
    if config.max_tokens < shortest:
        raise ValueError(f"max_tokens = {config.max_tokens}: the tags of an answer alone need {shortest}")


# ---- act ---------------------------------------------------------------------------------------


def load_policy(config) -> tuple[Transformer, Tokenizer, Path]:
    """The policy to start from, adapters merged into it, its tokenizer, and the folder both came from."""
    source = checkpoint.latest(config.checkpoint) or config.checkpoint
    model, tokenizer = hf.load(source)
    if getattr(config, "lora_rank", 0) and adapters(model):
        raise ValueError(f"checkpoint = {source} is made of adapters: merge and save them first, or lora_rank = 0")
    return merge(model), tokenizer, source


@lru_cache
def training_problems(level: str) -> tuple[Problem, ...]:
    """The training split of the level."""
    return tuple(p for p in countdown.problems(level) if countdown.split(p) == "train")


def draw(config, step: int) -> list[Problem]:
    """The P problems of a step, a function of (seed, step)."""
    return random.Random(f"problems {config.seed} {step}").sample(training_problems(config.level), config.prompts)


def act(model: Transformer, tokenizer: Tokenizer, problems: list[Problem], config, step: int, **more) -> Rollout:
    """P·G rows from the present policy, at the temperature that the loss uses, untruncated. more: for `collect`."""
    prompts = [tokenizer.encode(tokenizer.chat(p.prompt) + config.forced) for p in problems]
    sampling = {"answers": config.answers, "max_tokens": config.max_tokens, "temperature": config.temperature} | more
    return collect(model, prompts, stop=tokenizer.eos, seed=config.seed * 1_000_003 + step, **sampling)


@torch.no_grad()
def logprobs(model: Transformer, rollout: Rollout, microbatch: int, replay: bool = False) -> Tensor:
    """log π(x_t | x_<t) of the answers under another model, at the sampler's temperature: fp32 [B, T]; no gradient.

    replay: each token goes to the experts that the sampler chose.
    """
    found = torch.zeros_like(rollout.logp)
    for rows in by_tokens(rollout.length.tolist(), microbatch):
        batch = rollout.select(torch.tensor(rows))
        seen = {"lengths": batch.length, "mask": batch.mask, "temperature": rollout.temperature}
        given = batch.routes if replay else None
        found[rows, : batch.tokens.shape[1]] = model.logprob(batch.tokens, **seen, routes=given)
    return found


# ---- watch -------------------------------------------------------------------------------------


class Clock:
    """Seconds by what they went into: `lap(name)` adds those since the last lap."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap went into `name`: rollout, judge or update."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def speeds(self, rollout: Rollout) -> dict[str, float]:
        """The laps, and tokens a second of the rollout (sampled ones) and of the update (all of the rows)."""
        tokens = {"rollout": int(rollout.mask.sum()), "update": int(rollout.length.sum())}
        found = {f"time/{name}_s": spent for name, spent in self.seconds.items()}
        return found | {f"perf/{name}_tok_s": n / self.seconds[name] for name, n in tokens.items()}


def report(problems, rollout: Rollout, answers: list[list[Answer]], rewards: Tensor) -> dict[str, float]:
    """What the sampled answers were like. rewards: [P, G]."""
    flat = [a for group in answers for a in group]
    mean = {
        "train/reward": rewards.mean().item(),
        "train/accuracy": sum(a.right for a in flat) / len(flat),
        "train/form": sum(a.form for a in flat) / len(flat),
        "train/length": sum(a.tokens for a in flat) / len(flat),
        "train/truncated": sum(a.truncated for a in flat) / len(flat),
        "train/entropy": (rollout.entropy.sum() / rollout.mask.sum()).item(),
        "train/mixed_groups": (rewards != rewards[:, :1]).any(1).float().mean().item(),
        "train/sampled_tokens": int(rollout.mask.sum()),
    }
    return mean | {f"train/{name}": value for name, value in habits(problems, answers, countdown.behaviour).items()}


def ratio_deviation(logp: Tensor, old_logp: Tensor, mask: Tensor) -> tuple[float, float]:
    """The sum and the largest of |r_t - 1| over the trained tokens, before the first step on a rollout. All [B, T].

    Both are 0, but for rounding, where sampler and trainer compute the same policy.
    """
    deviation = ((logp.detach() - old_logp).exp() - 1).abs() * mask
    return deviation.sum().item(), deviation.max().item()


def rerouting(batch: Rollout, record: list[Routing], mask: Tensor) -> float:
    """The sum over the trained tokens of the share of MoE layers that sent them to other experts than the sampler did.

    record: by `logprob` of the batch; mask: bool [B, T]. The last token of an answer has no route, and adds 0.
    """
    real = torch.arange(batch.tokens.shape[1], device=batch.length.device) < batch.length.unsqueeze(1)
    changed = rerouted(batch.routes[real], routes_of(record))
    return (changed.float().mean(1) * mask[real]).sum().item()


def refuse_mismatch(measured: dict[str, float], config, step: int) -> None:
    """RuntimeError if the first ratios of a step are off 1: no objective is right about another policy's samples."""
    worst, mean = measured["train/ratio_deviation_max"], measured["train/ratio_deviation"]
    if max(worst, 50 * mean) > config.max_ratio_deviation:
        raise RuntimeError(
            f"step {step}: the first ratios are off 1 by up to {worst:.3g}, {mean:.3g} in the mean: "
            "sampler and trainer do not compute the same policy"
        )


def show(step: int, steps: int, metrics: dict[str, float]) -> None:
    """One line a step. The loss is not among them: in GRPO it is near zero by construction."""
    names = ("reward", "accuracy", "form", "length", "tries", "said_yes", "false_yes", "entropy", "kl")
    names += ("explained_variance", "rounds")
    fields = [(name, f"{metrics[f'train/{name}']:.3g}") for name in names if f"train/{name}" in metrics]
    if "train/clip_fraction" in metrics:
        fields += [("clip", f"{metrics['train/clip_fraction']:.1%}")]
    fields += [("mixed", f"{metrics['train/mixed_groups']:.0%}"), ("grad", f"{metrics['train/grad_norm']:.2f}")]
    fields += [("ratio", f"{metrics['train/ratio_deviation_max']:.0e}")]
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


def validate(model: Transformer, tokenizer: Tokenizer, config) -> dict[str, float]:
    """The policy on the validation split, at the temperature of training."""
    problems = countdown.held_out(config.level, "validation", 200)
    sampling = {"answers": config.eval_answers, "max_tokens": config.max_tokens, "temperature": config.temperature}
    sampling |= {"seed": config.seed, "forced": config.forced}
    grid = sample_answers(model, tokenizer, problems, countdown.verify, **sampling)
    return {f"eval/{name}": value for name, value in summary(problems, grid, countdown.behaviour).items()}


def preflight(model: Transformer, tokenizer: Tokenizer, config) -> dict[str, float]:
    """Is there anything to learn from? ValueError, with advice, if almost no group holds right and wrong answers."""
    problems = training_problems(config.level)
    part = random.Random(config.seed).sample(problems, min(64, len(problems)))
    rollout = act(model, tokenizer, part, config, step=0)
    answers = judge_rollout(rollout, tokenizer, part, countdown.verify, config.forced)
    right = torch.tensor([[a.right for a in group] for group in answers]).float()
    share = right.mean(1) if config.answers > 1 else right.mean(0)  # answers of no group are compared with all
    mixed = ((share > 0) & (share < 1)).float().mean().item()
    found = {"preflight/pass@1": right.mean().item(), f"preflight/pass@{config.answers}": right.amax(1).mean().item()}
    found["preflight/mixed_groups"] = mixed
    print("preflight: " + "  ".join(f"{name.split('/')[1]} {value:.1%}" for name, value in found.items()))
    if mixed < config.min_mixed:
        raise ValueError(
            f"only {mixed:.1%} of the groups hold both right and wrong answers, so there is no signal: start from a "
            f"better base or an easier --level (pass@1 is {right.mean():.1%}), or raise --answers or --temperature"
        )
    return found


# ---- keep --------------------------------------------------------------------------------------


class Session:
    """An open run of one policy: its folder, its checkpoints, and where it goes on.

    kept: what a checkpoint holds beside the policy, by name: optimizers, the reference, a critic; anything with
    `state_dict` and `load_state_dict`.
    """

    def __init__(self, config, model: Transformer, tokenizer: Tokenizer, source: Path, kept: dict):
        self.config, self.model, self.tokenizer, self.source, self.kept = config, model, tokenizer, source, kept
        self.folder = config.out / "checkpoint"
        path = checkpoint.latest(self.folder) if config.resume else None
        # Before the folder is opened, so that a refusal leaves nothing behind.
        found = {} if path else preflight(model, tokenizer, config)
        self.run: Run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
        self.start, self.best, spent = self.resume(path) if path else (0, -1.0, 0.0)
        self.run.cut_back(self.start if path else -1)
        self.began = time.perf_counter() - spent
        if not path:
            found |= validate(model, tokenizer, config)
            self.run.log(0, found)
            print(f"before: validation pass@1 {found['eval/pass@1']:.1%}")

    def resume(self, path: Path) -> tuple[int, float, float]:
        """Put a checkpoint into place; returns its step, the best validation so far and the seconds spent."""
        self.model.load_state_dict(hf.load(path)[0].state_dict())
        state = checkpoint.load_state(path)
        for name, part in self.kept.items():
            part.load_state_dict(state[name])
        return state["step"], state["best"], state["seconds"]

    def steps(self, description: str) -> Iterator[int]:
        """The steps that are left, under a progress bar."""
        with progress(self.config.steps, description) as bar:
            bar.advance(self.start)
            for step in range(self.start + 1, self.config.steps + 1):
                yield step
                bar.advance()

    def remember(self, step: int, metrics: dict[str, float], problems, answers: list[list[Answer]]) -> None:
        """Log and show a step; every `eval_every` of them, and at the end, validate, keep samples and a checkpoint."""
        due = step % self.config.eval_every == 0 or step == self.config.steps
        if due:
            metrics = metrics | validate(self.model, self.tokenizer, self.config)
        self.run.log(step, metrics)
        show(step, self.config.steps, metrics)
        if due:
            shown = [(p.prompt, group[0]) for p, group in zip(problems[:8], answers)]
            self.run.samples(step, [{"problem": prompt, "text": a.text, "right": a.right} for prompt, a in shown])
            is_best, self.best = metrics["eval/pass@1"] > self.best, max(self.best, metrics["eval/pass@1"])
            state = {"step": step, "best": self.best, "seconds": time.perf_counter() - self.began}
            state |= {name: part.state_dict() for name, part in self.kept.items()}
            checkpoint.save(self.folder, step, self.write, state, best=is_best)

    def write(self, path: Path) -> None:
        """The whole model, or its adapters alone: hf.load opens both."""
        if adapters(self.model):
            save_adapters(self.model, path, self.source.resolve())
        else:
            hf.save(self.model, self.tokenizer, path)

    def finish(self) -> dict[str, float]:
        """Close the run; returns the metrics of the last validation."""
        self.run.result({"seconds/rl": time.perf_counter() - self.began, "memory/peak_gib": peak_memory_gib()})
        self.run.close()
        return [row for row in read_metrics(self.config.out) if "eval/pass@1" in row][-1]

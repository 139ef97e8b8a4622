"""GSPO on Countdown: one importance ratio an answer, length-normalised (arXiv:2507.18071, section 4.1).

    python -m experiments.variants.gspo --checkpoint runs/base/checkpoint --out runs/gspo

    J(θ) = E 1/G Σ_i min(s_i A_i, clip(s_i, 1-ε_low, 1+ε_high) A_i)      s_i = (π_θ(o_i | q) / π_old(o_i | q))^{1/|o_i|}

A copy of r1_zero.py. The ratio is the geometric mean of the tokens' ratios, so that a whole answer is clipped or none
of it; it stays nearer to 1, hence the narrow clip of the paper. No KL term.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from experiments.rl_common import (
    Clock,
    Session,
    act,
    check,
    draw,
    load_policy,
    ratio_deviation,
    refuse_mismatch,
    report,
    rerouting,
)
from minir1.advantages import group_advantages
from minir1.data import by_tokens
from minir1.judge import NO_THINK, Answer, judge_rollout
from minir1.losses import gspo, kl_k3
from minir1.model import hf
from minir1.model.lora import adapters_off, add_adapters, merge
from minir1.optim import clip_gradients, follow
from minir1.reduction import per_answer_mean
from minir1.rollout import BUDGET, Rollout
from minir1.seed import seed_everything
from minir1.tasks import countdown


@dataclass(frozen=True)
class Config:
    """GSPO, with the other settings of r1_zero.py."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base: a Hugging Face folder, or a folder of checkpoints
    level: str = "default"  # of Countdown: default | wide | four
    steps: int = 40
    prompts: int = 32  # P, problems a step
    answers: int = 8  # G, answers a problem
    max_tokens: int = 384  # budget of an answer
    temperature: float = 1.0
    lr: float = 3e-4  # AdamW
    warmup: int = 5  # steps
    clip_low: float = 3e-4  # ε
    clip_high: float = 4e-4  # ε
    kl: float = 0.0  # β
    refresh: int = 0  # the policy becomes the reference every so many steps; 0: never
    follow: float = 0.0  # τ, the reference moves by this share towards the policy every step; 0: it stays
    lora_rank: int = 0  # r: train adapters only, and without them the model is the reference; 0: train all weights
    lora_alpha: float = 32.0  # α
    minibatches: int = 2  # optimizer steps a rollout
    epochs: int = 1  # passes over a rollout
    accuracy_weight: float = 1.0
    form_weight: float = 0.1
    mask_truncated: bool = False  # answers that the budget cut take no part in the loss
    replay_routes: bool = False  # the update sends each token to the experts that the sampler chose
    no_think: bool = False  # the control: every answer begins with an empty thinking
    grad_clip: float = 1.0
    max_ratio_deviation: float = 0.5  # of any first ratio from 1, and a fiftieth of it in the mean; else the run stops
    min_mixed: float = 0.05  # fewest groups with right and wrong answers to start from
    eval_every: int = 10  # steps
    eval_answers: int = 2  # a validation problem
    seed: int = 0
    out: Path = Path("runs/gspo")
    resume: bool = False
    microbatch: int = 8192  # most tokens of one forward pass; no result depends on it
    wandb: str = "off"

    @property
    def forced(self) -> str:
        """What every answer is made to begin with."""
        return NO_THINK if self.no_think else ""

    def __post_init__(self):
        check(self)
        if self.answers < 2:
            raise ValueError(f"answers = {self.answers}: a group needs 2")
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise ValueError(f"lora_rank = {self.lora_rank} (0 or more), lora_alpha = {self.lora_alpha} (above 0)")
        if not 0 <= self.follow <= 1:
            raise ValueError(f"follow = {self.follow}: 0 to 1")
        if self.lora_rank and (self.refresh or self.follow):
            raise ValueError("refresh, follow: with lora_rank the reference is the model without adapters, and stays")


def judge(answers: list[list[Answer]], config: Config) -> Tensor:
    """Rules alone: rewards fp32 [P, G]."""
    return torch.tensor(
        [[config.accuracy_weight * a.right + config.form_weight * a.form for a in group] for group in answers]
    )


def whole_is_clipped(logp: Tensor, old_logp: Tensor, A: Tensor, mask: Tensor, config: Config) -> Tensor:
    """Where `gspo` has no gradient: the tokens of the answers whose ratio has left the interval. bool [B, T]."""
    s = ((logp.detach() - old_logp).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
    return ((A > 0) & (s > 1 + config.clip_high)) | ((A < 0) & (s < 1 - config.clip_low))


def learn(model, reference, optimizer, rollout: Rollout, advantage: Tensor, config: Config, step: int = 0):
    """Update the policy on B = P·G rows; advantage: fp32 [B]. Returns what was measured, averaged as the loss is."""
    names = ("clip_fraction", "grad_norm", "ratio_deviation", "ratio_deviation_max")
    measured = {f"train/{name}": 0.0 for name in names + (("kl",) if config.kl else ())}
    if rollout.routes is not None:
        measured["train/route_difference"] = 0.0
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
            weight = per_answer_mean(mask, answers)
            seen = {"lengths": batch.length, "mask": mask, "temperature": rollout.temperature}
            given, record = batch.routes if config.replay_routes else None, []
            logp = model.logprob(batch.tokens, **seen, routes=given, record=record)
            A = advantage[part[rows]].unsqueeze(1).expand_as(logp)
            loss = gspo(logp, batch.logp, A, config.clip_low, config.clip_high, mask)
            if config.kl:
                with torch.no_grad(), adapters_off(reference):
                    ref_logp = reference.logprob(batch.tokens, **seen)
                kl = kl_k3(logp, ref_logp)
                loss = loss + config.kl * kl
                measured["train/kl"] += (weight * kl).sum().item() / updates
            (weight * loss).sum().backward()
            clipped = whole_is_clipped(logp, batch.logp, A, mask, config)
            measured["train/clip_fraction"] += (weight * clipped).sum().item() / updates
            if update == 0:
                total, most = ratio_deviation(logp, batch.logp, mask)
                measured["train/ratio_deviation"] += total / tokens
                measured["train/ratio_deviation_max"] = max(measured["train/ratio_deviation_max"], most)
                if batch.routes is not None:  # the last token of an answer has none
                    measured["train/route_difference"] += rerouting(batch, record, mask) / max(1, tokens - answers)
        refuse_mismatch(measured, config, step)
        measured["train/grad_norm"] += clip_gradients(model, config.grad_clip, step) / updates
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return measured


def main(config: Config) -> dict[str, float]:
    """Train, keep the latest and the best checkpoint under out/checkpoint; returns the last validation."""
    seed_everything(config.seed)
    model, tokenizer, source = load_policy(config)
    mixed = model.config.moe_layers > 0
    if config.replay_routes and not mixed:
        raise ValueError(f"replay_routes: {source} is dense, it has no routes")
    if config.lora_rank:
        reference, trained = model, add_adapters(model, config.lora_rank, config.lora_alpha)
    else:
        reference, trained = merge(hf.load(source)[0]).requires_grad_(False), list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    kept = {"optimizer": optimizer} | ({} if config.lora_rank else {"reference": reference})
    session = Session(config, model, tokenizer, source, kept)

    for step in session.steps("GSPO"):
        clock = Clock()
        problems = draw(config, step)
        rollout = act(model, tokenizer, problems, config, step, record_routes=mixed)
        clock.lap("rollout")

        answers = judge_rollout(rollout, tokenizer, problems, countdown.verify, config.forced)
        rewards = judge(answers, config)
        advantage = group_advantages(rewards).flatten()
        clock.lap("judge")

        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / max(1, config.warmup))
        measured = learn(model, reference, optimizer, rollout, advantage, config, step)
        if config.refresh and step % config.refresh == 0:
            reference.load_state_dict(model.state_dict())
        if config.follow:
            follow(reference, model, config.follow)
        clock.lap("update")

        metrics = report(problems, rollout, answers, rewards) | measured | clock.speeds(rollout)
        session.remember(step, metrics, problems, answers)
    return session.finish()


if __name__ == "__main__":
    main(tyro.cli(Config))

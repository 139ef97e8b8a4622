"""RLOO on Countdown: REINFORCE against the mean of the other answers (arXiv:2402.14740).

    python -m experiments.variants.rloo --checkpoint runs/base/checkpoint --out runs/rloo

    A_i = R_i - 1/(G-1) Σ_{j≠i} R_j          R_i = r_i - β Σ_t log π_θ(o_it | …) / π_ref(o_it | …)

A copy of reinforce.py. The baseline of an answer is the mean reward of the other answers to the same problem: it knows
how hard the problem is, and nothing of the answer itself, so that the gradient is unbiased. The KL penalty is part of
an answer's reward, and the whole answer is one action.
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
    logprobs,
    ratio_deviation,
    refuse_mismatch,
    report,
)
from minir1.advantages import leave_one_out
from minir1.data import by_tokens
from minir1.judge import Answer, judge_rollout
from minir1.losses import entropy_bonus, kl_k3, reinforce
from minir1.model import hf
from minir1.model.lora import merge
from minir1.optim import clip_gradients
from minir1.reduction import fixed_length, token_mean
from minir1.rollout import Rollout
from minir1.seed import seed_everything
from minir1.tasks import countdown


@dataclass(frozen=True)
class Config:
    """RLOO."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base: a Hugging Face folder, or a folder of checkpoints
    level: str = "default"  # of Countdown: default | wide | four
    steps: int = 40
    prompts: int = 32  # P, problems a step
    answers: int = 8  # G, answers a problem
    max_tokens: int = 384  # budget of an answer
    temperature: float = 1.0
    lr: float = 3e-4  # AdamW
    warmup: int = 5  # steps
    kl: float = 0.001  # β, in the reward
    entropy_weight: float = 0.0
    minibatches: int = 1  # optimizer steps a rollout
    accuracy_weight: float = 1.0
    form_weight: float = 0.1
    grad_clip: float = 1.0
    max_ratio_deviation: float = 0.5  # of any first ratio from 1, and a fiftieth of it in the mean; else the run stops
    min_mixed: float = 0.05  # fewest groups with right and wrong answers to start from
    eval_every: int = 10  # steps
    eval_answers: int = 2  # a validation problem
    seed: int = 0
    out: Path = Path("runs/rloo")
    resume: bool = False
    microbatch: int = 8192  # most tokens of one forward pass; no result depends on it
    wandb: str = "off"

    forced = ""  # answers begin with nothing

    def __post_init__(self):
        check(self)
        if self.answers < 2:
            raise ValueError(f"answers = {self.answers}: a group needs 2")


def judge(answers: list[list[Answer]], config: Config) -> Tensor:
    """Rules alone: rewards fp32 [P, G]."""
    return torch.tensor(
        [[config.accuracy_weight * a.right + config.form_weight * a.form for a in group] for group in answers]
    )


def advantages(rewards: Tensor, ref_logp: Tensor, rollout: Rollout, config: Config) -> Tensor:
    """A, [B, T]: what an answer earned, its KL penalty included, above the others of its group."""
    penalty = config.kl * ((rollout.logp - ref_logp) * rollout.mask).sum(1).view_as(rewards)
    return leave_one_out(rewards - penalty).flatten().unsqueeze(1) * rollout.mask


def learn(model, optimizer, rollout: Rollout, advantage: Tensor, config: Config, step: int = 0) -> dict[str, float]:
    """Update the policy on B = P·G rows; advantage: fp32 [B, T]. Returns what was measured."""
    measured = {f"train/{name}": 0.0 for name in ("grad_norm", "ratio_deviation", "ratio_deviation_max")}
    for update, part in enumerate(torch.arange(len(advantage)).chunk(config.minibatches)):
        answers, tokens = len(part), int(rollout.mask[part].sum())
        for rows in by_tokens(rollout.length[part].tolist(), config.microbatch):
            batch = rollout.select(part[rows])
            A = advantage[part[rows], : batch.tokens.shape[1]]
            seen = {"lengths": batch.length, "mask": batch.mask, "temperature": rollout.temperature}
            logp, entropy = model.logprob(batch.tokens, **seen, entropy=True)
            loss = reinforce(logp, A)
            if config.entropy_weight:
                loss = loss + config.entropy_weight * entropy_bonus(entropy)
            (fixed_length(batch.mask, config.max_tokens, answers) * loss).sum().backward()
            if update == 0:
                total, most = ratio_deviation(logp, batch.logp, batch.mask)
                measured["train/ratio_deviation"] += total / tokens
                measured["train/ratio_deviation_max"] = max(measured["train/ratio_deviation_max"], most)
        refuse_mismatch(measured, config, step)
        measured["train/grad_norm"] += clip_gradients(model, config.grad_clip, step) / config.minibatches
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return measured


def main(config: Config) -> dict[str, float]:
    """Train, keep the latest and the best checkpoint under out/checkpoint; returns the last validation."""
    seed_everything(config.seed)
    model, tokenizer, source = load_policy(config)
    reference = merge(hf.load(source)[0]).requires_grad_(False)
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    session = Session(config, model, tokenizer, source, {"optimizer": optimizer})

    for step in session.steps("RLOO"):
        clock = Clock()
        problems = draw(config, step)
        rollout = act(model, tokenizer, problems, config, step)
        clock.lap("rollout")

        answers = judge_rollout(rollout, tokenizer, problems, countdown.verify, config.forced)
        rewards = judge(answers, config)
        clock.lap("judge")

        ref_logp = logprobs(reference, rollout, config.microbatch) if config.kl else rollout.logp
        advantage = advantages(rewards, ref_logp, rollout, config)
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / max(1, config.warmup))
        measured = learn(model, optimizer, rollout, advantage, config, step)
        if config.kl:
            kl = token_mean(rollout.mask, int(rollout.mask.sum())) * kl_k3(rollout.logp, ref_logp)
            measured["train/kl"] = kl.sum().item()
        clock.lap("update")

        metrics = report(problems, rollout, answers, rewards) | measured | clock.speeds(rollout)
        session.remember(step, metrics, problems, answers)
    return session.finish()


if __name__ == "__main__":
    main(tyro.cli(Config))

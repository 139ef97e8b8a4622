"""PPO on Countdown: a critic says what each state is worth (arXiv:1707.06347; for language models arXiv:2203.02155).

    python -m experiments.ppo --checkpoint runs/base/checkpoint --out runs/ppo
    python -m experiments.ppo --checkpoint runs/base/checkpoint --out runs/ppo-trunk --critic trunk --lam 0.95
    python -m experiments.ppo --out runs/ppo-proxy --reward model:runs/reward-model/checkpoint --kl 0.05

    J(θ, φ) = E 1/N Σ_t [ min(r_t A_t, clip(r_t, 1-ε_low, 1+ε_high) A_t) + c_H H_t - c_V ½ (V_φ(s_t) - R_t)² ]
    δ_t = ρ_t + γ V_old(s_{t+1}) - V_old(s_t)        A_t = δ_t + γλ A_{t+1}        R_t = A_t + V_old(s_t)
    ρ_T = reward of the answer, 0 before; less β k1_t a token with --kl-in reward (with `loss`, β k3_t in J instead)

r_t = π_θ(o_t | s_t) / π_old(o_t | s_t), s_t is the prompt and o_<t, N counts the trained tokens of a mini-batch. The
advantages are whitened over the whole batch. With λ = 1 they are A_t = R - V(s_t): the critic is a baseline and adds no
bias, right or wrong. With λ < 1 it also stands in for what has not happened yet.

The critic is a model of its own that starts as the base does, or a head on the policy's trunk: one forward pass, and
c_V says how much of the trunk's gradient is the value's. Both give V = 0 at first; for --value-warmup steps only
the critic learns, the trunk held. These count as steps, and their answers among the sampled tokens. An answer that the
budget cuts ends there: nothing is bootstrapped.

train/explained_variance is of what followed, Σ_l γ^l ρ_{t+l}, for any λ: below 1 the R_t are made of V itself, and a
critic of pure noise would explain them.

With `--reward model:PATH` a learned reward (reward_model.py) scores whole rows [prompt | answer]. What it says is
logged as train/proxy, what the rules say of the same answers as train/gold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

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
from minir1 import checkpoint
from minir1.advantages import at_last_token, discounted_returns, explained_variance, gae, kl_in_reward, whiten
from minir1.data import by_tokens
from minir1.judge import Answer, judge_rollout
from minir1.losses import clipped_surrogate, entropy_bonus, is_clipped, kl_k3, value_loss
from minir1.model import heads, hf
from minir1.model.heads import ScalarModel, ValueHead
from minir1.model.lora import merge
from minir1.model.transformer import Transformer
from minir1.optim import clip_gradients
from minir1.reduction import token_mean
from minir1.rollout import Rollout
from minir1.seed import seed_everything
from minir1.tasks import countdown
from minir1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    """PPO."""

    checkpoint: Path = Path("runs/base/checkpoint")  # the base: a Hugging Face folder, or a folder of checkpoints
    level: str = "default"  # of Countdown: default | wide | four
    steps: int = 40
    prompts: int = 32  # P, problems a step
    answers: int = 8  # G, answers a problem; 1 will do, no group is compared
    max_tokens: int = 384  # budget of an answer
    temperature: float = 1.0
    lr: float = 3e-4  # of the policy, AdamW
    warmup: int = 5  # steps, of the policy's learning rate
    clip_low: float = 0.2  # ε_low
    clip_high: float = 0.2  # ε_high
    dual_clip: float | None = None  # c, bounds the loss where A < 0
    gamma: float = 1.0  # γ, discount a token
    lam: float = 1.0  # λ
    whitening: bool = True  # of the advantages
    critic: Literal["trunk", "own"] = "own"  # a head on the policy's trunk, or a model of its own
    value_lr: float = 1e-3  # of the head, or of the critic of its own; AdamW
    value_weight: float = 0.1  # c_V
    value_clip: float = float("inf")  # ε of the value loss
    value_warmup: int = 2  # steps in which only the critic learns
    kl: float = 0.001  # β
    kl_in: Literal["reward", "loss"] = "reward"
    entropy_weight: float = 0.0  # c_H
    reward: str = "rules"  # rules | model:PATH, the folder of a reward model or of its checkpoints
    minibatches: int = 2
    epochs: int = 1  # passes over a rollout
    accuracy_weight: float = 1.0
    form_weight: float = 0.1
    grad_clip: float = 1.0
    max_ratio_deviation: float = 0.5  # of any first ratio from 1, and a fiftieth of it in the mean; else the run stops
    min_mixed: float = 0.05  # fewest groups with right and wrong answers to start from; all are one group if G = 1
    eval_every: int = 10  # steps
    eval_answers: int = 2  # a validation problem
    seed: int = 0
    out: Path = Path("runs/ppo")
    resume: bool = False
    microbatch: int = 8192  # most tokens of one forward pass; no result depends on it
    wandb: str = "off"

    forced = ""  # answers begin with nothing

    def __post_init__(self):
        check(self)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: 0 to 1")
        if not 0 <= self.value_warmup < self.steps:
            raise ValueError(f"value_warmup = {self.value_warmup}: 0 to {self.steps - 1}, below steps")
        if self.value_clip <= 0:
            raise ValueError(f"value_clip = {self.value_clip}: above 0, inf for none")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip = {self.dual_clip}: above 1, or None")
        kind, _, path = self.reward.partition(":")
        if self.reward != "rules" and (kind != "model" or not path):
            raise ValueError(f"reward = {self.reward!r}: rules, or model:PATH")
        weights = self.accuracy_weight, self.form_weight
        if kind == "model" and weights != (Config.accuracy_weight, Config.form_weight):
            raise ValueError(f"accuracy_weight, form_weight = {weights}: of the rules; {self.reward} has none")


# ---- what an answer and a state are worth -------------------------------------------------------


class Estimate(NamedTuple):
    """What the update is told of each token; fp32 [B, T]."""

    advantage: Tensor  # A
    returns: Tensor  # R
    values: Tensor  # V_old
    ref_logp: Tensor  # log π_ref


def load_reward(config: Config, tokenizer: Tokenizer) -> ScalarModel | None:
    """The learned reward, or None for the rules. ValueError if its tokens are not the policy's."""
    if config.reward == "rules":
        return None
    path = Path(config.reward.partition(":")[2])
    model, theirs = heads.load(checkpoint.latest(path) or path)
    if theirs.backend.to_str() != tokenizer.backend.to_str():
        raise ValueError(f"reward = {config.reward}: its tokenizer is not that of {config.checkpoint}")
    return model.requires_grad_(False)


@torch.no_grad()
def judge(answers: list[list[Answer]], rollout: Rollout, learned: ScalarModel | None, config: Config) -> Tensor:
    """Rewards fp32 [P, G], by the rules or by the learned reward."""
    if learned is None:
        return torch.tensor(
            [[config.accuracy_weight * a.right + config.form_weight * a.form for a in group] for group in answers]
        )
    found = torch.zeros(len(rollout.length))
    for rows in by_tokens(rollout.length.tolist(), config.microbatch):
        batch = rollout.select(torch.tensor(rows))
        found[rows] = learned.score(batch.tokens, lengths=batch.length)
    return found.view(len(answers), -1)


@torch.no_grad()
def state_values(model: Transformer, critic: ValueHead | ScalarModel, rollout: Rollout, microbatch: int) -> Tensor:
    """V(s_t) of the answers' tokens, fp32 [B, T]; no gradient."""
    found = torch.zeros_like(rollout.logp)
    for rows in by_tokens(rollout.length.tolist(), microbatch):
        batch = rollout.select(torch.tensor(rows))
        seen = {"lengths": batch.length, "mask": batch.mask}
        own = isinstance(critic, ScalarModel)
        value = critic.values(batch.tokens, **seen) if own else model.logprob(batch.tokens, **seen, value=critic)[-1]
        found[rows, : batch.tokens.shape[1]] = value
    return found


def earn(rewards: Tensor, ref_logp: Tensor, rollout: Rollout, config: Config) -> Tensor:
    """ρ_t, fp32 [B, T], from rewards [P, G] and log π_ref [B, T]."""
    earned = at_last_token(rewards.flatten(), rollout.mask)
    if config.kl_in == "reward":
        earned = kl_in_reward(earned, rollout.logp, ref_logp, rollout.mask, config.kl)
    return earned


def estimate(earned: Tensor, values: Tensor, ref_logp: Tensor, rollout: Rollout, config: Config) -> Estimate:
    """Advantages and returns, from ρ, V_old and log π_ref, [B, T] each."""
    advantage, returns = gae(earned, values, rollout.mask, config.gamma, config.lam)
    return Estimate(whiten(advantage, rollout.mask) if config.whitening else advantage, returns, values, ref_logp)


# ---- learn --------------------------------------------------------------------------------------


def see(model: Transformer, critic: ValueHead | ScalarModel, batch: Rollout, entropy: bool) -> tuple[Tensor, ...]:
    """log π, the entropy if asked for, and V of the answers' tokens, [B, T] each; from one pass where they share it."""
    seen = {"lengths": batch.length, "mask": batch.mask}
    policy = seen | {"temperature": batch.temperature, "entropy": entropy}
    if isinstance(critic, ValueHead):
        return model.logprob(batch.tokens, **policy, value=critic)
    found = model.logprob(batch.tokens, **policy)
    return (*found, critic.values(batch.tokens, **seen)) if entropy else (found, critic.values(batch.tokens, **seen))


def learn(model, critic, optimizers, rollout: Rollout, told: Estimate, config: Config, step: int = 0):
    """Update policy and critic, each by its optimizer, on B = P·G rows. Returns what was measured.

    A policy whose parameters take no gradient is left as it is. Averages are weighted as the loss is.
    """
    names = ("clip_fraction", "value_loss", "grad_norm", "value_grad_norm", "ratio_deviation", "ratio_deviation_max")
    measured, clip = {f"train/{name}": 0.0 for name in names}, (config.clip_low, config.clip_high, config.dual_clip)
    updates = config.epochs * config.minibatches
    for update in range(updates):
        part = torch.arange(len(rollout.length)).chunk(config.minibatches)[update % config.minibatches]
        tokens = int(rollout.mask[part].sum())
        for rows in by_tokens(rollout.length[part].tolist(), config.microbatch):
            batch = rollout.select(part[rows])
            A, returns, old_values, ref_logp = (x[part[rows], : batch.tokens.shape[1]] for x in told)
            weight = token_mean(batch.mask, tokens)
            logp, *entropy, value = see(model, critic, batch, config.entropy_weight != 0)
            loss = clipped_surrogate(logp, batch.logp, A, *clip)
            if entropy:
                loss = loss + config.entropy_weight * entropy_bonus(entropy[0])
            if config.kl and config.kl_in == "loss":
                loss = loss + config.kl * kl_k3(logp, ref_logp)
            miss = value_loss(value, old_values, returns, config.value_clip)
            (weight * (loss + config.value_weight * miss)).sum().backward()
            measured["train/value_loss"] += (weight * miss).sum().item() / updates
            clipped = is_clipped(logp, batch.logp, A, *clip)
            measured["train/clip_fraction"] += (weight * clipped).sum().item() / updates
            if update == 0:
                total, most = ratio_deviation(logp, batch.logp, batch.mask)
                measured["train/ratio_deviation"] += total / tokens
                measured["train/ratio_deviation_max"] = max(measured["train/ratio_deviation_max"], most)
        refuse_mismatch(measured, config, step)
        measured["train/grad_norm"] += clip_gradients(model, config.grad_clip, step) / updates
        measured["train/value_grad_norm"] += clip_gradients(critic, config.grad_clip, step) / updates
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return measured


def main(config: Config) -> dict[str, float]:
    """Train, keep the latest and the best checkpoint under out/checkpoint; returns the last validation."""
    seed_everything(config.seed)
    model, tokenizer, source = load_policy(config)
    learned = load_reward(config, tokenizer)
    reference, head = merge(hf.load(source)[0]).requires_grad_(False), ValueHead(model.config.dim)
    critic = head if config.critic == "trunk" else ScalarModel(merge(hf.load(source)[0]), head)
    adamw = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(list(model.parameters()), lr=config.lr, **adamw)
    value_optimizer = torch.optim.AdamW(critic.parameters(), lr=config.value_lr, **adamw)
    kept = {"optimizer": optimizer, "critic": critic, "value_optimizer": value_optimizer}
    session = Session(config, model, tokenizer, source, kept)

    for step in session.steps("PPO"):
        clock = Clock()
        problems = draw(config, step)
        rollout = act(model, tokenizer, problems, config, step)
        clock.lap("rollout")

        answers = judge_rollout(rollout, tokenizer, problems, countdown.verify, config.forced)
        rewards = judge(answers, rollout, learned, config)
        clock.lap("judge")

        ref_logp = logprobs(reference, rollout, config.microbatch) if config.kl else rollout.logp
        values = state_values(model, critic, rollout, config.microbatch)
        earned = earn(rewards, ref_logp, rollout, config)
        told = estimate(earned, values, ref_logp, rollout, config)
        model.requires_grad_(step > config.value_warmup)
        factor = min(1.0, (step - config.value_warmup) / max(1, config.warmup))
        optimizer.param_groups[0]["lr"] = config.lr * max(0.0, factor)
        measured = learn(model, critic, (optimizer, value_optimizer), rollout, told, config, step)
        clock.lap("update")

        followed = discounted_returns(earned, rollout.mask, config.gamma)
        measured["train/explained_variance"] = explained_variance(values, followed, rollout.mask)
        if config.kl:
            kl = token_mean(rollout.mask, int(rollout.mask.sum())) * kl_k3(rollout.logp, ref_logp)
            measured["train/kl"] = kl.sum().item()
        metrics = report(problems, rollout, answers, rewards) | measured | clock.speeds(rollout)
        if learned is not None:
            metrics |= {"train/gold": metrics["train/accuracy"], "train/proxy": metrics["train/reward"]}
        session.remember(step, metrics, problems, answers)
    return session.finish()


if __name__ == "__main__":
    main(tyro.cli(Config))

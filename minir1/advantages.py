"""How much better an answer was than expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # at least fp32


def _checked(rewards: Tensor, least: int = 2) -> Tensor:
    if rewards.ndim != 2 or rewards.shape[1] < least or not len(rewards):
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; allowed is [P, G] with P >= 1 and G >= {least}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype}; allowed are floats")
    if not rewards.isfinite().all():
        raise ValueError("rewards holds numbers that are not finite")
    return _upcast(rewards)


# ---- one number per answer ----------------------------------------------------------------------


def batch_centered(rewards: Tensor) -> Tensor:
    """A_i = r_i - b, b the mean reward of the whole batch of N answers, itself included. [P, G] -> [P, G].

    A baseline of REINFORCE (Williams 1992, section 4). Since b contains r_i itself, the expected gradient is
    (N - 1)/N of the true one. Raises ValueError for no answers and for rewards that are not finite.
    """
    rewards = _checked(rewards, least=1)
    return (rewards - rewards.mean()).masked_fill((rewards == rewards[0, 0]).all(), 0.0)


def moving_average(baseline: float | None, rewards: Tensor, decay: float) -> float:
    """The next baseline, b <- λ b + (1 - λ) mean(r); the first is the mean itself.

    Subtract the baseline *before* its update: then it does not depend on the answers, and the gradient is unbiased.
    rewards: any shape; decay: λ in 0 … 1. Raises ValueError for another decay and for rewards that are not finite.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay = {decay}: 0 to 1")
    mean = _upcast(rewards).mean().item()
    if not math.isfinite(mean):
        raise ValueError("rewards is empty or holds numbers that are not finite")
    return mean if baseline is None else decay * baseline + (1 - decay) * mean


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within a group (GRPO, DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    rewards: [P, G]; returns [P, G], at least fp32. std is the sample deviation (divided by G - 1). A group of equal
    rewards gives exactly 0. Raises ValueError for G = 1, for rewards that are not finite and for eps < 0.
    """
    if not eps >= 0:
        raise ValueError(f"eps = {eps}: 0 or more")
    centered = group_centered(rewards)
    scaled = centered / (_upcast(rewards).std(dim=1, keepdim=True) + eps)
    return scaled.masked_fill(centered == 0, 0.0)  # with eps = 0 an equal group would be 0/0


def group_centered(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r) within a group (Dr. GRPO, arXiv:2503.20783, section 3.2). [P, G] -> [P, G]."""
    rewards = _checked(rewards)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # their mean need not round to themselves
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(equal, 0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - 1/(G-1) Σ_{j≠i} r_j, against the mean of the others (RLOO, arXiv:2402.14740). [P, G] -> [P, G].

    The baseline does not depend on answer i, so the gradient is unbiased; equal to G/(G-1)·(r_i - mean(r)).
    """
    return group_centered(rewards) * (rewards.shape[1] / (rewards.shape[1] - 1))


# ---- one number per token -----------------------------------------------------------------------


def _tokens(mask: Tensor, **named: Tensor) -> list[Tensor]:
    """The mask as bool and the tensors that go with it, upcast and checked: all [B, T], finite where trained."""
    for name, x in named.items():
        if x.shape != mask.shape or mask.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, the mask {tuple(mask.shape)}: both [B, T]")
        if not x.masked_select(mask.bool()).isfinite().all():
            raise ValueError(f"{name} of trained tokens holds numbers that are not finite")
    return [mask.bool(), *map(_upcast, named.values())]


def at_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """The reward of an answer, given for its last trained token: r_T = R, 0 before. rewards: [B]; mask, result: [B, T].

    A row without trained tokens gives zeros. Raises ValueError for rewards that are not finite.
    """
    if mask.ndim != 2 or rewards.shape != mask.shape[:1] or not rewards.isfinite().all():
        raise ValueError(f"rewards {tuple(rewards.shape)}, mask {tuple(mask.shape)}: want finite [B] and [B, T]")
    last = mask.bool() & (mask.bool().flip(1).cumsum(1).flip(1) == 1)
    return _upcast(rewards).unsqueeze(1) * last


def kl_in_reward(rewards: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t - β (log π(x_t | x_<t) - log π_ref(x_t | x_<t)): the KL penalty as a per-token reward (InstructGPT,
    arXiv:2203.02155, equation 2; per token as in Ziegler et al. 2019).

    With γ = 1 the expected gradient of the penalty is exactly that of the sequence's KL(π‖π_ref).
    All [B, T]; no gradient; 0 outside the mask. Raises ValueError for β < 0 and for numbers that are not finite.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta = {beta}: 0 or more, and finite")
    mask, rewards, logp, ref_logp = _tokens(mask, rewards=rewards, logp=logp, ref_logp=ref_logp)
    return (rewards - beta * (logp - ref_logp)).detach().masked_fill(~mask, 0.0)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """R_t = Σ_{l>=0} γ^l r_{t+l} = r_t + γ R_{t+1} over the trained tokens of a row (Sutton & Barto, equation 3.8).

    `gae` with values of 0 and λ = 1: the same shapes, dtype and errors.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[1]


def whiten(advantage: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(A - mean) / √(var + eps) over all trained tokens of the batch (REINFORCE++, arXiv:2501.03262).

    advantage, mask: [B, T]; returns [B, T], 0 outside the mask. var is the sample variance; eps outweighs its rounding,
    as in TRL and verl. Equal advantages, or fewer than two, give exactly 0. Call it before the batch is split.
    """
    if not eps >= 0:
        raise ValueError(f"eps = {eps}: 0 or more")
    mask, advantage = _tokens(mask, advantage=advantage)
    chosen = advantage.masked_select(mask)
    if chosen.numel() < 2 or (chosen == chosen[0]).all():
        return torch.zeros_like(advantage)
    return ((advantage - chosen.mean()) / (chosen.var() + eps).sqrt()).masked_fill(~mask, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the trained tokens: 1 for a perfect value, 0 for a constant, negative if worse.

    All [B, T]. 0 by definition if the returns do not vary, or there are none.
    """
    mask, values, returns = _tokens(mask, values=values, returns=returns)
    value, target = (x.masked_select(mask).cpu().double() for x in (values, returns))
    if target.numel() < 2 or (target == target[0]).all():
        return 0.0
    return (1 - (target - value).var() / target.var()).item()


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, equation 16); every row is an episode.

        δ_t = r_t + γ V_{t+1} - V_t        A_t = Σ_l (γλ)^l δ_{t+l} = δ_t + γλ A_{t+1}        R_t = A_t + V_t

    rewards, values: [B, T], r_t for choosing x_t and V_t of the state before it. mask: [B, T], the trained tokens: they
    alone are steps, and t + 1 is the next of them, beyond those of a user or a tool between two turns (as in verl);
    after the last, A and V are 0, nothing is bootstrapped. Returns advantages A and returns R (the targets of the
    value), [B, T], at least fp32, 0 outside the mask, without gradient.
    Raises ValueError for other shapes, γ or λ outside 0 … 1 and numbers of trained tokens that are not finite.
    """
    mask, rewards, values = _tokens(mask, rewards=rewards, values=values)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma = {gamma}, lam = {lam}: both in 0 … 1")
    advantages = torch.zeros_like(rewards + values)
    later = next_value = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = torch.where(mask[:, t], delta + gamma * lam * later, later)
        advantages[:, t], next_value = later, torch.where(mask[:, t], values[:, t], next_value)
    return advantages.masked_fill(~mask, 0.0), (advantages + values).masked_fill(~mask, 0.0)

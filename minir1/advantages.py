"""How much better an answer was than expected."""

from __future__ import annotations

import torch
from torch import Tensor


def _check(rewards: Tensor) -> None:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; a group baseline needs [P, G] with G >= 2")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype}; allowed are floats")
    if not rewards.isfinite().all():
        raise ValueError("rewards holds numbers that are not finite")


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within a group (GRPO, DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    rewards: [P, G]; returns [P, G]. std is the sample deviation (divided by G - 1). A group of equal rewards gives
    exactly 0. Raises ValueError for G = 1 and for rewards that are not finite.
    """
    centered = group_centered(rewards)
    return centered / (rewards.std(dim=1, keepdim=True) + eps)


def group_centered(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r) within a group (Dr. GRPO, arXiv:2503.20783, section 3.2). [P, G] -> [P, G]."""
    _check(rewards)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # their mean need not round to themselves
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(equal, 0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - 1/(G-1) Σ_{j≠i} r_j, against the mean of the others (RLOO, arXiv:2402.14740). [P, G] -> [P, G].

    The baseline does not depend on answer i, so the gradient is unbiased; equal to G/(G-1)·(r_i - mean(r)).
    """
    centered = group_centered(rewards)
    return centered * (rewards.shape[1] / (rewards.shape[1] - 1))


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, equation 16); every row is an episode.

        δ_t = r_t + γ V_{t+1} - V_t        A_t = Σ_l (γλ)^l δ_{t+l} = δ_t + γλ A_{t+1}        R_t = A_t + V_t

    rewards, values: [B, T], r_t for choosing x_t and V_t of the state before it. mask: [B, T], the trained tokens, in
    one piece a row; behind the last of them A and V are 0, nothing is bootstrapped. Returns advantages A and returns R
    (the targets of the value), [B, T], at least fp32, 0 outside the mask, without gradient.
    Raises ValueError for a mask with a hole, for γ or λ outside 0 … 1 and for numbers that are not finite.
    """
    mask = mask.bool()
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    if (starts > 1).any():
        raise ValueError(f"row {int(starts.argmax())} of the mask has a hole: the trained tokens are one piece")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma = {gamma}, lam = {lam}: both in 0 … 1")
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values = (x.to(dtype).masked_fill(~mask, 0.0) for x in (rewards, values))
    if not (rewards.isfinite().all() and values.isfinite().all()):
        raise ValueError("rewards or values of trained tokens are not finite")
    advantages = torch.zeros_like(values)
    later = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = (delta + gamma * lam * later).masked_fill(~mask[:, t], 0.0)
        advantages[:, t], next_value = later, values[:, t]
    return advantages, (advantages + values).masked_fill(~mask, 0.0)

"""Losses a token: functions of tensors [B, T] to minimise, without reduction (see weights.py).

Entry [b, t] speaks of token x_t of row b. r_t = π_θ(x_t | x_<t) / π_old(x_t | x_<t) is the importance ratio, A_t the
advantage. Every function returns fp32 of the shape it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nll(logp: Tensor) -> Tensor:
    """-log π(x_t | x_<t), the loss of supervised training. logp: [B, T]."""
    return -logp.float()


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """-A_t log π(x_t | x_<t) (Williams 1992). logp, advantage: [B, T]; no gradient goes through the advantage."""
    return -advantage.detach() * logp.float()


def clipped_surrogate(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """-min(r_t A_t, clip(r_t, 1 - ε_low, 1 + ε_high) A_t) (PPO, arXiv:1707.06347, equation 7).

    The pessimistic of the two objectives: a gain is cut once the ratio has left the interval in the direction that the
    advantage asks for, a loss never. Two clips as in DAPO (arXiv:2503.14476, section 3.1). All [B, T].
    """
    ratio = (logp.float() - old_logp.detach()).exp()
    advantage = advantage.detach()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def is_clipped(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """bool [B, T]: where clipped_surrogate has no gradient because the ratio has left the interval."""
    ratio = (logp.detach().float() - old_logp).exp()
    return ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log π - log π_ref at the sampled token: unbiased for KL(π‖π_ref) as a number (Schulman 2020, "Approximating KL").

    As a loss its expected gradient is zero (E ∇log π = 0): use it in the reward, or to report.
    """
    return logp.float() - ref_logp.detach()


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log π - log π_ref)² / 2: biased as a number; its expected gradient is that of each step's KL(π‖π_ref)."""
    return 0.5 * (logp.float() - ref_logp.detach()).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """π_ref/π - log(π_ref/π) - 1 >= 0: unbiased as a number, low variance (DeepSeekMath, arXiv:2402.03300, equation 4).

    The estimator of GRPO and R1. As a loss its expected gradient is that of each step's KL(π_ref‖π), not KL(π‖π_ref).
    """
    log_ratio = ref_logp.detach() - logp.float()
    return log_ratio.exp() - log_ratio - 1

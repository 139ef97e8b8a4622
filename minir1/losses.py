"""Per-token losses: functions of tensors [B, T] to minimise, without reduction (see reduction.py).

Entry [b, t] belongs to token x_t of row b. r_t = π_θ(x_t | x_<t) / π_old(x_t | x_<t) is the importance ratio, A_t the
advantage. All tensors of a call must have one shape, else ValueError; the result has it too, in fp32, or fp64 for fp64.
At padding log-probs must be finite, as those of `Transformer.logprob`; `weighted_sum` ignores any other NaN there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 80.0  # exp of 89 overflows in fp32


def _upcast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in at least fp32; ValueError for different shapes."""
    if len({x.shape for x in tensors}) > 1:
        raise ValueError(f"arguments of shapes {[tuple(x.shape) for x in tensors]}: all must have one shape")
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def nll(logp: Tensor) -> Tensor:
    """-log π(x_t | x_<t), the loss of supervised training. logp: [B, T]."""
    return -_upcast(logp)[0]


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """-A_t log π(x_t | x_<t), 0 for A_t = 0 (Williams 1992). Both [B, T]; no gradient goes through the advantage."""
    logp, advantage = _upcast(logp, advantage.detach())
    return (-advantage * logp).masked_fill((advantage == 0) & logp.isinf(), 0.0)


def _check_clips(low: float, high: float, dual: float | None = None) -> None:
    if not (low >= 0 and high >= 0):
        raise ValueError(f"clip_low = {low}, clip_high = {high}: 0 or more, the interval holds the ratio 1")
    if dual is not None and not dual > 1:
        raise ValueError(f"dual_clip = {dual}: above 1, or None")


def _surrogate(log_ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """min(r A, clip(r, 1 - ε_low, 1 + ε_high) A) for r = exp(log_ratio), and with `dual` at least c A where A < 0.

    Where large ratios are bounded, r is clamped before it overflows: its gradient is 0, and 0·∞ would be NaN.
    """
    _check_clips(low, high, dual)
    finite = log_ratio.masked_fill(log_ratio > LARGEST, LARGEST)  # torch's clamp would give a NaN the gradient 0
    ratio = (torch.where(advantage < 0, log_ratio, finite) if dual is None else finite).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return objective if dual is None else torch.where(advantage < 0, objective.maximum(dual * advantage), objective)


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(r_t A_t, clip(r_t, 1 - ε_low, 1 + ε_high) A_t) (PPO, arXiv:1707.06347, equation 7).

    The minimum clips a gain once the ratio has left the interval in the direction of the advantage, and never clips a
    loss in the other direction. Two clips as in DAPO (arXiv:2503.14476, section 3.1). All [B, T].

    dual_clip: c > 1 bounds that loss too: where A_t < 0 the objective is max(min(…), c A_t), so that a ratio beyond c
    has no gradient (Ye et al. 2020, arXiv:1912.09729, "Dual-clip PPO"). None: no bound. Raises ValueError for c <= 1.
    """
    logp, old_logp, A = _upcast(logp, old_logp.detach(), advantage.detach())
    return -_surrogate(logp - old_logp, A, clip_low, clip_high, dual_clip)


def is_clipped(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """bool [B, T]: where clipped_surrogate has no gradient because the ratio has left the interval."""
    _check_clips(clip_low, clip_high, dual_clip)
    logp, old_logp, advantage = _upcast(logp.detach(), old_logp.detach(), advantage)
    ratio = (logp - old_logp).exp()
    low = (ratio < 1 - clip_low) | (ratio > (dual_clip or math.inf))
    return ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & low)


def cispo(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-sg[clip(r_t, 1 - ε_low, 1 + ε_high)] A_t log π(x_t | x_<t) (MiniMax-M1, arXiv:2506.13585, section 3.1).

    The weight is clipped and has no gradient (sg), and no token loses its gradient: REINFORCE with a bounded importance
    weight. The paper sets no lower bound, which is clip_low = 1. All [B, T].
    """
    _check_clips(clip_low, clip_high)
    logp, old_logp, advantage = _upcast(logp, old_logp.detach(), advantage.detach())
    ratio = (logp.detach() - old_logp).exp()
    ratio = ratio.masked_fill((advantage == 0) & ratio.isinf(), 1.0)  # without an upper clip, ∞·0 would be NaN
    return reinforce(logp, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def _whole(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t log r_t of each answer, [B, 1], and the advantage, whose 0·∞ at padding would reach the whole answer."""
    logp, old_logp, advantage, _ = _upcast(logp, old_logp.detach(), advantage.detach(), mask)
    log_ratio = (logp - old_logp).masked_fill(~mask.bool(), 0.0)
    return log_ratio.sum(1, keepdim=True), advantage.masked_fill(~mask.bool() & ~advantage.isfinite(), 0.0)


def gspo(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float, clip_high: float, mask: Tensor) -> Tensor:
    """-min(s_i A_i, clip(s_i, 1 - ε_low, 1 + ε_high) A_i) at each token of answer i (arXiv:2507.18071, section 4.1).

        s_i = (π_θ(y_i | x) / π_old(y_i | x))^{1/|y_i|} = exp(1/|y_i| Σ_t log r_t)

    One ratio for a whole answer: the geometric mean over its trained tokens, the mask [B, T]. With the weights of
    `per_answer_mean` the sum is the paper's objective. All [B, T]; the advantage is one number per answer, repeated.
    s_i stays nearer to 1 than r_t does: the paper clips at 3e-4 and 4e-4.
    """
    total, advantage = _whole(logp, old_logp, advantage, mask)
    return -_surrogate(total / mask.bool().sum(1, keepdim=True).clamp(min=1), advantage, clip_low, clip_high)


def grpo_sequence(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_low: float, clip_high: float, mask: Tensor
) -> Tensor:
    """-min(r_i A_i, clip(r_i, 1 - ε_low, 1 + ε_high) A_i) at each token of answer i: GRPO as R1's paper writes it.

        r_i = π_θ(o_i | q) / π_old(o_i | q) = exp(Σ_t log r_it)                   (arXiv:2501.12948, section 2.2.1)

    Arguments and weights as for `gspo`, which takes the |o_i|-th root of the same ratio: that stays near 1 where this
    one leaves the interval after a small change of a few tokens. The gradient at r = 1 is that of REINFORCE with every
    token of the batch weighted 1/answers: long answers are not discounted.
    """
    return -_surrogate(*_whole(logp, old_logp, advantage, mask), clip_low, clip_high)


def truncated_importance(old_logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """min(π_old / π_sampler, C) per token, without gradient: a weight for the loss where sampler and trainer differ.

    Answers drawn by a sampler of other numerics (half precision, other experts) are not the trainer's: the weight
    π_old / π_sampler corrects the mismatch of one token; the cap C bounds its variance, and biases the tokens above it
    (truncated importance sampling, Ionides 2008; for language models Yao et al. 2025). With it the ratio of the
    surrogate is π_θ / π_old, both of the trainer. All [B, T]. Raises ValueError for C <= 0.
    """
    if not cap > 0:
        raise ValueError(f"cap = {cap}: above 0, infinite for none")
    return torch.sub(*_upcast(old_logp.detach(), sampler_logp.detach())).exp().clamp(max=cap)


def entropy_bonus(entropy: Tensor) -> Tensor:
    """-H(π(· | x_<t)): a small multiple in the loss keeps the policy exploring longer (Williams & Peng 1991).

    entropy: [B, T], nats, with gradient, of the distribution that x_t was drawn from.
    """
    return -_upcast(entropy)[0]


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V_t - R_t)², (clip(V_t, V_old - ε, V_old + ε) - R_t)²), R_t the return.

    The larger of the two: a step away from V_old is clipped, a step back never is. Not in PPO's paper but in its
    code (Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9). clip: ε, infinite for the plain square.
    All [B, T]; no gradient goes through old_value and returns. ValueError for clip < 0.
    """
    if not clip >= 0:
        raise ValueError(f"clip = {clip}: 0 or more, infinite for none")
    value, old_value, returns = _upcast(value, old_value.detach(), returns.detach())
    clipped = value.clamp(old_value - clip, old_value + clip)
    return 0.5 * torch.maximum((value - returns).square(), (clipped - returns).square())


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log π - log π_ref at the sampled token: unbiased for KL(π‖π_ref) as a number (Schulman 2020, "Approximating KL").

    As a loss its expected gradient is zero (E ∇log π = 0): use it in the reward, or to report. 0 where both are -∞.
    """
    logp, ref_logp = _upcast(logp, ref_logp.detach())
    return (logp - ref_logp).masked_fill(logp.isneginf() & ref_logp.isneginf(), 0.0)


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log π - log π_ref)² / 2: biased as a number; its expected gradient is that of each step's KL(π‖π_ref)."""
    return 0.5 * kl_k1(logp, ref_logp).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """π_ref/π - log(π_ref/π) - 1 >= 0: unbiased as a number, low variance (DeepSeekMath, arXiv:2402.03300, equation 4).

    The estimator of GRPO and R1. As a loss its expected gradient is that of each step's KL(π_ref‖π), not KL(π‖π_ref).
    """
    log_ratio = -kl_k1(logp, ref_logp)
    return log_ratio.exp() - log_ratio.clamp(max=LARGEST) - 1  # beside e^80, 80 vanishes; ∞ - ∞ would be NaN

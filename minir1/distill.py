"""What a student learns from a teacher's distributions: functions of log-probs, and of nothing else.

S and T are the next-token distributions of student and teacher, softmax(z / τ) of their logits at a temperature τ. Over
the vocabulary of a real model, `minir1.model.divergence` computes the same without [tokens, vocabulary] in memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _kl(lp: Tensor, lq: Tensor) -> Tensor:
    """Σ p (log p - log q) over the last dimension, 0 log 0 = 0."""
    p = lp.exp()
    return (p * (lp - lq).masked_fill(p == 0, 0.0)).sum(-1)


def forward_kl(lp_s: Tensor, lp_t: Tensor) -> Tensor:
    """KL(T‖S) = Σ_v T_v (log T_v - log S_v): the student covers all that the teacher may say.

    lp_s, lp_t: log-probs [..., V], -∞ allowed -> [...]. ∞ where T has a token that S excludes. With T a sample's token
    alone it is the cross-entropy of supervised fine-tuning.
    """
    return _kl(lp_t, lp_s)


def reverse_kl(lp_s: Tensor, lp_t: Tensor) -> Tensor:
    """KL(S‖T) = Σ_v S_v (log S_v - log T_v): the student says nothing that the teacher would not. Shapes as above."""
    return _kl(lp_s, lp_t)


def generalised_js(lp_s: Tensor, lp_t: Tensor, beta: float) -> Tensor:
    """D_β(T, S) = β KL(T‖M) + (1-β) KL(S‖M), M = β T + (1-β) S (arXiv:2306.13649, JSD(β)).

    Shapes as above; finite also where one of the two excludes what the other allows. At most -β log β - (1-β) log(1-β).
    β = 0 and 1 stand for KL(T‖S) and KL(S‖T), the limits of D_β/β and D_β/(1-β), since D_β itself is 0 there. So the
    gradient of D_β is about β(1-β) times that of either where S is near T: a quarter at β = ½. ValueError for other β.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta = {beta}: 0 (KL(T‖S)) to 1 (KL(S‖T))")
    if beta in (0, 1):
        return reverse_kl(lp_s, lp_t) if beta else forward_kl(lp_s, lp_t)
    t, s = lp_t.clamp(min=-1e4), lp_s.clamp(min=-1e4)  # the slope of log (0 + 0) would be NaN
    mixture = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return beta * _kl(lp_t, mixture) + (1 - beta) * _kl(lp_s, mixture)


def with_rest(lp: Tensor) -> Tensor:
    """Log-probs of some tokens [..., k], and last that of all others together, log(1 - Σ p): [..., k+1].

    A divergence of such coarse distributions is at most that of the whole ones (the data-processing inequality), and
    equal to it where both models spread the rest in the same proportions. The rest is at least 6e-8, and has no
    gradient below.
    """
    total = lp.logsumexp(-1, keepdim=True).clamp(max=-6e-8)  # rounding may leave nothing, or less
    return torch.cat((lp, torch.log(-torch.expm1(total))), -1)


def reverse_kl_advantage(logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """A_t = -(log π_S(x_t | x_<t) - log π_T(x_t | x_<t)), of tokens that the student sampled, without gradient.

    Both [B, T]. On-policy distillation: a policy gradient with these advantages, each for its own token alone (discount
    0), has as its expectation the exact gradient -∇ Σ_t KL(S‖T) at the sampled prefixes, which are held fixed.
    """
    return (teacher_logp - logp).detach()


def mixed(nll: Tensor, divergence: Tensor, ce_weight: float, temperature: float) -> Tensor:
    """L = λ·CE + (1-λ)·τ²·D, elementwise (Hinton et al., arXiv:1503.02531, section 2).

    nll: -log π_S of the text's tokens at temperature 1; divergence: at temperature τ. τ² keeps the size of its
    gradient, which falls as 1/τ².
    """
    return ce_weight * nll + (1 - ce_weight) * temperature**2 * divergence

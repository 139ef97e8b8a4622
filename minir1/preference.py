"""Losses of preference learning, one per pair: of two answers to one prompt, the first was preferred.

Bradley and Terry (1952, "Rank analysis of incomplete block designs") give every answer y a strength r(x, y) and let

    P(y_c preferred to y_r | x) = σ(r(x, y_c) - r(x, y_r))                         σ(z) = 1 / (1 + e^-z)

A reward model learns r itself. DPO puts the policy's implicit reward in its place: the maximum of E[r] - β KL(π‖π_ref)
is π* ∝ π_ref e^{r/β}, so that r = β log(π*/π_ref) + (a number of the prompt alone), which cancels in a comparison.

Every function works on tensors of one shape, whichever, one entry per pair, and returns fp32, or fp64 for fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _upcast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in at least fp32; ValueError for different shapes."""
    if len({x.shape for x in tensors}) > 1:
        raise ValueError(f"arguments of shapes {[tuple(x.shape) for x in tensors]}: all must have one shape")
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """(1 - ε) L(r_c, r_r) + ε L(r_r, r_c) with L(a, b) = -log σ(a - b - m); without ε and m, -log P(y_c preferred).

    chosen, rejected: r_c and r_r, [N]. margin: m, [N] or one number, how much better the chosen answer was said to be
    (Llama 2, arXiv:2307.09288, section 3.2.2): the gap that the reward model should reach.
    label_smoothing: ε, the chance that an annotator swapped the two (Mitchell 2023, "A note on DPO with noisy
    preferences"); for m = 0 the loss is then least at r_c - r_r = log((1 - ε)/ε), and not at infinity.
    ValueError unless 0 <= ε < 1/2.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing}: 0 to below 0.5")
    gap = torch.sub(*_upcast(chosen, rejected))
    if isinstance(margin, Tensor):
        gap, margin = _upcast(gap, margin)
    right = F.logsigmoid(gap - margin)
    swapped = F.logsigmoid(-gap - margin) if label_smoothing else 0.0  # 0·∞ would be NaN
    return -(1 - label_smoothing) * right - label_smoothing * swapped


def implicit_reward(logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """β log(π(y|x) / π_ref(y|x)), the reward that the policy is optimal for, up to a number of the prompt alone.

    DPO, arXiv:2305.18290, section 4. logp, ref_logp: log-probs of whole answers, summed over their tokens, [N]; no
    gradient goes through ref_logp. ValueError unless β > 0.
    """
    if not beta > 0:
        raise ValueError(f"beta = {beta}: above 0")
    return beta * torch.sub(*_upcast(logp, ref_logp.detach()))


def dpo(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log σ(β log π(y_c|x)/π_ref(y_c|x) - β log π(y_r|x)/π_ref(y_r|x)) (DPO, arXiv:2305.18290, equation 7).

    All [N], summed over the tokens of the answers. It is `bradley_terry` on implicit rewards; its gradient at π = π_ref
    is -β/2 (∇log π(y_c|x) - ∇log π(y_r|x)). Only the difference of the two log-probs counts, so both may fall.
    label_smoothing: ε as in `bradley_terry`; with it this is the conservative DPO of Mitchell 2023.
    """
    chosen = implicit_reward(logp_chosen, ref_chosen, beta)
    rejected = implicit_reward(logp_rejected, ref_rejected, beta)
    return bradley_terry(chosen, rejected, label_smoothing=label_smoothing)


# ---- judging a reward --------------------------------------------------------------------------


def agreement(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen answer has the higher reward, ½ for a tie, else 0. [N] -> fp32 [N]; ValueError for NaN."""
    chosen, rejected = _upcast(chosen, rejected)
    if (chosen.isnan() | rejected.isnan()).any():
        raise ValueError("a reward is NaN: it is neither higher nor lower than another")
    return ((chosen > rejected).float() + (chosen >= rejected).float()) / 2


class Calibration(NamedTuple):
    """Pairs binned by how sure the reward is; each [bins], fp64, 0 in a bin without pairs."""

    count: Tensor  # pairs
    confidence: Tensor  # mean of the probability given to the answer with the higher reward
    accuracy: Tensor  # how often that one was preferred


def calibration(gap: Tensor, bins: int) -> Calibration:
    """Does σ(|r_c - r_r|) say how often the answer with the higher reward is the preferred one?

    gap: r_c - r_r of held-out pairs, [N]. The confidence σ(|gap|) lies in ½ … 1, which is cut into `bins` of equal
    width (Guo et al. 2017, arXiv:1706.04599, section 2); 1 belongs to the last. Equal rewards count as half right.
    ValueError for no pairs, numbers that are not finite, or bins < 1.
    """
    if not bins >= 1 or gap.ndim != 1 or gap.numel() == 0 or not gap.isfinite().all():
        raise ValueError(f"bins = {bins}, gap of shape {tuple(gap.shape)}: at least one bin and one pair, all finite")
    gap = gap.detach().double()
    confidence = gap.abs().sigmoid()
    index = ((2 * confidence - 1) * bins).long().clamp(max=bins - 1)
    count = torch.bincount(index, minlength=bins).double()
    sums = [torch.bincount(index, x, minlength=bins) for x in (confidence, agreement(gap, -gap).double())]
    return Calibration(count, *(total / count.clamp(min=1) for total in sums))


def calibration_error(pairs: Calibration) -> float:
    """ECE = Σ_b n_b/N |accuracy_b - confidence_b| (arXiv:1706.04599, section 2), in 0 … 1; 0 is perfect."""
    weight = pairs.count / pairs.count.sum()
    return (weight * (pairs.accuracy - pairs.confidence).abs()).sum().item()

"""The reduction of a loss: weights that sum to one over the whole batch, and the sum itself.

Loss = Σ weights · loss_per_token. `total` counts over all micro-batches and ranks, so that the losses of the parts add
up to the loss of the whole and no result depends on how the batch is split.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _trained(mask: Tensor, total: float) -> Tensor:
    """The mask as 0 and 1 in at least fp32: a sum of ones in bfloat16 ends at 256."""
    if not 0 < total < float("inf"):
        raise ValueError(f"total = {total}: the whole batch needs at least one trained answer or token")
    return mask.bool().to(torch.promote_types(mask.dtype, torch.float32))


def per_answer_mean(mask: Tensor, total: int) -> Tensor:
    """1 / (answers · |o_i|) for the tokens of answer i (GRPO, DeepSeekMath, arXiv:2402.03300, equation 3).

    mask: bool [B, T], the trained tokens; total: answers of the whole batch that have a trained token. fp32 [B, T].
    """
    mask = _trained(mask, total)
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / total


def token_mean(mask: Tensor, total: int) -> Tensor:
    """1 / (tokens of all answers) (DAPO, arXiv:2503.14476, section 3.3). total: trained tokens of the whole batch."""
    return _trained(mask, total) / total


def fixed_length(mask: Tensor, length: int, total: int) -> Tensor:
    """1 / (answers · length) with a constant length, such as the budget (Dr. GRPO, arXiv:2503.20783, section 3.2).

    total: answers of the whole batch. Sums to one only if every answer has that length: shorter ones weigh less.
    """
    if not length >= 1:
        raise ValueError(f"length = {length}: must be at least 1")
    return _trained(mask, total) / length / total


def weighted_sum(weight: Tensor, loss: Tensor) -> Tensor:
    """Σ weight · loss, of two [B, T]. Where the weight is 0 the loss may be infinite or NaN."""
    if loss.shape != weight.shape:
        raise ValueError(f"loss has shape {tuple(loss.shape)}, weight {tuple(weight.shape)}: must be the same")
    return (weight * loss.masked_fill(weight == 0, 0.0)).sum()

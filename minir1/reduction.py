"""The reduction of a loss: weights that sum to one over the whole batch.

Loss = Σ weights · loss_per_token. `total` counts over all micro-batches and ranks, so that the losses of the parts add
up to the loss of the whole and no result depends on how the batch is split.
"""

from __future__ import annotations

from torch import Tensor


def _check(total: float) -> None:
    if total <= 0:
        raise ValueError(f"total = {total}: the whole batch needs at least one trained answer or token")


def per_answer_mean(mask: Tensor, total: int) -> Tensor:
    """1 / (answers · |o_i|) for the tokens of answer i (GRPO, DeepSeekMath, arXiv:2402.03300, equation 3).

    mask: bool [B, T], the trained tokens; total: answers of the whole batch that have a trained token. fp32 [B, T].
    """
    _check(total)
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / total


def token_mean(mask: Tensor, total: int) -> Tensor:
    """1 / (tokens of all answers) (DAPO, arXiv:2503.14476, section 3.3). total: trained tokens of the whole batch."""
    _check(total)
    return mask / total


def fixed_length(mask: Tensor, length: int, total: int) -> Tensor:
    """1 / (answers · length) with a constant length, such as the budget (Dr. GRPO, arXiv:2503.20783, section 3.2).

    total: answers of the whole batch. Sums to one only if every answer has that length: shorter ones weigh less.
    """
    _check(total)
    if length < 1:
        raise ValueError(f"length = {length}: must be at least 1")
    return mask / length / total

"""How much better an answer was than expected."""

from __future__ import annotations

from torch import Tensor


def _check(rewards: Tensor) -> None:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; a group baseline needs [P, G] with G >= 2")
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

"""Draw training problems by measured difficulty: fewer of those that the policy always or never solves.

A group of equal rewards has no advantage and teaches nothing (GRPO): with a share p of right answers, all G of a group
are right or all wrong with probability p^G + (1-p)^G.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

OUTSIDE = 0.1  # weight of a problem outside the window; not 0, since the policy changes and measurements grow old


def weights(solved: Sequence[float], low: float, high: float) -> list[float]:
    """A weight per problem: 1 if its share of right answers lies in [low, high], or was never measured (NaN), else
    OUTSIDE."""
    return [OUTSIDE if share < low or share > high else 1.0 for share in solved]


def draw(rng: random.Random, weight: Sequence[float], count: int) -> list[int]:
    """`count` different indices, drawn one after the other with probabilities ∝ weight among those that are left.

    The indices of the `count` largest u^(1/w), u uniform (Efraimidis and Spirakis 2006, algorithm A).
    ValueError if there are fewer weights.
    """
    if count > len(weight):
        raise ValueError(f"{count} different problems of {len(weight)}")
    keys = [rng.random() ** (1 / w) for w in weight]
    return sorted(range(len(weight)), key=lambda i: -keys[i])[:count]

"""Draw training problems by measured difficulty: fewer of those that the policy always or never solves.

A group of equal rewards has no advantage and teaches nothing (GRPO). With a share p of right answers, all G of a group
are right or all are wrong with probability p^G + (1-p)^G.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

OUTSIDE = 0.1  # weight of a problem outside the window; not 0, since the policy changes and measurements grow old


class Curriculum:
    """Measured shares of right answers of N training problems, and a window (low, high) of those drawn most.

    Without a window all problems are drawn alike. It is saved and restored as an optimizer is.
    """

    def __init__(self, count: int, window: tuple[float, float] | None = None):
        if window and window[0] > window[1]:
            raise ValueError(f"difficulty_window = {window}: the lower share comes first")
        self.window, self.shares = window, [math.nan] * count

    def draw(self, rng: random.Random, count: int) -> list[int]:
        """`count` different indices. ValueError if there are fewer problems."""
        if self.window is None:
            return rng.sample(range(len(self.shares)), count)
        return draw(rng, weights(self.shares, *self.window), count)

    def measured(self, indices: Iterable[int], shares: Iterable[float]) -> None:
        """The newest shares of right answers of these problems; NaN, for none that could be judged, changes nothing."""
        for index, share in zip(indices, map(float, shares)):
            self.shares[index] = self.shares[index] if math.isnan(share) else share

    def state_dict(self) -> dict:
        return {"shares": list(self.shares)}

    def load_state_dict(self, state: dict) -> None:
        self.shares = list(state["shares"])


def weights(shares: Sequence[float], low: float, high: float) -> list[float]:
    """A weight per problem: 1 if its share lies in [low, high] or was never measured (NaN), else OUTSIDE."""
    return [OUTSIDE if share < low or share > high else 1.0 for share in shares]


def draw(rng: random.Random, weight: Sequence[float], count: int) -> list[int]:
    """`count` different indices, drawn one after the other with probabilities ∝ weight among those that are left.

    The indices of the `count` largest u^(1/w), u uniform (Efraimidis and Spirakis 2006, algorithm A).
    ValueError if there are fewer weights.
    """
    if count > len(weight):
        raise ValueError(f"{count} different problems of {len(weight)}")
    keys = [rng.random() ** (1 / w) for w in weight]
    return sorted(range(len(weight)), key=lambda i: -keys[i])[:count]

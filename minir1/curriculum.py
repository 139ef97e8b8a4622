"""Draw training problems by measured difficulty: fewer of those that the policy always or never solves.

A group of equal rewards has no advantage and teaches nothing (GRPO). With a share p of right answers, all G of a group
are right or all are wrong with probability p^G + (1-p)^G.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from minir1.judge import Answer
from minir1.tasks import Problem

OUTSIDE = 0.1  # weight of a problem outside the window; not 0, since the policy changes and measurements grow old


class Curriculum:
    """N training problems, their measured shares of right answers, and the window (low, high) of those drawn most.

    Without a window all problems are drawn alike. It is saved and restored as an optimizer is.
    """

    def __init__(self, problems: Sequence[Problem], window: tuple[float, float] | None = None):
        self.problems, self.window = problems, window
        self.index = {problem: i for i, problem in enumerate(problems)}
        self.shares: dict[int, float] = {}  # by the index of a problem that was measured

    def draw(self, rng: random.Random, count: int) -> list[Problem]:
        """`count` different problems. ValueError if there are fewer."""
        if self.window is None:
            return rng.sample(self.problems, count)
        shares = (self.shares.get(self.index[problem]) for problem in self.problems)  # copies of a problem have one
        return [self.problems[i] for i in draw(rng, weights(shares, *self.window), count)]

    def measured(self, problems: Sequence[Problem], answers: Sequence[Sequence[Answer]]) -> None:
        """The newest answers to some of the problems replace what was measured; those not judged do not count."""
        for problem, group in zip(problems, answers):
            right = [a.right for a in group if not a.unjudged]
            if right:
                self.shares[self.index[problem]] = sum(right) / len(right)

    def metrics(self) -> dict[str, float]:
        """The share of the problems that is inside the window by the newest measurements; {} without a window."""
        if self.window is None:
            return {}
        low, high = self.window
        return {"train/inside_window": sum(low <= p <= high for p in self.shares.values()) / max(1, len(self.shares))}

    def state_dict(self) -> dict:
        """What was measured, for a checkpoint."""
        return {"shares": dict(self.shares)}

    def load_state_dict(self, state: dict) -> None:
        """Put back what `state_dict` returned."""
        self.shares = dict(state["shares"])


def weights(shares: Iterable[float | None], low: float, high: float) -> list[float]:
    """A weight per problem: 1 if its share lies in [low, high] or was never measured (None), else OUTSIDE."""
    return [1.0 if share is None or low <= share <= high else OUTSIDE for share in shares]


def draw(rng: random.Random, weight: Sequence[float], count: int) -> list[int]:
    """`count` different indices, drawn one after the other with probabilities ∝ weight among those that are left.

    The indices of the `count` largest u^(1/w), u uniform (Efraimidis and Spirakis 2006, algorithm A).
    ValueError if there are fewer weights.
    """
    if count > len(weight):
        raise ValueError(f"{count} different problems of {len(weight)}")
    keys = [rng.random() ** (1 / w) for w in weight]
    return sorted(range(len(weight)), key=lambda i: -keys[i])[:count]

"""Gradients of distillation: what each expects, and how noisy it is. A part of experiments/studies/estimators.py.

The teacher T is the reference policy of the problems there, the student S the policy. Every loss here is a mean over
independent texts, so that the gradients of all seven texts and their probabilities give its expectation and variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.studies.estimators_catalogue import Problem, everything
from minir1 import enumeration as exact
from minir1.advantages import discounted_returns
from minir1.distill import generalised_js, reverse_kl_advantage
from minir1.losses import nll, reinforce


class Way(NamedTuple):
    """A loss of distillation: per token of every text, [Y, T]; of_student: who wrote the texts."""

    label: str
    claim: str
    of_student: bool
    loss: Callable[[Problem], Tensor]


def whole(problem: Problem, beta: float) -> Tensor:
    """D_β of the distributions at every token."""
    return generalised_js(problem.lp, problem.ref_lp.detach(), beta)


def sampled(problem: Problem, discount: float) -> Tensor:
    """REINFORCE with the sampled -(log S - log T) of each token, or of it and all later ones."""
    advantage = reverse_kl_advantage(problem.logp, problem.ref_logp)
    return reinforce(problem.logp, discounted_returns(advantage, everything().mask, discount))


WAYS = {
    "texts": Way("T's texts, cross-entropy", "∇KL(T‖S)", False, lambda problem: nll(problem.logp)),
    "forward": Way("T's texts, exact KL(T‖S)", "∇KL(T‖S)", False, lambda problem: whole(problem, 0.0)),
    "js": Way("T's texts, 4 JS", "4 Σ_t ∇JS_t, T's steps", False, lambda problem: 4 * whole(problem, 0.5)),
    "reverse": Way("T's texts, exact KL(S‖T)", "Σ_t ∇KL_t(S‖T), T's steps", False, lambda problem: whole(problem, 1.0)),
    "on": Way("S's texts, sampled, discount 0", "Σ_t ∇KL_t(S‖T)", True, lambda problem: sampled(problem, 0.0)),
    "exact": Way("S's texts, exact KL(S‖T)", "Σ_t ∇KL_t(S‖T)", True, lambda problem: whole(problem, 1.0)),
    "to_go": Way("S's texts, sampled, discount 1", "∇KL(S‖T)", True, lambda problem: sampled(problem, 1.0)),
    "own": Way("S's texts, exact KL(T‖S)", "Σ_t ∇KL_t(T‖S), S's steps", True, lambda problem: whole(problem, 0.0)),
}  # fmt: skip


def moments(way: Way, problem: Problem) -> tuple[Tensor, float]:
    """The expected gradient of the loss of one text [n], and tr Cov."""
    losses = way.loss(problem).masked_fill(~everything().mask, 0.0).sum(1)
    gradients = torch.stack([problem.gradient(loss) for loss in losses])
    writer = problem.logp if way.of_student else problem.ref_logp
    return exact.moments(gradients, writer.detach().sum(1).exp())


def targets(problem: Problem) -> tuple[Tensor, Tensor]:
    """∇KL(T‖S) and ∇KL(S‖T), of whole texts."""
    teacher = problem.ref_logp.detach()
    return (
        problem.gradient(exact.sequence_kl(teacher, problem.logp)),
        problem.gradient(exact.sequence_kl(problem.logp, teacher)),
    )


def run(pair: list[Problem]) -> dict[str, dict[str, float]]:
    """Of every way: its bias to both gradients, and its noise to signal for one text; means over the problems."""
    forward, reverse = (torch.cat(part) / len(pair) for part in zip(*map(targets, pair)))
    result = {}
    for name, way in WAYS.items():
        means, variances = zip(*(moments(way, problem) for problem in pair))
        mean = torch.cat(means) / len(pair)
        biases = {key: ((mean - t).norm() / t.norm()).item() for key, t in (("forward", forward), ("reverse", reverse))}
        # half of N texts are of each problem: N tr Cov g = 2 · (σ² + σ'²) / 4
        result[name] = biases | {"deviation": math.sqrt(sum(variances) / len(pair)) / mean.norm().item()}
    return result


COLUMNS = ["", "expectation", "bias to ∇KL(T‖S)", "bias to ∇KL(S‖T)", "deviation"]


def rows(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row per way, columns as in COLUMNS."""
    share = lambda x: "0" if x < 1e-9 else f"{x:.1%}"
    return [
        [way.label, way.claim, share(results[name]["forward"]), share(results[name]["reverse"]),
         f"{results[name]['deviation']:.2f}"]
        for name, way in WAYS.items()
    ]  # fmt: skip

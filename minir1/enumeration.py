"""Expectations without sampling: a policy so small that all of its answers can be listed.

An estimator of a gradient is a loss over sampled answers, and its gradient is linear in the scores ∇ log π(x_t | x_<t)
of their tokens. So the scores of all Y answers give its gradient on every possible draw, and the probabilities of the
draws its exact expectation and variance. `tests/test_enumeration.py` checks the objectives of this library against
what they claim, and experiments/studies/estimators.py prints the table.

Answers are rows of T tokens without a prompt: column t is token x_t, as everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def answers(vocab: int, longest: int, end: int = 0) -> tuple[Tensor, Tensor]:
    """All answers of at most `longest` tokens that stop after the first `end`: tokens int64 [Y, T], mask bool [Y, T].

    There are 7 of them for 3 tokens and 2 steps, 4 for 2 tokens and 3 steps. Raises ValueError for no token but the
    end, or no step.
    """
    if vocab < 2 or longest < 1 or not 0 <= end < vocab:
        raise ValueError(f"vocab = {vocab}, longest = {longest}, end = {end}: two tokens, one step, an end among them")
    rows = []
    for length in range(1, longest + 1):
        last = range(vocab) if length == longest else (end,)
        others = [token for token in range(vocab) if token != end]
        rows += [(*start, token) for start in itertools.product(others, repeat=length - 1) for token in last]
    tokens = torch.tensor([[*row, *[end] * (longest - len(row))] for row in rows])
    return tokens, torch.arange(longest) < torch.tensor([[len(row)] for row in rows])


def tabular(table: Tensor, tokens: Tensor) -> Tensor:
    """log π(· | x_<t) of a policy with separate logits for every state. table: [S, V]; tokens: [Y, T] -> [Y, T, V].

    States are the prefixes x_<t, numbered by length and then as numbers to the base V: S = (V^T - 1) / (V - 1).
    """
    vocab, state = table.shape[1], torch.zeros(len(tokens), dtype=torch.int64)
    states = []
    for column in tokens.T:
        states.append(state)
        state = state * vocab + 1 + column
    return table.log_softmax(-1)[torch.stack(states, 1)]


def chosen(lp: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π(x_t | x_<t), 0 after the end. lp: [Y, T, V]; tokens, mask: [Y, T] -> [Y, T]."""
    return lp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0.0)


def gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """∇_θ of a number, all parameters in one vector [n]."""
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts)])


def scores(logp: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """∇_θ log π(x_t | x_<t) of every token of every answer. logp: [Y, T], with its graph -> [Y, T, n]."""
    return torch.stack([torch.stack([gradient(x, parameters) for x in row]) for row in logp])


# ---- what is to be estimated -------------------------------------------------------------------


def expected_reward(logp: Tensor, rewards: Tensor) -> Tensor:
    """J(θ) = Σ_y π(y) R(y). logp: [Y, T]; rewards: [Y]."""
    return (logp.sum(1).exp() * rewards).sum()


def sequence_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(π‖π_ref) = Σ_y π(y) (log π(y) - log π_ref(y)). Both [Y, T]."""
    return (logp.sum(1).exp() * (logp - ref_logp).sum(1).masked_fill(logp.sum(1).exp() == 0, 0.0)).sum()


def step_kl(lp: Tensor, ref_lp: Tensor, mask: Tensor) -> Tensor:
    """KL(π(· | x_<t) ‖ π_ref(· | x_<t)) of every state of an answer, 0 after the end.

    lp, ref_lp: [Y, T, V] -> [Y, T]. With the two exchanged it is KL(π_ref‖π), over the same states.
    """
    return (lp.exp() * (lp - ref_lp).masked_fill(lp.exp() == 0, 0.0)).sum(-1).masked_fill(~mask, 0.0)


def state_values(logp: Tensor, rewards: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """V(x_<t) = E[R | x_<t], the exact value of the state before x_t. [Y, T]; rewards: [Y]."""
    values = torch.zeros_like(logp)
    probability = logp.sum(1).exp()
    for t in range(tokens.shape[1]):
        same = (tokens[:, None, :t] == tokens[None, :, :t]).all(-1) & mask[:, t]  # [Y, Y']: y' passes through y's state
        weight = same * probability
        values[:, t] = (weight * rewards).sum(1) / weight.sum(1).clamp(min=1e-300)
    return values.masked_fill(~mask, 0.0)


# ---- what an estimator gives -------------------------------------------------------------------


def draws(count: int, size: int) -> Tensor:
    """Every draw of `size` of `count` answers, with replacement and in order: int64 [count^size, size]."""
    return torch.cartesian_prod(*[torch.arange(count)] * size).view(-1, size)


def estimates(loss: Callable[[Tensor], Tensor], logp: Tensor, score: Tensor, drawn: Tensor) -> Tensor:
    """The ascent direction -∇ Σ loss of every draw: [M, n].

    loss: takes the log-probs of the drawn answers, [M·G, T], to their weighted losses [M·G, T]; the losses of a draw
    may depend on that draw alone. logp: [Y, T]; score: [Y, T, n]; drawn: int64 [M, G].
    """
    rows = logp.detach()[drawn.flatten()].requires_grad_()
    (slope,) = torch.autograd.grad(loss(rows).sum(), rows)  # [M·G, T]
    slope = slope.view(*drawn.shape, -1)
    whole = slope.new_zeros(len(drawn), *logp.shape)  # summed by which answer it was, to multiply scores once
    whole.scatter_add_(1, drawn.unsqueeze(-1).expand_as(slope), slope)
    return -whole.flatten(1) @ score.flatten(0, 1)


def moments(estimate: Tensor, probability: Tensor) -> tuple[Tensor, float]:
    """The expectation [n] and the variance (trace of the covariance) of estimates [M, n]; probability: [M]."""
    mean = probability @ estimate
    return mean, (probability @ (estimate - mean).square().sum(1)).item()


def probability_of(logp: Tensor, drawn: Tensor) -> Tensor:
    """Π_i π(y_i) of every draw. logp: [Y, T]; drawn: [M, G] -> [M], without gradient."""
    return logp.detach().sum(1)[drawn].sum(1).exp()

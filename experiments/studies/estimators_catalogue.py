"""The estimators of experiments/studies/estimators.py, composed from the library as in the training scripts.

A loss takes a problem and the log-probs of the drawn answers, [M·G, T], and returns their weighted losses, [M·G, T].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from minir1 import enumeration as exact
from minir1 import losses
from minir1.advantages import (
    at_last_token,
    batch_centered,
    discounted_returns,
    gae,
    group_advantages,
    group_centered,
    kl_in_reward,
    leave_one_out,
    whiten,
)
from minir1.reduction import fixed_length, per_answer_mean, token_mean

G = 4


class Answers(NamedTuple):
    """All Y answers of at most T tokens to a problem, and all M = Y^G draws of G of them."""

    tokens: Tensor  # int64 [Y, T]
    mask: Tensor  # bool [Y, T]
    rewards: Tensor  # fp64 [Y]: 1 for the answers of one token and then the end
    drawn: Tensor  # int64 [M, G]
    rows: Tensor  # int64 [M·G], the drawn answers one after the other
    row_mask: Tensor  # bool [M·G, T]
    # Answers of the same length and reward (of one kind) have the same advantage and weight: the first represents all.
    own: Tensor  # int64 [·, G], the draws of different kinds
    own_of: Tensor  # int64 [M], the index in `own` of each draw
    other: Tensor  # int64 [·, G], the draws of different kinds in any order
    other_of: Tensor  # int64 [M], the index in `other` of each draw


@lru_cache(maxsize=1)
def everything() -> Answers:
    """All answers of at most two tokens, of three, where token 0 ends an answer: 7 answers, 2,401 draws."""
    tokens, mask = exact.answers(3, 2)
    rewards = torch.tensor([0, 1, 0, 0, 1, 0, 0], dtype=torch.float64)
    drawn, length = exact.draws(len(tokens), G), mask.sum(1)
    kind = ((length[:, None] == length) & (rewards[:, None] == rewards)).int().argmax(1)[drawn]  # [M, G]
    rows = drawn.flatten()
    own, other = kind.unique(dim=0, return_inverse=True), kind.sort(1)[0].unique(dim=0, return_inverse=True)
    return Answers(tokens, mask, rewards, drawn, rows, mask[rows], *own, *other)


class Problem:
    """One prompt with three policies: the sampler, the policy that is trained (moved, perhaps), and the reference."""

    def __init__(self, logits: Tensor, moved: Tensor, reference: Tensor):
        tokens, mask, *_ = everything()
        self.logits = moved.clone().requires_grad_()
        self.lp, self.ref_lp = exact.tabular(self.logits, tokens), exact.tabular(reference, tokens)
        self.logp, self.ref_logp = (exact.chosen(x, tokens, mask) for x in (self.lp, self.ref_lp))
        self.sampler = exact.chosen(exact.tabular(logits, tokens), tokens, mask)
        self.scores = exact.scores(self.logp, [self.logits])

    def gradient(self, value: Tensor) -> Tensor:
        """The gradient of a number with respect to this problem's logits."""
        return exact.gradient(value, [self.logits])

    def moments(self, loss: Callable[[Problem, Tensor], Tensor]) -> tuple[Tensor, float]:
        """The expectation of g [n] and tr Cov g, over the draws of the policy that sampled."""
        drawn = everything().drawn
        estimates = exact.estimates(partial(loss, self), self.logp, self.scores, drawn)
        return exact.moments(estimates, exact.probability_of(self.sampler, drawn))


def problems(step: float = 0.0) -> list[Problem]:
    """A hard problem and an even one; the policy has moved by `step` from the sampler."""
    pair = []
    for number, ends in enumerate((-1.5, 1.5)):
        noise = torch.Generator().manual_seed(number)
        logits, direction, off = (torch.randn(4, 3, dtype=torch.float64, generator=noise) for _ in range(3))
        logits = 0.7 * logits
        logits[1:, 0] += ends
        pair.append(Problem(logits, logits + step * direction, logits + 0.7 * off))
    return pair


@dataclass(frozen=True)
class Estimator:
    """A loss, and the claimed expectation of its ascent direction."""

    label: str
    claim: str
    loss: Callable[..., Tensor]  # (problem, logp) -> weighted losses
    whole_batch: bool = False  # the loss also takes the answers to the other problem, int64 [G]


# ---- weights -----------------------------------------------------------------------------------


def fixed() -> Tensor:
    """1/G per token; with length 1 the loss has the scale of ∇J."""
    return fixed_length(everything().row_mask.double(), 1, G)


def per_answer() -> Tensor:
    """1/(G·|o|) per token."""
    return per_answer_mean(everything().row_mask.double(), G)


# ---- losses of the draw of one problem ---------------------------------------------------------


def spread(advantage: Tensor) -> Tensor:
    """[M, G] -> [M·G, T], the same for every token of an answer."""
    return advantage.reshape(-1, 1).expand(-1, everything().mask.shape[1])


def of_rewards(advantage: Callable[[Tensor], Tensor]) -> Tensor:
    """The advantage of the rewards of each draw, [M·G, T]."""
    return spread(advantage(everything().rewards[everything().drawn]))


def plain(problem: Problem, logp: Tensor, advantage) -> Tensor:
    """REINFORCE."""
    return fixed() * losses.reinforce(logp, of_rewards(advantage))


def surrogate(problem: Problem, logp: Tensor, loss, advantage, weight=fixed, **clip: float) -> Tensor:
    """A loss with a ratio to the sampler, per token or per answer."""
    mask = {"mask": everything().row_mask} if loss in (losses.gspo, losses.grpo_sequence) else {}
    return weight() * loss(logp, problem.sampler[everything().rows], of_rewards(advantage), **mask, **clip)


def truncated(problem: Problem, logp: Tensor, cap: float) -> Tensor:
    """REINFORCE with the truncated importance weight that corrects for another sampler."""
    weight = losses.truncated_importance(problem.logp, problem.sampler, cap)[everything().rows]
    return weight * plain(problem, logp, leave_one_out)


def by_token(problem: Problem, logp: Tensor, advantage: Callable[[Problem], Tensor]) -> Tensor:
    """REINFORCE with an advantage for each token of each answer, [Y, T]."""
    return fixed() * losses.reinforce(logp, advantage(problem)[everything().rows])


def kl_in_loss(problem: Problem, logp: Tensor, kl) -> Tensor:
    """A KL term in the loss; its ascent direction estimates -∇KL."""
    return fixed() * kl(logp, problem.ref_logp.detach()[everything().rows])


# ---- advantages --------------------------------------------------------------------------------


def wrong_value(problem: Problem) -> Tensor:
    """0.5 everywhere."""
    return torch.full_like(problem.sampler, 0.5)


def true_value(problem: Problem) -> Tensor:
    """The exact V of the policy."""
    tokens, mask, rewards, *_ = everything()
    return exact.state_values(problem.logp.detach(), rewards, tokens, mask)


def gae_with(problem: Problem, value: Callable[[Problem], Tensor], lam: float) -> Tensor:
    _, mask, rewards, *_ = everything()
    return gae(at_last_token(rewards, mask), value(problem), mask, 1.0, lam)[0]


def discounted(problem: Problem, gamma: float) -> Tensor:
    _, mask, rewards, *_ = everything()
    return discounted_returns(at_last_token(rewards, mask), mask, gamma)


def kl_reward(problem: Problem, to_go: bool) -> Tensor:
    """k1 in the reward, summed over the tokens to come or over the whole answer."""
    mask = everything().mask
    earned = kl_in_reward(torch.zeros_like(problem.sampler), problem.logp, problem.ref_logp, mask, 1.0)
    return discounted_returns(earned, mask, 1.0) if to_go else earned.sum(1, keepdim=True).expand_as(earned)


# ---- losses of the batch: G answers to this problem, then G to the other -----------------------


def of_batch(problem: Problem, logp: Tensor, other: Tensor, loss, advantage, weight) -> Tensor:
    """A loss whose advantage and weight are functions of the 2G answers of the batch: int64 [2G] -> [2G, T]."""
    answers = everything()
    batches = [torch.cat((own, other)) for own in answers.own]
    A, w = (torch.stack([f(x)[:G] for x in batches])[answers.own_of].flatten(0, 1) for f in (advantage, weight))
    old = () if loss is losses.reinforce else (problem.sampler[answers.rows],)
    return w * loss(logp, *old, A)


def centered_over_batch(rows: Tensor) -> Tensor:
    return spread(batch_centered(everything().rewards[rows].view(2, G)))


def whitened_over_batch(rows: Tensor) -> Tensor:
    mask = everything().mask[rows]
    return whiten(discounted_returns(at_last_token(everything().rewards[rows], mask), mask, 1.0), mask)


def normalised_in_group(rows: Tensor) -> Tensor:
    return spread(group_advantages(everything().rewards[rows].view(2, G)))


def fixed_over_batch(rows: Tensor) -> Tensor:
    return fixed_length(everything().mask[rows].double(), 1, len(rows))


def tokens_of_batch(rows: Tensor) -> Tensor:
    mask = everything().mask[rows]
    return token_mean(mask.double(), int(mask.sum()))


# ---- on policy, moved, KL ---------------------------------------------------------------------

CLIP = {"clip_low": 0.2, "clip_high": 0.2}
OPEN = {"clip_low": 10.0, "clip_high": 1e9}
CAP = 1.2  # of the truncated weight

token = partial(surrogate, loss=losses.clipped_surrogate)
answer = partial(surrogate, loss=losses.grpo_sequence, weight=per_answer)
moved = partial(surrogate, advantage=leave_one_out)
GSPO = partial(surrogate, loss=losses.gspo, weight=per_answer, clip_low=3e-4, clip_high=4e-4)
DAPO = partial(of_batch, loss=losses.clipped_surrogate, advantage=normalised_in_group, weight=tokens_of_batch)
PLUS_PLUS = partial(of_batch, loss=losses.clipped_surrogate, advantage=whitened_over_batch, weight=tokens_of_batch)
BATCH_MEAN = partial(of_batch, loss=losses.reinforce, advantage=centered_over_batch, weight=fixed_over_batch)


def with_gae(value: Callable[[Problem], Tensor], lam: float):
    return partial(by_token, advantage=partial(gae_with, value=value, lam=lam))


ON_POLICY = {
    "reinforce": Estimator("REINFORCE", "∇J", partial(plain, advantage=lambda rewards: rewards)),
    "constant": Estimator("REINFORCE, b = ½", "∇J", partial(plain, advantage=lambda rewards: rewards - 0.5)),
    "rloo": Estimator("RLOO", "∇J", partial(plain, advantage=leave_one_out)),
    "gae_1": Estimator("GAE, λ = 1, wrong V", "∇J", with_gae(wrong_value, 1.0)),
    "gae_true": Estimator("GAE, λ = 0, exact V", "∇J", with_gae(true_value, 0.0)),
    "batch": Estimator("REINFORCE, batch mean", "(N-1)/N ∇J", BATCH_MEAN, True),
    "dr_grpo": Estimator("Dr. GRPO", "(G-1)/G ∇J", partial(token, advantage=group_centered)),
    "std": Estimator("GRPO, no 1/|o|", "mean of w(p) ∇p", partial(token, advantage=group_advantages)),
    "sequence": Estimator(
        "GRPO by answers", "mean of w(p) ∇p", partial(answer, advantage=group_advantages, clip_low=10.0, clip_high=10.0)
    ),
    "length": Estimator(
        "GRPO, no std", "(G-1)/G Cov(R, ∇log π/|o|)", partial(token, advantage=group_centered, weight=per_answer)
    ),
    "grpo": Estimator("GRPO", "both at once", partial(token, advantage=group_advantages, weight=per_answer)),
    "gspo": Estimator("GSPO", "as GRPO", partial(GSPO, advantage=group_advantages)),
    "token": Estimator("DAPO", "w(p), 1/Σ|o| of the batch", DAPO, True),
    "plus_plus": Estimator("REINFORCE++", "one mean, one std, 1/Σ|o| of the batch", PLUS_PLUS, True),
    "discount": Estimator(
        "REINFORCE, γ = ½", "late tokens count more", partial(by_token, advantage=partial(discounted, gamma=0.5))
    ),
    "gae_95": Estimator("GAE, λ = 0.95, wrong V", "(1-λ) error of V", with_gae(wrong_value, 0.95)),
    "gae_0": Estimator("GAE, λ = 0, wrong V", "error of V", with_gae(wrong_value, 0.0)),
}
MOVED = {
    "none": Estimator("no ratio", "as if it had sampled", partial(plain, advantage=leave_one_out)),
    "token": Estimator(
        "per-token ratio", "states, and what follows", partial(moved, loss=losses.clipped_surrogate, **OPEN)
    ),
    "clip": Estimator(
        "per-token ratio, clipped", "and clipped tokens", partial(moved, loss=losses.clipped_surrogate, **CLIP)
    ),
    "cispo": Estimator("CISPO", "and truncated weights", partial(moved, loss=losses.cispo, **CLIP)),
    "tis": Estimator(f"truncated at {CAP}", "and truncated weights", partial(truncated, cap=CAP)),
    "answer": Estimator("sequence-level ratio", "∇J", partial(answer, advantage=leave_one_out, **OPEN)),
    "answer_clip": Estimator(
        "sequence-level ratio, clipped", "clipped answers", partial(answer, advantage=leave_one_out, **CLIP)
    ),
}
KL = {
    "reward": Estimator(
        "k1 in the reward, to go", "∇KL(π‖π_ref)", partial(by_token, advantage=partial(kl_reward, to_go=True))
    ),
    "answer": Estimator(
        "k1 in the reward, whole", "∇KL(π‖π_ref)", partial(by_token, advantage=partial(kl_reward, to_go=False))
    ),
    "k2": Estimator("k2 in the loss", "Σ_t ∇KL_t(π‖π_ref)", partial(kl_in_loss, kl=losses.kl_k2)),
    "k3": Estimator("k3 in the loss", "Σ_t ∇KL_t(π_ref‖π)", partial(kl_in_loss, kl=losses.kl_k3)),
    "k1": Estimator("k1 in the loss", "0", partial(kl_in_loss, kl=losses.kl_k1)),
}

"""The estimators of studies/estimators.py, put together from the library as the training scripts do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minir1 import enumeration as exact
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
from minir1.losses import (
    cispo,
    clipped_surrogate,
    grpo_sequence,
    gspo,
    kl_k1,
    kl_k2,
    kl_k3,
    reinforce,
    truncated_importance,
)
from minir1.reduction import fixed_length, per_answer_mean, token_mean

G = 4
TOKENS, MASK = exact.answers(3, 2)
Y, T = TOKENS.shape
DRAWN = exact.draws(Y, G)
REWARDS = torch.tensor([0, 1, 0, 0, 1, 0, 0], dtype=torch.float64)  # right: a token, and then the end
WIDE = MASK.double()


class Problem:
    """One prompt: a policy that samples, and, where it has moved since, the one that learns; a reference."""

    def __init__(self, logits: Tensor, moved: Tensor, reference: Tensor):
        self.logits = moved.clone().requires_grad_()
        self.lp, self.ref_lp = exact.tabular(self.logits, TOKENS), exact.tabular(reference, TOKENS)
        self.logp, self.ref_logp = (exact.chosen(x, TOKENS, MASK) for x in (self.lp, self.ref_lp))
        self.sampler = exact.chosen(exact.tabular(logits, TOKENS), TOKENS, MASK)
        self.scores = exact.scores(self.logp, [self.logits])

    def gradient(self, value: Tensor) -> Tensor:
        """∇ of a number by this problem's logits."""
        return exact.gradient(value, [self.logits])

    def moments(self, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
        """The expectation of g [n] and tr Cov g, over the draws of the policy that sampled."""
        found = exact.estimates(loss, self.logp, self.scores, DRAWN)
        return exact.moments(found, exact.probability_of(self.sampler, DRAWN))


def problems(step: float = 0.0) -> list[Problem]:
    """A hard problem and an even one; the policy moved by `step` since it sampled."""
    found = []
    for number, ends in enumerate((-1.5, 1.5)):
        noise = torch.Generator().manual_seed(number)
        logits, way, off = (torch.randn(4, 3, dtype=torch.float64, generator=noise) for _ in range(3))
        logits = 0.7 * logits
        logits[1:, 0] += ends
        found.append(Problem(logits, logits + step * way, logits + 0.7 * off))
    return found


@dataclass(frozen=True)
class Estimator:
    """What is put together, and what it is known to come to."""

    label: str
    claim: str
    loss: Callable[..., Callable[[Tensor], Tensor]]  # problem -> weighted loss of log-probs [M·G, T]
    whole_batch: bool = False  # the loss takes the answers to the other problem too, [G]: they enter A or the weight


# ---- parts ------------------------------------------------------------------------------------

ROWS = DRAWN.flatten()
ROW_MASK = MASK[ROWS]
FIXED = fixed_length(ROW_MASK.double(), 1, G)  # length 1: the scale of ∇J
PER_ANSWER = per_answer_mean(ROW_MASK.double(), G)

# Answers of the same length and reward have the same advantage and weight: the first of each kind stands for all.
KIND = ((WIDE.sum(1)[:, None] == WIDE.sum(1)) & (REWARDS[:, None] == REWARDS)).int().argmax(1)  # [Y]
OWN, OWN_OF = KIND[DRAWN].unique(dim=0, return_inverse=True)  # [·, G], [M]
OTHER, OTHER_OF = KIND[DRAWN].sort(1)[0].unique(dim=0, return_inverse=True)  # order does not matter here


def spread(advantage: Tensor) -> Tensor:
    """[M, G] -> [M·G, T]."""
    return advantage.reshape(-1, 1).expand(-1, T)


def plain(advantage: Callable[[Tensor], Tensor], weight: Tensor = FIXED):
    """REINFORCE with an advantage that is made of the draw's rewards."""
    A = spread(advantage(REWARDS[DRAWN]))
    return lambda problem: lambda logp: weight * reinforce(logp, A)


def surrogate(loss, advantage, weight: Tensor = FIXED, masked: bool = False, **clips):
    """A loss with a ratio to the sampler."""
    A, more = spread(advantage(REWARDS[DRAWN])), clips | ({"mask": ROW_MASK} if masked else {})
    return lambda problem: lambda logp: weight * loss(logp, problem.sampler[ROWS], A, **more)


def tokens(advantage: Callable[[Problem], Tensor]):
    """REINFORCE with an advantage for each token of each answer, [Y, T]."""
    return lambda problem: lambda logp: FIXED * reinforce(logp, advantage(problem)[ROWS])


def constant(problem: Problem) -> Tensor:
    """A value that is wrong: 0.5 everywhere."""
    return torch.full_like(WIDE, 0.5)


def true_value(problem: Problem) -> Tensor:
    """V of the policy, exactly."""
    return exact.state_values(problem.logp.detach(), REWARDS, TOKENS, MASK)


def lam(value: Callable[[Problem], Tensor], λ: float):
    """GAE with a value."""
    return tokens(lambda problem: gae(at_last_token(REWARDS, MASK), value(problem), MASK, 1.0, λ)[0])


def beside(make: Callable[[Tensor], Tensor], other: Tensor) -> Tensor:
    """make(all 2G answers of the batch) -> [2G, T], of which the own part of every draw: [M·G, T]."""
    return torch.stack([make(torch.cat((own, other)))[:G] for own in OWN])[OWN_OF].flatten(0, 1)


def of_batch(loss, advantage: Callable[[Tensor], Tensor], weight: Callable[[Tensor], Tensor]):
    """A loss whose advantage and weight see the 2G answers of the batch; both make [2G, T] of them."""

    def at(problem: Problem, other: Tensor):
        A, w = beside(advantage, other), beside(weight, other)
        old = () if loss is reinforce else (problem.sampler[ROWS],)
        return lambda logp: w * loss(logp, *old, A)

    return at


def centered_over_batch(rows: Tensor) -> Tensor:
    return batch_centered(REWARDS[rows].view(2, G)).view(-1, 1).expand(-1, T)


def whitened_over_batch(rows: Tensor) -> Tensor:
    return whiten(discounted_returns(at_last_token(REWARDS[rows], MASK[rows]), MASK[rows], 1.0), MASK[rows])


def normalised_in_group(rows: Tensor) -> Tensor:
    return group_advantages(REWARDS[rows].view(2, G)).view(-1, 1).expand(-1, T)


def fixed_over_batch(rows: Tensor) -> Tensor:
    return fixed_length(WIDE[rows], 1, len(rows))


def tokens_of_batch(rows: Tensor) -> Tensor:
    return token_mean(WIDE[rows], int(MASK[rows].sum()))


# ---- on policy, moved, KL ---------------------------------------------------------------------

ON_POLICY = {
    "reinforce": Estimator("REINFORCE", "∇J", plain(lambda r: r)),
    "constant": Estimator("REINFORCE, b = ½", "∇J", plain(lambda r: r - 0.5)),
    "rloo": Estimator("RLOO", "∇J", plain(leave_one_out)),
    "gae_1": Estimator("GAE, λ = 1, wrong V", "∇J", lam(constant, 1.0)),
    "gae_true": Estimator("GAE, λ = 0, exact V", "∇J", lam(true_value, 0.0)),
    "batch": Estimator(
        "REINFORCE, batch mean", "(N-1)/N ∇J", of_batch(reinforce, centered_over_batch, fixed_over_batch), True
    ),
    "dr_grpo": Estimator("Dr. GRPO", "(G-1)/G ∇J", surrogate(clipped_surrogate, group_centered)),
    "std": Estimator("GRPO, no 1/|o|", "mean of w(p) ∇p", surrogate(clipped_surrogate, group_advantages)),
    "sequence": Estimator(
        "GRPO by answers",
        "mean of w(p) ∇p",
        surrogate(grpo_sequence, group_advantages, PER_ANSWER, True, clip_low=10.0, clip_high=10.0),
    ),
    "length": Estimator(
        "GRPO, no std", "(G-1)/G Cov(R, ∇log π/|o|)", surrogate(clipped_surrogate, group_centered, PER_ANSWER)
    ),
    "grpo": Estimator("GRPO", "both at once", surrogate(clipped_surrogate, group_advantages, PER_ANSWER)),
    "gspo": Estimator(
        "GSPO", "as GRPO", surrogate(gspo, group_advantages, PER_ANSWER, True, clip_low=3e-4, clip_high=4e-4)
    ),
    "token": Estimator(
        "DAPO", "w(p), 1/Σ|o| of the batch", of_batch(clipped_surrogate, normalised_in_group, tokens_of_batch), True
    ),
    "plus_plus": Estimator(
        "REINFORCE++",
        "one mean, one std, 1/Σ|o| of the batch",
        of_batch(clipped_surrogate, whitened_over_batch, tokens_of_batch),
        True,
    ),
    "discount": Estimator(
        "REINFORCE, γ = ½",
        "late tokens count more",
        tokens(lambda problem: discounted_returns(at_last_token(REWARDS, MASK), MASK, 0.5)),
    ),
    "gae_95": Estimator("GAE, λ = 0.95, wrong V", "(1-λ) error of V", lam(constant, 0.95)),
    "gae_0": Estimator("GAE, λ = 0, wrong V", "error of V", lam(constant, 0.0)),
}
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
OPEN = {"clip_low": 10.0, "clip_high": 1e9}
CAP = 1.2  # of the truncated weight


def importance(cap: float):
    """REINFORCE with the weight that mends a sampler."""
    A = spread(leave_one_out(REWARDS[DRAWN]))

    def loss(problem: Problem):
        weight = FIXED * truncated_importance(problem.logp, problem.sampler, cap)[ROWS]
        return lambda logp: weight * reinforce(logp, A)

    return loss


MOVED = {
    "none": Estimator("no ratio", "as if it had sampled", plain(leave_one_out)),
    "token": Estimator(
        "ratio a token", "states, and what follows", surrogate(clipped_surrogate, leave_one_out, **OPEN)
    ),
    "clip": Estimator(
        "ratio a token, clipped", "and clipped tokens", surrogate(clipped_surrogate, leave_one_out, **CLIP)
    ),
    "cispo": Estimator("CISPO", "and cut weights", surrogate(cispo, leave_one_out, **CLIP)),
    "tis": Estimator(f"truncated at {CAP}", "and cut weights", importance(CAP)),
    "answer": Estimator("ratio an answer", "∇J", surrogate(grpo_sequence, leave_one_out, PER_ANSWER, True, **OPEN)),
    "answer_clip": Estimator(
        "ratio an answer, clipped", "clipped answers", surrogate(grpo_sequence, leave_one_out, PER_ANSWER, True, **CLIP)
    ),
}


def term(kl):
    """A KL term in the loss; as ascent, so that it estimates -∇KL."""
    return lambda problem: lambda logp: FIXED * kl(logp, problem.ref_logp.detach()[ROWS])


def in_reward(to_go: bool):
    """k1 as a reward: of the tokens to come, or of the whole answer."""

    def advantage(problem: Problem) -> Tensor:
        earned = kl_in_reward(torch.zeros_like(WIDE), problem.logp, problem.ref_logp, MASK, 1.0)
        return discounted_returns(earned, MASK, 1.0) if to_go else earned.sum(1, keepdim=True).expand(-1, T)

    return tokens(advantage)


KL = {
    "reward": Estimator("k1 in the reward, to go", "∇KL(π‖π_ref)", in_reward(True)),
    "answer": Estimator("k1 in the reward, whole", "∇KL(π‖π_ref)", in_reward(False)),
    "k2": Estimator("k2 in the loss", "Σ_t ∇KL_t(π‖π_ref)", term(kl_k2)),
    "k3": Estimator("k3 in the loss", "Σ_t ∇KL_t(π_ref‖π)", term(kl_k3)),
    "k1": Estimator("k1 in the loss", "0", term(kl_k1)),
}

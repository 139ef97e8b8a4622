"""The objectives against exact gradients: every answer, or every group of answers, is enumerated in float64.

Three tokens, one of them the end, and two steps make seven answers of one or two tokens, and 2,401 groups of four. The
policy is a table of logits, and for the main claims a small transformer too. The library's advantages, losses and
reductions, composed as in the scripts, are compared with J(θ) and its gradient.
"""

import math

import pytest
import torch

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
    moving_average,
    whiten,
)
from minir1.model.config import dense
from minir1.model.transformer import Transformer
from minir1.reduction import fixed_length, per_answer_mean, token_mean

TOKENS, MASK = exact.answers(3, 2)
Y, T = TOKENS.shape
WIDE = MASK.double()  # weights in float64
LENGTH = WIDE.sum(1)
RIGHT = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
REWARDS = RIGHT + 0.1 * torch.tensor([0.0, 1.0, 3.0, -2.0, 0.5, 1.0, -1.0], dtype=torch.float64)
EXACT = {"atol": 1e-12, "rtol": 0}


class Policy:
    """log π(· | x_<t) [Y, T, V], log π of the answers' tokens [Y, T], and their scores [Y, T, n]."""

    def __init__(self, lp, parameters):
        self.lp, self.parameters = lp, parameters
        self.logp = exact.chosen(lp, TOKENS, MASK)
        self.scores = exact.scores(self.logp, parameters)

    def gradient(self, value):
        return exact.gradient(value, self.parameters)

    def mean(self, loss, drawn):
        """The expected ascent direction of a loss over draws."""
        actual = exact.estimates(loss, self.logp, self.scores, drawn)
        return exact.moments(actual, exact.probability_of(self.logp, drawn))[0]


def table(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def tabular(seed: int) -> Policy:
    parameters = table(seed)
    return Policy(exact.tabular(parameters, TOKENS), [parameters])


def transformer(seed: int) -> Policy:
    """Two layers of width 8; the prompt is token 3, which has no probability in an answer.

    log π comes from `logprob`, as in the scripts, for rows that differ in one token.
    """
    torch.manual_seed(seed)
    model = Transformer(dense(vocab=4, dim=8, layers=2, heads=2, kv_heads=1, ffn=8, init_std=0.5)).double()
    rows = torch.cat((torch.full((Y, 1), 3), TOKENS), 1)
    lp = []
    for t in range(1, T + 1):
        changed = rows.repeat(3, 1)
        changed[:, t] = torch.arange(3).repeat_interleave(Y)
        lp.append(model.logprob(changed, lengths=torch.full((3 * Y,), T + 1))[:, t].view(3, Y).T)
    return Policy(torch.stack(lp, 1).log_softmax(-1), list(model.parameters()))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tabular(0)


@pytest.fixture(scope="module", params=[tabular, transformer], ids=["table", "transformer"])
def either(request) -> Policy:
    return request.param(0)


ONES = exact.draws(Y, 1)
PAIRS = exact.draws(Y, 2)
FOURS = exact.draws(Y, 4)


def truth(policy: Policy, rewards=REWARDS) -> torch.Tensor:
    return policy.gradient(exact.expected_reward(policy.logp, rewards))


def summed(drawn, advantage, loss=losses.reinforce, weights=None, **more):
    """The loss of draws [M, G] with their advantages [M, G], as in the scripts; the default weight is 1/G."""
    A = advantage.reshape(-1, 1).expand(-1, T)
    weight = fixed_length(WIDE[drawn.flatten()], 1, drawn.shape[1]) if weights is None else weights

    def total(logp):
        old = () if loss is losses.reinforce else (logp.detach(),)
        return weight * loss(logp, *old, A, **more)

    return total


def assert_close(actual, expected, **tolerance):
    assert expected.norm() > 1e-3, "a comparison with zero"
    torch.testing.assert_close(actual, expected, **(tolerance or EXACT))


def parallel(actual, expected) -> float:
    """The factor between two vectors of the same direction."""
    factor = (actual @ expected / (expected @ expected)).item()
    torch.testing.assert_close(actual, factor * expected, **EXACT)
    return factor


# ---- the oracle itself --------------------------------------------------------------------------


def test_every_answer_is_listed_once():
    assert TOKENS.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
    assert LENGTH.tolist() == [1, 2, 2, 2, 2, 2, 2]
    tokens, mask = exact.answers(2, 3, end=1)
    assert [row[:n].tolist() for row, n in zip(tokens, mask.sum(1))] == [[1], [0, 1], [0, 0, 0], [0, 0, 1]]
    assert len(exact.answers(2, 8)[0]) == 9
    for wrong in ((1, 2, 0), (2, 0, 0), (2, 2, 2)):
        with pytest.raises(ValueError, match=f"vocab = {wrong[0]}, longest = {wrong[1]}, end = {wrong[2]}"):
            exact.answers(*wrong)
    assert exact.draws(3, 2).tolist() == [[a, b] for a in range(3) for b in range(3)]


def test_the_probabilities_sum_to_one(either):
    assert either.logp.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert exact.probability_of(either.logp, FOURS).sum().item() == pytest.approx(1, abs=1e-12)
    mean_score = either.logp.detach().sum(1).exp() @ either.scores.sum(1)
    assert mean_score.abs().max() < 1e-12  # E ∇ log π = 0


def test_the_gradient_of_j_by_finite_differences():
    base, step = table(0).detach(), 1e-6

    def J(parameters):
        return exact.expected_reward(exact.chosen(exact.tabular(parameters, TOKENS), TOKENS, MASK), REWARDS).item()

    expected = [(J(base + step * e) - J(base - step * e)) / (2 * step) for e in torch.eye(12).view(12, 4, 3)]
    torch.testing.assert_close(truth(tabular(0)), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    uniform = REWARDS[0] / 3 + REWARDS[1:].sum() / 9  # one token, or two
    assert J(torch.zeros(4, 3, dtype=torch.float64)) == pytest.approx(uniform.item())


def test_the_value_of_a_state_is_the_mean_of_what_follows(policy):
    """V of the empty prefix is J; E[V of the next state] is V, since the reward comes at the end."""
    values = exact.state_values(policy.logp.detach(), REWARDS, TOKENS, MASK)
    J = exact.expected_reward(policy.logp, REWARDS).item()
    assert values[:, 0].tolist() == pytest.approx([J] * Y)
    p = policy.lp.detach().exp()[1:4, 1].diagonal()  # after token 1: answers 1 to 3 are the tokens 0, 1, 2
    assert values[1, 1].item() == pytest.approx((p @ REWARDS[1:4]).item()) and values[0, 1] == 0


def test_a_sequence_kl_is_the_expected_sum_of_its_steps(policy):
    other = tabular(1)
    whole = exact.sequence_kl(policy.logp, other.logp)
    steps = policy.logp.sum(1).exp() @ exact.step_kl(policy.lp, other.lp, MASK).sum(1)
    assert whole.item() == pytest.approx(steps.item(), abs=1e-12) and whole > 0.1


# ---- baselines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [0.0, 0.7, -3.0, "moving"])
def test_reinforce_is_unbiased_with_any_baseline_that_is_independent_of_the_answer(either, baseline):
    if baseline == "moving":  # of the batches before
        baseline = moving_average(moving_average(None, torch.tensor([1.0]), 0.9), torch.tensor([0.2, 0.6]), 0.9)
    assert_close(either.mean(summed(ONES, REWARDS[ONES] - baseline), ONES), truth(either))


def test_the_mean_of_the_batch_shortens_the_step_by_one_answer_in_n(policy):
    """(N - 1)/N: N = 4 answers, two to each of two problems that have their own tables."""
    tables = [table(0), table(5)]
    logp = [exact.chosen(exact.tabular(t, TOKENS), TOKENS, MASK) for t in tables]
    both = torch.cat(logp)  # 14 answers, the first seven to the first problem
    rewards = torch.cat((REWARDS, REWARDS.flip(0)))
    drawn = torch.cat((FOURS[:, :2], FOURS[:, 2:] + Y), 1)
    A = torch.stack([batch_centered(r.view(2, 2)).flatten() for r in rewards[drawn]])
    weight = fixed_length(torch.cat((WIDE, WIDE))[drawn.flatten()], 1, 4)
    loss = lambda logp: weight * losses.reinforce(logp, A.reshape(-1, 1).expand(-1, T))
    actual = exact.estimates(loss, both, exact.scores(both, tables), drawn)
    mean, _ = exact.moments(actual, exact.probability_of(both, drawn))
    J = sum(exact.expected_reward(x, r) for x, r in zip(logp, (REWARDS, REWARDS.flip(0)))) / 2
    assert_close(mean, 3 / 4 * exact.gradient(J, tables))


@pytest.mark.parametrize("drawn", [PAIRS, FOURS], ids=["G=2", "G=4"])
def test_leave_one_out_is_unbiased_and_dr_grpo_is_g_minus_one_over_g_times_the_gradient(either, drawn):
    G, J = drawn.shape[1], truth(either)
    assert_close(either.mean(summed(drawn, leave_one_out(REWARDS[drawn])), drawn), J)
    centered = summed(drawn, group_centered(REWARDS[drawn]), losses.clipped_surrogate)
    assert_close(either.mean(centered, drawn), (G - 1) / G * J)


# ---- the normalisations of GRPO -----------------------------------------------------------------


def test_the_length_normalisation_is_the_gradient_of_another_objective(policy):
    """1/G Σ_i (r_i - mean r) s_i with s_i = ∇ log π(y_i) / |y_i| has the expectation (G-1)/G · Cov(r, s)."""
    p = policy.logp.detach().sum(1).exp()
    s = policy.scores.sum(1) / LENGTH.unsqueeze(1)
    covariance = (p * REWARDS) @ s - (p @ REWARDS) * (p @ s)
    weights = per_answer_mean(WIDE[FOURS.flatten()], 4)
    A = group_centered(REWARDS[FOURS])
    actual = policy.mean(summed(FOURS, advantage=A, loss=losses.clipped_surrogate, weights=weights), FOURS)
    assert_close(actual, 3 / 4 * covariance)
    J = truth(policy)
    assert torch.nn.functional.cosine_similarity(actual, J, dim=0) < 0.999  # another direction


def test_token_mean_weighs_an_answer_by_the_length_of_its_group(policy):
    """DAPO: with 1 / Σ_j |y_j| of the group, unlike 1/(G·L), the direction is not that of the gradient either."""
    lengths = LENGTH[FOURS].sum(1)
    weights = torch.cat([token_mean(WIDE[row], int(n)) for row, n in zip(FOURS, lengths)])
    A = group_centered(REWARDS[FOURS])
    actual = policy.mean(summed(FOURS, advantage=A, loss=losses.clipped_surrogate, weights=weights), FOURS)
    p, whole = exact.probability_of(policy.logp, FOURS), policy.scores.sum(1)
    assert_close(actual, sum((p * A[:, i] / lengths) @ whole[FOURS[:, i]] for i in range(4)))
    assert torch.nn.functional.cosine_similarity(actual, truth(policy), dim=0) < 0.99999


def deviation_weight(p: float, G: int = 4) -> float:
    """w(p) = (G-1)/G Σ_k C(G-2, k-1) p^{k-1} (1-p)^{G-k-1} / σ_k,  σ_k² = k (G-k) / (G (G-1)), k right answers of G."""
    sigma = {k: math.sqrt(k * (G - k) / (G * (G - 1))) for k in range(1, G)}
    terms = (math.comb(G - 2, k - 1) * p ** (k - 1) * (1 - p) ** (G - k - 1) / sigma[k] for k in range(1, G))
    return (G - 1) / G * sum(terms)


@pytest.mark.parametrize("drawn", [PAIRS, FOURS], ids=["G=2", "G=4"])
def test_the_deviation_weighs_a_problem_by_its_difficulty(policy, drawn):
    """Binary rewards: E of GRPO's direction is w(p)·∇p, p the probability of a right answer."""
    A = group_advantages(RIGHT[drawn], eps=0.0).nan_to_num()
    equal = (RIGHT[drawn] == RIGHT[drawn][:, :1]).all(1, keepdim=True)
    A = A.masked_fill(equal, 0.0)
    actual = policy.mean(summed(drawn, advantage=A, loss=losses.clipped_surrogate), drawn)
    w = deviation_weight(exact.expected_reward(policy.logp, RIGHT).item(), drawn.shape[1])
    assert_close(actual, w * truth(policy, RIGHT))


def test_two_problems_are_reweighted_by_their_chance_of_success():
    """The gradient of a problem is multiplied by w(p), which is larger for p near 0 and 1 than for p near 1/2."""
    w = deviation_weight
    assert w(0.01) > w(0.2) > w(0.5) and w(0.01) == pytest.approx(w(0.99)) and w(1e-9) == pytest.approx(1.5, abs=1e-6)
    assert w(0.5) == pytest.approx(0.75 * (0.25 * 2 + 0.5 * math.sqrt(3) + 0.25 * 2))
    hard, even = 0.5 * table(3).detach(), 0.5 * table(4).detach()
    hard[1:, 0] -= 4  # the answers that end in time are right
    even[1:, 0] += 1
    weights, chances, A = [], [], group_advantages(RIGHT[FOURS], eps=1e-12)
    for logits in (hard, even):
        one = Policy(exact.tabular(logits.requires_grad_(), TOKENS), [logits])
        weights.append(parallel(one.mean(summed(FOURS, advantage=A), FOURS), truth(one, RIGHT)))
        chances.append(exact.expected_reward(one.logp, RIGHT).item())
    assert chances[0] < 0.05 < 0.2 < chances[1] < 0.8
    assert weights == pytest.approx([w(p) for p in chances], abs=1e-9) and weights[0] > 1.05 * weights[1]


# ---- ratio one ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, more",
    [
        (losses.clipped_surrogate, {}),
        (losses.clipped_surrogate, {"dual_clip": 3.0}),
        (losses.clipped_surrogate, {"clip_low": 0.2, "clip_high": 0.28}),
        (losses.cispo, {"clip_low": 1.0, "clip_high": 0.2}),
    ],
)
def test_at_ratio_one_a_clipped_objective_is_reinforce(either, loss, more):
    A = leave_one_out(REWARDS[PAIRS])
    assert_close(either.mean(summed(PAIRS, advantage=A, loss=loss, **more), PAIRS), truth(either))


def test_at_ratio_one_a_ratio_of_the_whole_answer_is_reinforce_and_gspo_is_normalised(policy):
    A = leave_one_out(REWARDS[PAIRS]).reshape(-1, 1).expand(-1, T)
    mask, weight = MASK[PAIRS.flatten()], per_answer_mean(WIDE[PAIRS.flatten()], 2)
    whole = lambda logp: weight * losses.grpo_sequence(logp, logp.detach(), A, 0.2, 0.2, mask)
    assert_close(policy.mean(whole, PAIRS), truth(policy))
    geometric = lambda logp: weight * losses.gspo(logp, logp.detach(), A, 3e-4, 4e-4, mask)
    p, s = policy.logp.detach().sum(1).exp(), policy.scores.sum(1) / LENGTH.unsqueeze(1)
    assert_close(policy.mean(geometric, PAIRS), (p * REWARDS) @ s - (p @ REWARDS) * (p @ s))


# ---- returns, values ----------------------------------------------------------------------------


def per_token(advantage):
    """A loss of single answers with an advantage for every token, [Y, T]."""
    return lambda logp: WIDE * losses.reinforce(logp, advantage)


def test_a_return_to_go_is_unbiased_and_a_discount_is_not(either):
    earned = at_last_token(REWARDS, MASK)
    assert_close(either.mean(per_token(discounted_returns(earned, MASK, 1.0)), ONES), truth(either))
    half = either.mean(per_token(discounted_returns(earned, MASK, 0.5)), ONES)
    p, discount = either.logp.detach().sum(1).exp(), 0.5 ** (LENGTH.unsqueeze(1) - 1 - torch.arange(T)) * WIDE
    by_hand = torch.einsum("y,yt,ytn->n", p * REWARDS, discount, either.scores)
    assert_close(half, by_hand)
    assert (half - truth(either)).norm() > 0.05 * truth(either).norm()


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_with_the_exact_value_is_unbiased_at_any_lambda(either, lam):
    values = exact.state_values(either.logp.detach(), REWARDS, TOKENS, MASK)
    advantage, _ = gae(at_last_token(REWARDS, MASK), values, MASK, 1.0, lam)
    assert_close(either.mean(per_token(advantage), ONES), truth(either))


def test_gae_with_a_wrong_value_is_unbiased_at_lambda_one_only(policy):
    """Otherwise the bias is E Σ_t ∇ log π_t · (1 - λ) e(s_{t+1}) for two steps, e the error of V."""
    true = exact.state_values(policy.logp.detach(), REWARDS, TOKENS, MASK)
    error = torch.zeros(Y, T, dtype=torch.float64)
    error[:, 0], error[1:4, 1], error[4:, 1] = 0.3, -0.8, 0.5  # one number per state
    p = policy.logp.detach().sum(1).exp()
    for lam in (1.0, 0.95, 0.0):
        advantage, _ = gae(at_last_token(REWARDS, MASK), (true + error) * MASK, MASK, 1.0, lam)
        actual = policy.mean(per_token(advantage), ONES)
        bias = (1 - lam) * torch.einsum("y,yn->n", p * error[:, 1] * MASK[:, 1], policy.scores[:, 0])
        assert_close(actual, truth(policy) + bias)
        assert (bias.norm() == 0) == (lam == 1.0)


def test_an_answer_that_cannot_be_drawn_adds_nothing_to_a_divergence():
    """p = (3/4, 1/4, 0) against (1/2, 1/2, 0), one token an answer; with mass only in the reference too."""
    ln, rows = math.log, ([math.log(0.75), math.log(0.25), -math.inf], [-math.log(2), -math.log(2), -math.inf])
    p, q = (torch.tensor(row, dtype=torch.float64) for row in rows)
    want = 0.75 * ln(3) - ln(2)
    other = torch.tensor([ln(0.25), ln(0.5), ln(0.25)], dtype=torch.float64)
    for ref, value in ((q, want), (other, 0.75 * ln(3) + 0.25 * ln(0.5))):
        assert exact.sequence_kl(p.unsqueeze(1), ref.unsqueeze(1)).item() == pytest.approx(value)
        assert exact.step_kl(p.view(1, 1, 3), ref.view(1, 1, 3), torch.ones(1, 1).bool()).item() == pytest.approx(value)
    assert exact.sequence_kl(other.unsqueeze(1), p.unsqueeze(1)).item() == math.inf


def test_whitening_is_a_baseline_and_a_scale_of_the_draw(policy):
    """REINFORCE++: shifted by the draw's own mean over tokens and divided by its deviation, so biased.

    With n_i tokens of reward R_i: mean μ = Σ n_i R_i / Σ n_i, variance Σ n_i (R_i - μ)² / (Σ n_i - 1).
    """
    rows = PAIRS.flatten()
    R_i, n = REWARDS[PAIRS], LENGTH[PAIRS]
    mean = (n * R_i).sum(1, keepdim=True) / n.sum(1, keepdim=True)
    variance = (n * (R_i - mean) ** 2).sum(1, keepdim=True) / (n.sum(1, keepdim=True) - 1)
    white = (R_i - mean) / (variance + 1e-8).sqrt()
    white[R_i[:, 0] == R_i[:, 1]] = 0.0
    p, whole = exact.probability_of(policy.logp, PAIRS), policy.scores.sum(1)
    by_hand = sum((p * white[:, i] / 2) @ whole[PAIRS[:, i]] for i in range(2))
    A = REWARDS[rows].unsqueeze(1) * WIDE[rows]
    A = torch.stack([whiten(a, m) for a, m in zip(A.view(-1, 2, T), MASK[rows].view(-1, 2, T))]).view(-1, T)
    actual = policy.mean(lambda logp: WIDE[rows] / 2 * losses.reinforce(logp, A), PAIRS)
    assert_close(actual, by_hand)
    J = truth(policy)
    assert 0.7 < torch.nn.functional.cosine_similarity(actual, J, dim=0).item() < 0.9999


# ---- longer answers -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(2, 8), (3, 3)], ids=["9 of up to 8", "15 of up to 3"])
def longer(request):
    """Tokens, mask, log π of policy and reference, ∇ log π, rewards, logits; λ² needs more than two steps."""
    noise = torch.Generator().manual_seed(1)
    tokens, mask = exact.answers(*request.param)
    states = (request.param[0] ** request.param[1] - 1) // (request.param[0] - 1)
    logits = 0.6 * torch.randn(states, request.param[0], dtype=torch.float64, generator=noise)
    logits[:, 0] -= 0.7  # long answers are likely
    reference = logits + 0.5 * torch.randn(logits.shape, dtype=torch.float64, generator=noise)
    logits.requires_grad_()
    lp = [exact.tabular(x, tokens) for x in (logits, reference)]
    logp = [exact.chosen(x, tokens, mask) for x in lp]
    rewards = torch.randn(len(tokens), dtype=torch.float64, generator=noise)
    return tokens, mask, lp, logp, exact.scores(logp[0], [logits]), rewards, logits


def expected_over(longer, advantage=None, loss=None):
    """E of the ascent direction of single answers: of REINFORCE with an advantage [Y, T], or of a loss."""
    tokens, mask, _, (logp, _), scores, *_ = longer
    loss = loss or (lambda x: mask.double() * losses.reinforce(x, advantage))
    actual = exact.estimates(loss, logp, scores, exact.draws(len(tokens), 1))
    return exact.moments(actual, logp.detach().sum(1).exp())[0]


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_the_bias_of_gae_over_many_steps(longer, lam):
    """E Σ_t ∇ log π_t · (1 - λ) Σ_{l>=0} λ^l e(s_{t+1+l}), e the error of the value, at γ = 1."""
    tokens, mask, _, (logp, _), scores, rewards, logits = longer
    earned, J = at_last_token(rewards, mask), exact.gradient(exact.expected_reward(logp, rewards), [logits])
    value = exact.state_values(logp.detach(), rewards, tokens, mask)
    assert_close(expected_over(longer, gae(earned, value, mask, 1.0, lam)[0]), J)
    length = tokens.shape[1]
    error = torch.sin(3.0 * value + torch.arange(length)) * mask  # one number per state
    behind = torch.zeros_like(error)
    for t in range(length):
        for u in range(t + 1, length):
            behind[:, t] += (1 - lam) * lam ** (u - t - 1) * error[:, u]
    bias = torch.einsum("y,yt,ytn->n", logp.detach().sum(1).exp(), behind, scores)
    assert_close(expected_over(longer, gae(earned, value + error, mask, 1.0, lam)[0]), J + bias)
    assert (bias.norm() < 1e-12) == (lam == 1.0)


def test_the_gradients_of_kl_terms_over_many_steps(longer):
    _, mask, (lp, ref_lp), (logp, ref_logp), scores, _, logits = longer
    p, steps = logp.detach().sum(1).exp(), exact.step_kl(lp, ref_lp, mask)
    whole = exact.gradient(exact.sequence_kl(logp, ref_logp), [logits])
    forward = exact.gradient(p @ steps.sum(1), [logits])
    reverse = exact.gradient(p @ exact.step_kl(ref_lp, lp, mask).sum(1), [logits])
    later = (steps.flip(1).cumsum(1).flip(1) - steps).detach()
    assert_close(forward + torch.einsum("y,yt,ytn->n", p, later, scores), whole)
    for kl, expected in ((losses.kl_k2, forward), (losses.kl_k3, reverse)):
        assert_close(-expected_over(longer, loss=lambda x: mask.double() * kl(x, ref_logp)), expected)
    earned = kl_in_reward(torch.zeros_like(logp), logp, ref_logp, mask, 1.0)
    assert_close(-expected_over(longer, discounted_returns(earned, mask, 1.0)), whole)
    assert (expected_over(longer, discounted_returns(earned, mask, 0.9)) + whole).norm() > 0.01 * whole.norm()


# ---- KL -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[tabular, transformer], ids=["table", "transformer"])
def pair(request):
    """A policy and its reference."""
    return request.param(0), request.param(1)


def in_the_loss(kl, policy, reference):
    """The expected gradient of the term."""
    return -policy.mean(lambda logp: WIDE * kl(logp, reference.logp.detach()), ONES)


def test_k1_and_k3_are_unbiased_for_the_kl_and_k2_is_not(pair):
    policy, reference = pair
    p = policy.logp.detach().sum(1).exp()
    want = exact.sequence_kl(policy.logp, reference.logp).item()
    for kl, unbiased in ((losses.kl_k1, True), (losses.kl_k3, True), (losses.kl_k2, False)):
        actual = (p @ (kl(policy.logp, reference.logp) * WIDE).sum(1)).item()
        assert (abs(actual - want) < 1e-12) == unbiased


def test_k1_in_the_loss_does_nothing_in_expectation(pair):
    policy, reference = pair
    assert in_the_loss(losses.kl_k1, policy, reference).abs().max() < 1e-12
    k1 = lambda logp: WIDE * losses.kl_k1(logp, reference.logp.detach())
    single = exact.estimates(k1, policy.logp, policy.scores, ONES)
    assert single.norm(dim=1).min() > 1e-2  # a single gradient is not zero: it is noise


def test_k2_in_the_loss_is_the_gradient_of_every_steps_kl_without_its_effect_on_later_steps(pair):
    """∇KL(π‖π_ref) = E Σ_t ∇KL_t + E Σ_t ∇ log π_t · Σ_{u>t} KL_u."""
    policy, reference = pair
    p, steps = policy.logp.detach().sum(1).exp(), exact.step_kl(policy.lp, reference.lp.detach(), MASK)
    k2 = in_the_loss(losses.kl_k2, policy, reference)
    assert_close(k2, policy.gradient(p @ steps.sum(1)))  # the states are fixed
    later = (steps.flip(1).cumsum(1).flip(1) - steps).detach()
    missing = torch.einsum("y,yt,ytn->n", p, later, policy.scores)
    whole = policy.gradient(exact.sequence_kl(policy.logp, reference.logp.detach()))
    assert_close(k2 + missing, whole)
    assert missing.norm() > 0.01 * whole.norm()


def test_k3_in_the_loss_is_the_gradient_of_the_kl_from_reference_to_policy(pair):
    policy, reference = pair
    p = policy.logp.detach().sum(1).exp()
    reverse = policy.gradient(p @ exact.step_kl(reference.lp.detach(), policy.lp, MASK).sum(1))
    actual = in_the_loss(losses.kl_k3, policy, reference)
    assert_close(actual, reverse)
    assert torch.nn.functional.cosine_similarity(actual, in_the_loss(losses.kl_k2, policy, reference), dim=0) < 0.999


def test_k1_in_the_reward_to_go_is_the_gradient_of_the_whole_kl(pair):
    policy, reference = pair
    earned = kl_in_reward(torch.zeros(Y, T).double(), policy.logp, reference.logp, MASK, 1.0)
    actual = policy.mean(per_token(discounted_returns(earned, MASK, 1.0)), ONES)
    whole = policy.gradient(exact.sequence_kl(policy.logp, reference.logp.detach()))
    assert_close(-actual, whole)


def test_reward_and_kl_together_are_the_penalised_objective(pair):
    """As in experiments/reinforce.py: J - β KL in one reward."""
    policy, reference = pair
    earned = kl_in_reward(at_last_token(REWARDS, MASK), policy.logp, reference.logp, MASK, 0.3)
    actual = policy.mean(per_token(discounted_returns(earned, MASK, 1.0)), ONES)
    kl = exact.sequence_kl(policy.logp, reference.logp.detach())
    assert_close(actual, policy.gradient(exact.expected_reward(policy.logp, REWARDS) - 0.3 * kl))


# ---- after the policy has moved ------------------------------------------------------------------


def displaced(policy: Policy, old: Policy, loss) -> torch.Tensor:
    """E over answers of `old` of the ascent direction of a loss [Y, T] at `policy`."""
    actual = exact.estimates(loss, policy.logp, policy.scores, ONES)
    return exact.moments(actual, exact.probability_of(old.logp, ONES))[0]


@pytest.fixture(scope="module")
def moved():
    """A policy that has moved, and the one that sampled."""
    start = table(0)
    away = (start + 0.3 * table(9)).detach().requires_grad_()
    return Policy(exact.tabular(away, TOKENS), [away]), Policy(exact.tabular(start, TOKENS), [start])


R = REWARDS.unsqueeze(1).expand(-1, T)


def test_a_sequence_level_ratio_corrects_the_whole_answer_and_a_per_token_ratio_its_own_token(moved):
    policy, old = moved
    sampled, want = old.logp.detach(), truth(policy)
    uncorrected = displaced(policy, old, lambda logp: WIDE * losses.reinforce(logp, R))
    none = (10.0, 1e9)
    token = displaced(policy, old, lambda logp: WIDE * losses.clipped_surrogate(logp, sampled, R, *none))
    weight = per_answer_mean(WIDE, 1)
    whole = displaced(policy, old, lambda logp: weight * losses.grpo_sequence(logp, sampled, R, *none, MASK))
    assert_close(whole, want)
    # A per-token ratio corrects its own step: Σ_s d_old(s) Σ_a ∇π(a|s) Q_old(s, a). The distribution of states, and
    # the values of the tokens that follow, are still those of the old policy.
    Q = exact.state_values(sampled, REWARDS, TOKENS, MASK)[:, 1] + REWARDS * (LENGTH == 1)  # V_old after token 0, or R
    starts = [0, 1, 4]  # one answer for each first token
    objective = (policy.logp[starts, 0].exp() * Q[starts]).sum()
    objective = objective + (sampled[:, 0].exp() * policy.logp[:, 1].exp() * REWARDS)[LENGTH == 2].sum()
    assert_close(token, policy.gradient(objective))
    assert 0.01 < (token - want).norm() / want.norm() < (uncorrected - want).norm() / want.norm()


def test_importance_weights_correct_for_another_sampler(moved):
    """Without a cap they are exact for the first token; a cap adds a bias."""
    policy, sampler = moved
    short = MASK & (LENGTH == 1).unsqueeze(1) | torch.tensor([[True, False]])  # only the first token is judged
    first = torch.tensor([0.3, 1.0, 1.0, 1.0, -0.5, -0.5, -0.5], dtype=torch.float64)  # a reward of the first token
    want = truth(policy, first)
    advantage = (first.unsqueeze(1) * short).double()

    def actual(cap):
        w = losses.truncated_importance(policy.logp, sampler.logp, cap)
        return displaced(policy, sampler, lambda logp: short.double() * w * losses.reinforce(logp, advantage))

    assert_close(actual(math.inf), want)
    plain = displaced(policy, sampler, lambda logp: short.double() * losses.reinforce(logp, advantage))
    weight = losses.truncated_importance(policy.logp, sampler.logp, math.inf)[:, 0]
    cap = 0.5 * (weight.max() + weight[weight < weight.max()].max()).item()  # truncates the weight of one token
    cut = weight > cap
    p = sampler.logp.detach().sum(1).exp()
    bias = torch.einsum("y,yn->n", p * first * (cap - weight) * cut, policy.scores[:, 0])
    assert_close(actual(cap), want + bias)
    assert 0 < bias.norm() < (plain - want).norm()


def test_the_clip_removes_exactly_the_clipped_tokens(moved):
    """After a move the clipped surrogate lacks the contributions of the tokens of `is_clipped`."""
    policy, old = moved
    sampled = old.logp.detach()
    centered = R - (old.logp.detach().sum(1).exp() @ REWARDS)
    free = displaced(policy, old, lambda logp: WIDE * losses.clipped_surrogate(logp, sampled, centered, 10.0, 1e9))
    actual = displaced(policy, old, lambda logp: WIDE * losses.clipped_surrogate(logp, sampled, centered, 0.1, 0.1))
    cut = losses.is_clipped(policy.logp, sampled, centered, 0.1, 0.1) & MASK
    ratio = (policy.logp.detach() - sampled).exp()
    lost = torch.einsum("y,yt,ytn->n", old.logp.detach().sum(1).exp(), ratio * centered * cut, policy.scores)
    assert cut.any() and not cut[MASK].all()
    assert_close(actual, free - lost)
    near = displaced(policy, old, lambda logp: WIDE * losses.clipped_surrogate(logp, sampled, centered, 0.99, 99.0))
    assert_close(near, free)  # no ratio has left this interval


def test_the_four_cases_of_the_clip_through_the_policy():
    """One step, two tokens: A > 0 and A < 0, the ratio above and below; the gradient is r A ∇ log π or nothing."""
    tokens, mask = exact.answers(2, 1)
    for ratio, advantage, has_gradient in ((1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False)):
        logits = torch.tensor([[0.2, -0.4]], dtype=torch.float64, requires_grad=True)
        logp = exact.chosen(exact.tabular(logits, tokens), tokens, mask)
        old = logp.detach() - math.log(ratio)
        score = exact.scores(logp, [logits])
        A = torch.tensor([[advantage], [0.0]], dtype=torch.float64)  # only token 0 is judged
        loss = lambda rows: losses.clipped_surrogate(rows, old, A, 0.2, 0.2)
        actual = exact.estimates(loss, logp, score, exact.draws(2, 1))[0]
        torch.testing.assert_close(actual, has_gradient * ratio * advantage * score[0, 0], **EXACT)


# ---- groups without signal -----------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [group_advantages, group_centered, leave_one_out])
def test_equal_rewards_have_no_gradient(policy, advantage):
    A = advantage(torch.full((len(PAIRS), 2), 0.1, dtype=torch.float64))
    loss = summed(PAIRS, A, losses.clipped_surrogate)
    actual = exact.estimates(loss, policy.logp, policy.scores, PAIRS)
    assert torch.equal(actual, torch.zeros_like(actual))

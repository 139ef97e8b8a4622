"""preference.py: identities, numbers by hand, and optima of policies small enough to enumerate."""

import math

import pytest
import torch
from torch import Tensor

from minir1.preference import agreement, bradley_terry, calibration, calibration_error, dpo, implicit_reward

log, exp = math.log, math.exp


def vector(*values, grad=False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def gradient(loss: Tensor, of: Tensor) -> list[float]:
    return torch.autograd.grad(loss.sum(), of)[0].flatten().tolist()


def noise(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- Bradley-Terry -----------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    """e^0 : e^0 is a draw; a gap of log 3 is 3 to 1; a margin is subtracted from the gap."""
    chosen, rejected = vector(2.0, log(3.0), 0.0, log(3.0)), vector(2.0, 0.0, log(3.0), 0.0)
    expected = vector(log(2), log(4 / 3), log(4), log(2))
    torch.testing.assert_close(bradley_terry(chosen, rejected, vector(0, 0, 0, log(3.0))), expected)
    # Smoothed: a quarter of the labels swapped, 3/4·log(4/3) + 1/4·log 4.
    smooth = bradley_terry(chosen, rejected, label_smoothing=0.25)
    torch.testing.assert_close(smooth[1], 0.75 * vector(4 / 3).log()[0] + 0.25 * vector(4.0).log()[0])
    assert bradley_terry(vector(1.0), vector(0.0), 1.0).item() == pytest.approx(log(2))


def test_the_gradient_is_the_chance_of_being_wrong():
    chosen, rejected = vector(log(3.0), -1.0, grad=True), vector(0.0, 1.0, grad=True)
    loss = bradley_terry(chosen, rejected, 0.5)
    wrong = [1 / (1 + exp(gap - 0.5)) for gap in (log(3.0), -2.0)]
    assert gradient(loss, chosen) == pytest.approx([-p for p in wrong])
    assert gradient(bradley_terry(chosen, rejected, 0.5), rejected) == pytest.approx(wrong)


def test_only_the_difference_of_two_rewards_counts():
    chosen, rejected, shift = noise(50), noise(50, seed=1), 100 * noise(50, seed=2)
    for more in ({}, {"margin": 0.3}, {"label_smoothing": 0.1}, {"margin": 0.3, "label_smoothing": 0.1}):
        loss = bradley_terry(chosen, rejected, **more)
        torch.testing.assert_close(bradley_terry(chosen + shift, rejected + shift, **more), loss)
        assert not torch.allclose(bradley_terry(chosen + shift, rejected, **more), loss)


def test_the_two_orders_of_a_pair_are_one_distribution():
    a, b = noise(50), noise(50, seed=1)
    torch.testing.assert_close((-bradley_terry(a, b)).exp() + (-bradley_terry(b, a)).exp(), torch.ones(50).double())


def test_label_smoothing_is_the_expectation_over_swapped_labels():
    a, b = noise(50), noise(50, seed=1)
    for margin in (0.0, 0.7):
        expected = 0.8 * bradley_terry(a, b, margin) + 0.2 * bradley_terry(b, a, margin)
        torch.testing.assert_close(bradley_terry(a, b, margin, label_smoothing=0.2), expected)
    gap = vector(log(0.8 / 0.2), grad=True)  # where it is least
    assert gradient(bradley_terry(gap, vector(0.0), label_smoothing=0.2), gap) == pytest.approx([0], abs=1e-12)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_that_erases_the_label_is_refused(smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing = {smoothing}: 0 to below 0.5"):
        bradley_terry(vector(1.0), vector(0.0), label_smoothing=smoothing)


def test_large_gaps_neither_overflow_nor_vanish():
    chosen, rejected = torch.tensor([1e4, -1e4], requires_grad=True), torch.tensor([-1e4, 1e4])
    loss = bradley_terry(chosen, rejected, label_smoothing=0.1)
    assert loss.tolist() == pytest.approx([2e3, 1.8e4]) and gradient(loss, chosen) == pytest.approx([0.1, -0.9])


def test_an_infinite_gap_is_certain():
    """Without smoothing no term of it is 0·∞."""
    inf = vector(math.inf, grad=True)
    assert bradley_terry(inf, vector(0.0)).item() == 0 and bradley_terry(vector(0.0), inf).item() == math.inf
    assert gradient(bradley_terry(inf, vector(0.0)), inf) == [0]


def test_two_shapes_are_refused():
    """[4] against [4, 1] would be all sixteen pairs of pairs."""
    x, y = noise(4), noise(4, 1)
    for call in (
        *(lambda: bradley_terry(x, y), lambda: bradley_terry(x, x, y), lambda: implicit_reward(x, y, 0.1)),
        *(lambda: dpo(x, y, x, y, 0.1), lambda: dpo(x, x, y, x, 0.1), lambda: dpo(x, x, x, y, 0.1)),
        lambda: agreement(x, y),
    ):
        with pytest.raises(ValueError, match=r"shapes \[.*\(4, 1\).*\]: all must have one shape"):
            call()
    with pytest.raises(ValueError, match=r"gap of shape \(4, 4\)"):
        calibration(x - y, 5)


def test_half_precision_is_upcast():
    chosen, rejected = (x.bfloat16() for x in (noise(9), noise(9, seed=1)))
    logs = [x.bfloat16() for x in noise(4, 9)]
    for f in (
        lambda a, b, c, d: dpo(a, b, c, d, 0.3, 0.1),
        lambda a, b, c, d: bradley_terry(a, b, c, 0.1),
        lambda a, b, c, d: implicit_reward(a, b, 0.3),
        lambda a, b, c, d: agreement(a, b),
    ):
        assert f(*logs).dtype == torch.float32 and torch.equal(f(*logs), f(*(x.float() for x in logs)))
    loss = bradley_terry(chosen, rejected)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, bradley_terry(chosen.float(), rejected.float()))
    assert implicit_reward(chosen, rejected, 0.1).dtype == torch.float32
    assert bradley_terry(noise(2), noise(2)).dtype == torch.float64


def minimise(loss, parameters: Tensor) -> Tensor:
    """The minimum of a smooth convex loss."""
    optimizer = torch.optim.LBFGS([parameters], lr=1, max_iter=500, tolerance_grad=1e-13, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    optimizer.step(closure)
    return parameters.detach()


REWARD = vector(0.3, -1.2, 2.0, 0.9)  # of four answers to one prompt
PREFERRED = (REWARD.unsqueeze(1) - REWARD).sigmoid()  # P(i preferred to j)
FIRST, SECOND = (~torch.eye(4, dtype=bool)).nonzero().T  # every ordered pair


def test_the_likeliest_rewards_are_the_true_ones_up_to_a_shift():
    def loss(r):
        return (PREFERRED[FIRST, SECOND] * bradley_terry(r[FIRST], r[SECOND])).sum()

    found = minimise(loss, vector(0.0, 0.0, 0.0, 0.0, grad=True))
    torch.testing.assert_close(found - found.mean(), REWARD - REWARD.mean(), atol=1e-7, rtol=0)


# ---- DPO ---------------------------------------------------------------------------------------


def test_implicit_reward_by_hand():
    logp, ref = vector(log(0.5), log(0.1), grad=True), vector(log(0.25), log(0.2), grad=True)
    reward = implicit_reward(logp, ref, 0.1)
    torch.testing.assert_close(reward.detach(), vector(0.1 * log(2), -0.1 * log(2)))
    assert gradient(reward, logp) == pytest.approx([0.1, 0.1])
    assert not implicit_reward(logp.detach(), ref, 0.1).requires_grad  # the reference is fixed
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"beta = {beta}: above 0"):
            implicit_reward(logp, ref, beta)


def test_dpo_by_hand():
    """π/π_ref is 2 for the chosen and 1/2 for the rejected answer: β = 1 makes it 4 to 1, β = ½ 2 to 1."""
    logs = [vector(log(p)) for p in (0.5, 0.1, 0.25, 0.2)]
    assert dpo(*logs, beta=1.0).item() == pytest.approx(log(5 / 4))
    assert dpo(*logs, beta=0.5).item() == pytest.approx(log(3 / 2))
    assert dpo(*logs, beta=1.0, label_smoothing=0.1).item() == pytest.approx(0.9 * log(5 / 4) + 0.1 * log(5))


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_at_the_reference_the_gradient_is_half_of_beta(beta):
    logp = noise(2, 20).requires_grad_()
    loss = dpo(*logp, *logp.detach(), beta=beta)
    torch.testing.assert_close(loss, torch.full((20,), log(2)).double())
    assert gradient(loss, logp) == pytest.approx([-beta / 2] * 20 + [beta / 2] * 20)
    smooth = dpo(*logp, *logp.detach(), beta=beta, label_smoothing=0.1)
    assert gradient(smooth, logp) == pytest.approx([-0.4 * beta] * 20 + [0.4 * beta] * 20)


def test_dpo_is_bradley_terry_on_implicit_rewards_and_beta_their_scale():
    c, r, ref_c, ref_r = noise(4, 30)
    expected = bradley_terry(2.5 * (c - ref_c), 2.5 * (r - ref_r), label_smoothing=0.2)
    torch.testing.assert_close(dpo(c, r, ref_c, ref_r, 2.5, 0.2), expected)
    torch.testing.assert_close(dpo(5 * c, 5 * r, 5 * ref_c, 5 * ref_r, 0.5, 0.2), expected)
    shift = noise(30, seed=5)
    torch.testing.assert_close(dpo(c + shift, r + shift, ref_c, ref_r, 2.5, 0.2), expected)  # both may fall


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_minimum_is_the_optimal_policy_of_the_kl_penalty(beta):
    """π* ∝ π_ref e^{r/β}, of answers of one token, from all pairs with their true preferences."""
    ref = noise(4, seed=3).log_softmax(0)

    def loss(theta):
        logp = theta.log_softmax(0)
        pairs = dpo(logp[FIRST], logp[SECOND], ref[FIRST], ref[SECOND], beta)
        return (PREFERRED[FIRST, SECOND] * pairs).sum()

    found = minimise(loss, vector(0.0, 0.0, 0.0, 0.0, grad=True)).log_softmax(0)
    torch.testing.assert_close(found, (ref + REWARD / beta).log_softmax(0), atol=1e-6, rtol=0)
    best, value = found.exp(), lambda p: (p * (REWARD - beta * (p.log() - ref))).sum()
    others = (found + 0.1 * noise(100, 4)).softmax(1)
    assert all(value(p) < value(best) for p in others)  # it is the maximum of E[r] - β KL(π‖π_ref)


def test_the_minimum_for_answers_of_two_tokens():
    """Log-probs are summed over the tokens: the four answers are the leaves of a tree of three distributions."""
    ref = noise(3, 2, seed=4).log_softmax(1)

    def answers(step):  # [3, 2] log-probs -> [4] of whole answers
        return torch.stack([step[0, a] + step[1 + a, b] for a in (0, 1) for b in (0, 1)])

    def loss(theta):
        logp, fixed = answers(theta.view(3, 2).log_softmax(1)), answers(ref)
        return (PREFERRED[FIRST, SECOND] * dpo(logp[FIRST], logp[SECOND], fixed[FIRST], fixed[SECOND], 0.7)).sum()

    found = answers(minimise(loss, torch.zeros(6).double().requires_grad_()).view(3, 2).log_softmax(1))
    torch.testing.assert_close(found, (answers(ref) + REWARD / 0.7).log_softmax(0), atol=1e-6, rtol=0)


# ---- calibration -------------------------------------------------------------------------------


def test_agreement_by_hand():
    assert agreement(vector(1, 0, 0.5), vector(0, 1, 0.5)).tolist() == [1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="a reward is NaN"):
        agreement(vector(1.0, math.nan), vector(0.0, 0.0))


def test_calibration_by_hand():
    """Four pairs said to be 3 to 1, three of them rightly; one draw; one certain and right."""
    gap = vector(*[log(3.0)] * 3, -log(3.0), 0.0, 100.0)
    count, confidence, accuracy = found = calibration(gap, bins=5)  # 0.5, 0.6, 0.7, 0.8, 0.9, 1
    assert count.tolist() == [1, 0, 4, 0, 1]
    assert confidence.tolist() == pytest.approx([0.5, 0, 0.75, 0, 1])
    assert accuracy.tolist() == pytest.approx([0.5, 0, 0.75, 0, 1])
    assert calibration_error(found) == pytest.approx(0, abs=1e-12)
    # The same confidence with every pair wrong: 4/6·0.75 + 1/6·0 + 1/6·1
    assert calibration_error(calibration(-gap.abs(), bins=5)) == pytest.approx((4 * 0.75 + 1) / 6)
    assert calibration_error(calibration(vector(log(3.0)), bins=1)) == pytest.approx(0.25)  # surer than said
    # Errors of two bins do not cancel: three pairs said to be 3 to 1 are right, one said to be 19 to 1 is not.
    both = calibration(vector(*[log(3.0)] * 3, -log(19.0)), bins=5)
    assert calibration_error(both) == pytest.approx(3 / 4 * 0.25 + 1 / 4 * 0.95)


def test_true_rewards_are_calibrated_and_stretched_ones_are_not():
    gap = 2 * noise(20000)
    swapped = torch.rand(20000, generator=torch.Generator().manual_seed(1)).double() > gap.sigmoid()
    gap = torch.where(swapped, -gap, gap)  # preferred with chance σ(gap)
    assert calibration_error(calibration(gap, 10)) < 0.02
    assert calibration_error(calibration(3 * gap, 10)) > 0.08
    assert calibration_error(calibration(gap / 3, 10)) > 0.08
    assert calibration(gap, 10).count.sum() == 20000


@pytest.mark.parametrize("gap, bins", [(vector(), 5), (vector(1.0), 0), (vector(1.0, math.nan), 5)])
def test_calibration_of_nothing_is_refused(gap, bins):
    with pytest.raises(ValueError, match="at least one bin and one pair, all finite"):
        calibration(gap, bins)

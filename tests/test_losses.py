"""losses.py: numbers worked by hand and identities."""

import math
import re

import pytest
import torch
from torch import Tensor

from minir1.losses import (
    cispo,
    clipped_surrogate,
    entropy_bonus,
    grpo_sequence,
    gspo,
    is_clipped,
    kl_k1,
    kl_k2,
    kl_k3,
    nll,
    reinforce,
    truncated_importance,
    value_loss,
)
from minir1.reduction import per_answer_mean, weighted_sum

log = math.log


def grid(*values, grad=False) -> Tensor:
    return torch.tensor([values], dtype=torch.float64, requires_grad=grad)


SURROGATES = (clipped_surrogate, cispo, gspo, grpo_sequence)


def gradient(loss: Tensor, of: Tensor) -> list[float]:
    return torch.autograd.grad(loss.sum(), of)[0].flatten().tolist()


def test_nll_and_reinforce_by_hand():
    logp = grid(-0.5, -2.0, 0.0, grad=True)
    assert nll(logp).tolist() == [[0.5, 2.0, 0.0]] and gradient(nll(logp), logp) == [-1, -1, -1]
    advantage = grid(2.0, -1.0, 3.0, grad=True)
    loss = reinforce(logp, advantage)
    assert loss.tolist() == [[1.0, -2.0, 0.0]] and gradient(loss, logp) == [-2, 1, -3]


# dual clip, ratio, advantage, loss, gradient in log π (-r A inside the interval 0.8 … 1.2 and 0 where clipped)
CASES = [
    (None, 1.5, 1.0, -1.2, 0.0),  # a gain beyond the interval is clipped
    (None, 1.5, -1.0, 1.5, 1.5),  # a loss is not
    (None, 0.5, 1.0, -0.5, -0.5),
    (None, 0.5, -1.0, 0.8, 0.0),
    (None, 1.1, 2.0, -2.2, -2.2),  # inside, both are the same
    (None, 0.9, -2.0, 1.8, 1.8),
    (None, 1.0, 3.0, -3.0, -3.0),
    (None, 1.5, 0.0, 0.0, 0.0),
    (3.0, 4.0, -1.0, 3.0, 0.0),  # the dual clip concerns losses alone: A < 0 and a ratio beyond c
    (3.0, 2.9, -1.0, 2.9, 2.9),
    (3.0, 4.0, 1.0, -1.2, 0.0),  # clipped by ε already
    (3.0, 0.5, -2.0, 1.6, 0.0),
    (3.0, 4.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("dual, ratio, advantage, loss, slope", CASES)
def test_clipped_surrogate_by_hand(dual, ratio, advantage, loss, slope):
    old, A = grid(-2.5), grid(advantage)
    logp = (old + log(ratio)).requires_grad_()
    value = clipped_surrogate(logp, old, A, dual_clip=dual)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert gradient(value, logp) == pytest.approx([slope], abs=1e-12)
    assert is_clipped(logp, old, A, dual_clip=dual).item() == (slope == 0 and advantage != 0)
    assert torch.equal(clipped_surrogate(logp, old, A, dual_clip=math.inf), clipped_surrogate(logp, old, A))


def test_two_clips():
    old, ratio = grid(-1.0, -1.0, -1.0, -1.0), grid(1.25, 1.35, 0.85, 0.75)
    logp, advantage = old + ratio.log(), grid(1.0, 1.0, -1.0, -1.0)
    loss = clipped_surrogate(logp, old, advantage, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss, grid(-1.25, -1.3, 0.85, 0.8))
    assert is_clipped(logp, old, advantage, 0.2, 0.3).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_that_overflows_is_clipped_and_never_nan(dtype):
    """exp(1000) is infinite: a gain is clipped at 1 + ε, a loss at c if there is one, an advantage of 0 gives 0."""
    old, mask = torch.full((1, 3), -1000.0, dtype=dtype), torch.ones(1, 3)
    logp = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    for advantage, value in ((torch.ones(1, 3), -1.2), (torch.zeros(1, 3), 0.0)):
        whole = (clipped_surrogate(logp, old, advantage), gspo(logp, old, advantage, 0.2, 0.2, mask))
        for loss in (*whole, grpo_sequence(logp, old, advantage, 0.2, 0.2, mask)):
            assert loss.flatten().tolist() == pytest.approx([value] * 3) and gradient(loss, logp) == [0, 0, 0]
    nothing = torch.zeros(1, 3)
    for loss in (clipped_surrogate(logp, old, nothing, 0.2, math.inf), cispo(logp, old, nothing, 1.0, math.inf)):
        assert loss.flatten().tolist() == [0, 0, 0] and gradient(loss, logp) == [0, 0, 0]
    bounded = clipped_surrogate(logp, old, -torch.ones(1, 3), dual_clip=3.0)
    assert bounded.flatten().tolist() == pytest.approx([3.0] * 3) and gradient(bounded, logp) == [0, 0, 0]
    assert clipped_surrogate(logp, old, -torch.ones(1, 3)).isinf().all()  # nothing bounds it: the run must stop
    assert truncated_importance(logp, old, 2.0).tolist() == [[2.0] * 3]


@pytest.mark.parametrize("clip_low", [0.2, 1.0, 10.0])
def test_the_objective_is_the_lesser_of_the_two(clip_low):
    """As PPO's paper writes it, term by term; at ε_low >= 1 nothing is clipped below."""
    generator = torch.Generator().manual_seed(3)
    old, logp, advantage = (torch.randn(30, 40, generator=generator, dtype=torch.float64) for _ in range(3))
    ratio = (logp - old).exp()
    want = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1.3) * advantage)
    torch.testing.assert_close(clipped_surrogate(logp, old, advantage, clip_low, 0.3), -want)
    dual = torch.where(advantage < 0, torch.maximum(want, 2 * advantage), want)
    torch.testing.assert_close(clipped_surrogate(logp, old, advantage, clip_low, 0.3, 2.0), -dual)


@pytest.mark.parametrize("dual", [1.0, -2.0, math.nan])
def test_a_dual_clip_of_one_would_stop_every_punishment(dual):
    for f in (clipped_surrogate, is_clipped):
        with pytest.raises(ValueError, match=f"dual_clip = {dual}: above 1, or None"):
            f(grid(-1.0), grid(-1.0), grid(-1.0), dual_clip=dual)


@pytest.mark.parametrize("low, high", [(-0.1, 0.2), (0.2, -2.0), (math.nan, 0.2)])
def test_an_interval_without_one_is_refused(low, high):
    mask = torch.ones(1, 1)
    for loss, more in ((f, (mask,) if f in (gspo, grpo_sequence) else ()) for f in (*SURROGATES, is_clipped)):
        with pytest.raises(ValueError, match=f"clip_low = {low}, clip_high = {high}: 0 or more"):
            loss(grid(-1.0), grid(-1.0), grid(1.0), low, high, *more)


@pytest.mark.parametrize("dual", [None, 2.0])
def test_is_clipped_exactly_where_there_is_no_gradient(dual):
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(40, 50, generator=generator)
    logp = (old + 0.5 * torch.randn(40, 50, generator=generator)).requires_grad_()
    advantage = torch.randn(40, 50, generator=generator)
    loss = clipped_surrogate(logp, old, advantage, 0.2, 0.28, dual)
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    clipped = is_clipped(logp, old, advantage, 0.2, 0.28, dual)
    assert torch.equal(clipped, slope == 0) and 0.1 < clipped.float().mean() < 0.6
    assert clipped.dtype == torch.bool and not clipped.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clip_of_ten_bounds_ratios_above_eleven_alone(dtype):
    """ε = 10, as in R1's first RL stage: 1 - ε is below every ratio, so the loss is exactly -r A for r in (0, 11)."""
    ratio = torch.tensor([[1e-6, 0.01, 0.5, 1.0, 3.0, 10.9, 11.1, 40.0]], dtype=dtype)
    for sign in (1.0, -1.0):
        logp, old, A = ratio.log().requires_grad_(), torch.zeros_like(ratio), torch.full_like(ratio, 0.7 * sign)
        loss, r = clipped_surrogate(logp, old, A, 10.0, 10.0), logp.detach().exp()
        (slope,) = torch.autograd.grad(loss.sum(), logp)
        inside, clipped = (slice(0, 6), is_clipped(logp, old, A, 10.0, 10.0)) if sign > 0 else (slice(0, 8), None)
        assert torch.equal(loss[:, inside], -(r * A)[:, inside]) and torch.equal(slope[:, inside], -(r * A)[:, inside])
        if sign > 0:
            assert clipped.tolist() == [[False] * 6 + [True] * 2] and slope[0, 6:].tolist() == [0, 0]
            torch.testing.assert_close(loss[0, 6:], torch.tensor([-7.7, -7.7], dtype=dtype))
        else:
            assert not is_clipped(logp, old, A, 10.0, 10.0).any()


def sample(rows=6, columns=9):
    """logp that needs a gradient, advantage, and a mask of ragged answers."""
    generator = torch.Generator().manual_seed(1)
    logp = (-3 * torch.rand(rows, columns, generator=generator).double()).requires_grad_()
    advantage = torch.randn(rows, 1, generator=generator).double().expand(rows, columns)
    ends = torch.randint(3, columns + 1, (rows, 1), generator=generator)
    mask = (torch.arange(columns) >= 2) & (torch.arange(columns) < ends)
    return logp, advantage, mask


def test_at_ratio_one_all_have_the_gradient_of_reinforce():
    logp, advantage, mask = sample()
    weight = mask.double() / mask.sum(1, keepdim=True)
    want = gradient(weight * reinforce(logp, advantage), logp)
    old = logp.detach().clone()
    assert gradient(weight * clipped_surrogate(logp, old, advantage), logp) == pytest.approx(want, abs=1e-12)
    assert gradient(weight * cispo(logp, old, advantage, 0.2, 0.2), logp) == pytest.approx(want, abs=1e-12)
    assert gradient(weight * gspo(logp, old, advantage, 0.2, 0.2, mask), logp) == pytest.approx(want, abs=1e-12)
    dual = clipped_surrogate(logp, old, advantage, dual_clip=3.0)
    assert gradient(weight * dual, logp) == pytest.approx(want, abs=1e-12)
    even = gradient(mask * reinforce(logp, advantage), logp)  # every token alike, whatever the length
    whole = grpo_sequence(logp, old, advantage, 0.2, 0.2, mask)
    assert gradient(weight * whole, logp) == pytest.approx(even, abs=1e-12)
    assert not is_clipped(logp, old, advantage).any()


def test_cispo_by_hand():
    """Beyond the interval the weight is that of its edge, and no token loses its gradient."""
    old, ratio = grid(-1.0, -1.0, -1.0), grid(1.5, 0.5, 1.1)
    logp = (old + ratio.log()).requires_grad_()
    advantage = grid(1.0, -2.0, 3.0)
    loss = cispo(logp, old, advantage, 0.2, 0.2)
    weight = [1.2 * 1, 0.8 * -2, 1.1 * 3]
    assert gradient(loss, logp) == pytest.approx([-w for w in weight], abs=1e-12)
    assert loss.flatten().tolist() == pytest.approx([-w * x for w, x in zip(weight, logp.flatten().tolist())])
    free = gradient(cispo(logp, old, advantage, 1.0, math.inf), logp)  # off-policy REINFORCE: -r A
    assert free == pytest.approx([-1.5, 1.0, -3.3], abs=1e-12)


def test_gspo_by_hand():
    """Two tokens of ratio 2 and 1/2 make a sequence of ratio 1; of 1.21 and 1, one of ratio 1.1."""
    mask = torch.tensor([[False, True, True], [False, True, True], [False, True, True], [False, False, False]])
    ratio = torch.cat((grid(7, 2, 0.5), grid(7, 1.21, 1), grid(7, 4, 1), grid(7, 7, 7)))
    old = torch.full((4, 3), -1.0).double()
    logp = (old + ratio.log()).requires_grad_()
    advantage = grid(3, -1, 1, 1).T.expand(4, 3)
    loss = gspo(logp, old, advantage, 0.2, 0.2, mask)
    want = grid(-3, 1.1, -1.2, -1).T.expand(4, 3)  # the third, of ratio 2, is clipped
    torch.testing.assert_close(loss, want)
    # The mean over its tokens has the gradient -s A / |y| at each of them.
    slope = gradient(loss * mask / 2, logp)
    assert slope == pytest.approx([0, -1.5, -1.5, 0, 0.55, 0.55, 0, 0, 0, 0, 0, 0], abs=1e-12)


def test_masked_tokens_do_not_enter_the_ratio_of_gspo():
    logp, advantage, mask = sample()
    old = logp.detach() - 0.1
    want = gspo(logp, old, advantage, 0.2, 0.2, mask)
    other = logp.detach().masked_fill(~mask, -float("inf"))
    assert torch.equal(gspo(other, old, advantage, 0.2, 0.2, mask), want)


# value, old value, return, loss, gradient at clip 0.2
VALUES = [
    (1.1, 1.0, 2.0, 0.5 * 0.9**2, -0.9),  # near the old value: the plain square
    (1.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0),  # towards the return, but too far: clipped at 1.2
    (0.5, 1.0, 2.0, 0.5 * 1.5**2, -1.5),  # away from the return: not clipped
    (2.5, 1.0, 0.0, 0.5 * 2.5**2, 2.5),
    (0.5, 1.0, 0.0, 0.5 * 0.8**2, 0.0),  # clipped at 0.8
]


@pytest.mark.parametrize("value, old, target, loss, slope", VALUES)
def test_value_loss_by_hand(value, old, target, loss, slope):
    value = grid(value, grad=True)
    found = value_loss(value, grid(old), grid(target), 0.2)
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert gradient(found, value) == pytest.approx([slope], abs=1e-12)
    plain = value_loss(value, grid(old), grid(target), math.inf)
    assert plain.item() == pytest.approx(0.5 * (value.item() - target) ** 2)
    assert gradient(plain, value) == pytest.approx([value.item() - target])


# ---- KL; tests/test_enumeration.py checks the expectations of the estimators and of their gradients


def test_kl_by_hand():
    logp, ref = grid(log(0.5), log(0.2), log(0.3)), grid(log(0.25), log(0.4), log(0.3))
    ln2 = log(2)
    torch.testing.assert_close(kl_k1(logp, ref), grid(ln2, -ln2, 0.0))
    torch.testing.assert_close(kl_k2(logp, ref), grid(ln2**2 / 2, ln2**2 / 2, 0.0))
    torch.testing.assert_close(kl_k3(logp, ref), grid(0.5 + ln2 - 1, 2 - ln2 - 1, 0.0))


def test_k3_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    logp, ref = (-5 * torch.rand(100, 100, generator=generator) for _ in range(2))
    k3 = kl_k3(logp, ref)
    assert k3.min() >= -1e-6 and kl_k3(logp.double(), ref.double()).min() >= 0  # fp32 rounds near 0
    assert not kl_k3(logp, logp).any()


def test_the_value_clip_is_no_less_than_0():
    assert value_loss(grid(1.0), grid(0.5), grid(3.0), 0.0).item() == pytest.approx(3.125)  # V_old is held
    for clip in (-0.1, math.nan):
        with pytest.raises(ValueError, match="clip = .*: 0 or more, infinite for none"):
            value_loss(grid(1.0), grid(0.5), grid(3.0), clip)


# ---- all of them


def every_loss(x, old, advantage, mask):
    return {
        "nll": nll(x),
        "reinforce": reinforce(x, advantage),
        "clipped_surrogate": clipped_surrogate(x, old, advantage),
        "cispo": cispo(x, old, advantage, 0.2, 0.2),
        "gspo": gspo(x, old, advantage, 0.2, 0.2, mask),
        "grpo_sequence": grpo_sequence(x, old, advantage, 0.2, 0.2, mask),
        "dual": clipped_surrogate(x, old, advantage, dual_clip=3.0),
        "value_loss": value_loss(x, old, advantage, 0.2),
        "kl_k1": kl_k1(x, old),
        "kl_k2": kl_k2(x, old),
        "kl_k3": kl_k3(x, old),
    }


def test_nan_and_infinity_at_padding_change_nothing():
    """Whatever stands at padding in any input, the weighted sum and its gradient have the bits of those with zeros;
    the log-probs of the policy are masked on their way in, as the model's are."""
    logp, advantage, mask = sample()
    weight = per_answer_mean(mask, len(mask))
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(2))
    inputs = [x.detach().float() for x in (logp, logp + 0.1 * noise, advantage)]

    def results(value, masked):
        padded = [x.masked_fill(~mask, value if i in masked else 0.0) for i, x in enumerate(inputs)]
        x = padded[0].requires_grad_()
        losses = every_loss(x.masked_fill(~mask, 0.0), *padded[1:], mask)
        losses["tis"] = truncated_importance(padded[1], padded[0], 2.0) * losses["clipped_surrogate"]
        sums = {name: weighted_sum(weight, loss) for name, loss in losses.items()}
        return {name: (total, torch.autograd.grad(total, x, retain_graph=True)[0]) for name, total in sums.items()}

    want = results(0.0, ())
    assert all(slope.isfinite().all() and slope[mask].any() for _, slope in want.values())
    for value in (math.nan, math.inf, -math.inf):
        for masked in ((0,), (1,), (2,), (0, 1, 2)):
            for name, found in results(value, masked).items():
                assert all(torch.equal(a, b) for a, b in zip(found, want[name])), (name, value, masked)


def test_a_nan_at_a_trained_token_reaches_the_gradient():
    """So that the run stops, whatever the sign of the advantage: torch's clamp would give it the gradient 0."""
    for A in (1.0, -1.0, 0.0):
        for dual in (None, 3.0):
            for f in SURROGATES:
                logp, old = grid(-1.0, -1.0, grad=True), grid(math.nan, -1.0)
                more = (torch.ones(1, 2),) if f in (gspo, grpo_sequence) else ()
                more = (dual,) if f is clipped_surrogate else more
                assert math.isnan(gradient(f(logp, old, grid(A, A), 0.2, 0.2, *more), logp)[0])
                assert f(logp, old, grid(A, A), 0.2, 0.2, *more)[0, 0].isnan()


def test_a_token_of_probability_0_by_hand():
    """log π = -∞: the ratio is 0. Without an advantage nothing is learned, and 0·∞ is 0, not NaN."""
    old, none = grid(-1.0), grid(0.0)
    logp = grid(-math.inf, grad=True)
    mask = torch.ones(1, 1)
    losses = [reinforce(logp, none), *(f(logp, old, none, 0.2, 0.2) for f in (clipped_surrogate, cispo))]
    losses += [f(logp, old, none, 0.2, 0.2, mask) for f in (gspo, grpo_sequence)]
    losses += [clipped_surrogate(logp, old, none, dual_clip=3.0), cispo(logp, old, grid(2.0), 1.0, 0.2)]  # r log π -> 0
    losses += [clipped_surrogate(logp, old, grid(2.0))]  # r A = 0, and its gradient as well
    for loss in losses:
        assert loss.item() == 0 and gradient(loss, logp) == [0]
    assert clipped_surrogate(logp, old, grid(-2.0)).item() == pytest.approx(1.6)  # clipped at 0.8
    assert reinforce(logp, grid(1.0)).item() == math.inf and nll(logp).item() == math.inf
    assert is_clipped(logp, old, grid(-1.0)).item() and not is_clipped(logp, old, none).item()


def test_divergences_of_impossible_tokens_by_hand():
    """log π, log π_ref and k1, k2, k3 with π_ref/π - log(π_ref/π) - 1: 0 where both are impossible, ∞ where one is."""
    inf = math.inf
    for x, ref, want in ((-inf, -inf, (0, 0, 0)), (-inf, -1.0, (-inf, inf, inf)), (-1.0, -inf, (inf, inf, inf))):
        logp = grid(x, grad=True)
        found = [kl(logp, grid(ref)) for kl in (kl_k1, kl_k2, kl_k3)]
        assert [value.item() for value in found] == list(want)
        if x == ref:
            assert [gradient(value, logp) for value in found] == [[0], [0], [0]]
    far = grid(-100.0, grad=True)  # exp(99) is far above 99
    assert kl_k3(far, grid(-1.0)).item() == pytest.approx(math.exp(99) - 100, rel=1e-15)
    assert gradient(kl_k3(far, grid(-1.0)), far) == pytest.approx([1 - math.exp(99)])
    assert kl_k3(far.detach().float() * 2, grid(-1.0).float()).item() == inf


@pytest.mark.parametrize("wrong", [(9,), (9, 1), (1, 9), (1, 1), (9, 10)])
def test_tensors_of_other_shapes_are_refused(wrong):
    """With as many rows as columns an advantage [B] would broadcast without a word, over the columns."""
    x, y, mask = torch.zeros(9, 9), torch.zeros(wrong), torch.ones(9, 9)
    calls = [lambda: reinforce(x, y), lambda: truncated_importance(x, y, 2.0)]
    calls += [lambda f=f: f(x, y) for f in (kl_k1, kl_k2, kl_k3)]
    for old, A, m in ((y, x, mask), (x, y, mask), (x, x, y)):
        calls += [lambda f=f, o=old, A=A, m=m: f(x, o, A, 0.2, 0.2, m) for f in (gspo, grpo_sequence)]
        if m is mask:
            calls += [lambda f=f, o=old, A=A: f(x, o, A, 0.2, 0.2) for f in (clipped_surrogate, cispo, is_clipped)]
            calls += [lambda o=old, A=A: value_loss(x, o, A, 0.2)]
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(f"{wrong}") + ".*: all must have one shape"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_numbers_are_upcast_first(dtype):
    """Every loss has the bits of that of the upcast numbers, and so has its gradient."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 300, generator=generator).to(dtype) for _ in range(3)]  # bf16 cannot count to 300
    mask = torch.rand(4, 300, generator=generator) < 0.95

    def every(x, old, A, mask):
        more = {"is_clipped": is_clipped(x, old, A, dual_clip=2.3).float(), "entropy": entropy_bonus(x)}
        more |= {"dual 2.3": clipped_surrogate(x, old, A, dual_clip=2.3), "tis": truncated_importance(x, old, 2.3)}
        return every_loss(x, old, A, mask) | more

    want = every(*(x.float() for x in inputs), mask)
    for kind in (torch.bool, torch.int64, dtype, torch.float32):
        for name, found in every(*inputs, mask.to(kind)).items():
            assert found.dtype == torch.float32 and torch.equal(found, want[name]), (name, kind)


def test_only_the_policy_gets_a_gradient():
    logp, advantage, mask = sample()
    advantage = advantage.clone().requires_grad_()
    old = (logp.detach() + 0.05).requires_grad_()
    for name, loss in every_loss(logp, old, advantage, mask).items():
        slopes = torch.autograd.grad(loss.sum(), (logp, old, advantage), allow_unused=True)
        assert slopes[0] is not None and slopes[1] is None and slopes[2] is None, name


def test_zeros_outside_the_mask_are_harmless():
    """As a Rollout has them: log-probs 0 in column 0, in prompts and padding."""
    logp, advantage, mask = sample()
    old = (logp.detach() + 0.3).masked_fill(~mask, 0.0)
    x = logp.detach().masked_fill(~mask, 0.0).requires_grad_()
    for name, loss in every_loss(x, old, advantage, mask).items():
        assert loss.shape == x.shape and loss.isfinite().all(), name
        slope = torch.autograd.grad((mask * loss).sum(), x)[0]
        assert slope.isfinite().all() and not slope[~mask].any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_fp32_or_better(dtype):
    logp, advantage, mask = sample()
    x, old, advantage = (y.detach().to(dtype) for y in (logp, logp + 0.1, advantage))
    want = torch.float64 if dtype == torch.float64 else torch.float32
    for name, loss in every_loss(x, old, advantage, mask).items():
        assert loss.dtype == want, name


def test_the_ratio_of_a_whole_answer_by_hand():
    """Ratios 2 and 3 make 6: clipped for a gain, not for a loss; padding has no effect."""
    mask = torch.tensor([[False, True, True, False]])
    old = grid(-1.0, -2.0, -3.0, -9.0)
    logp = (old + torch.tensor([[5.0, log(2), log(3), 7.0]])).requires_grad_()
    gain = grpo_sequence(logp, old, torch.ones(1, 4), 0.2, 0.3, mask)
    assert gain[0, 1:3].tolist() == pytest.approx([-1.3, -1.3]) and gradient(gain * mask, logp) == [0, 0, 0, 0]
    weight = mask / 2  # per_answer_mean of one answer
    loss = grpo_sequence(logp, old, -torch.ones(1, 4), 0.2, 0.3, mask)
    assert (weight * loss).sum().item() == pytest.approx(6.0)
    assert gradient(weight * loss, logp) == pytest.approx([0, 6, 6, 0])
    one = gspo(logp, old, -torch.ones(1, 4), 0.2, 0.3, mask)  # the geometric mean: √6
    assert (weight * one).sum().item() == pytest.approx(math.sqrt(6))


def test_truncated_importance_by_hand():
    """The trainer's over the sampler's probability, at most C, and no gradient through either."""
    old, sampler = grid(-1.0, -1.0, -1.0, grad=True), grid(-1.0, -1.0 - log(3), -1.0 + log(4))
    weight = truncated_importance(old, sampler, 2.0)
    assert weight.flatten().tolist() == pytest.approx([1.0, 2.0, 0.25]) and not weight.requires_grad
    assert truncated_importance(old, sampler, math.inf).flatten().tolist() == pytest.approx([1.0, 3.0, 0.25])
    for cap in (0, math.nan):
        with pytest.raises(ValueError, match=f"cap = {cap}: above 0"):
            truncated_importance(old, sampler, cap)


def test_the_entropy_bonus_raises_the_entropy():
    """A step down its gradient makes a skewed distribution flatter: H of (0.9, 0.1) grows."""
    z = torch.tensor([2.2, 0.0], dtype=torch.float64, requires_grad=True)

    def entropy(z):
        return -(z.softmax(0) * z.log_softmax(0)).sum()

    (slope,) = torch.autograd.grad(entropy_bonus(entropy(z)), z)
    assert entropy(z - 0.1 * slope) > entropy(z) and entropy_bonus(entropy(z)) == -entropy(z)
    assert entropy_bonus(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32

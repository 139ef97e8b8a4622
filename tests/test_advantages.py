"""advantages.py: numbers worked by hand, plain recursions and limits."""

import math

import pytest
import torch

from minir1.advantages import (
    at_last_token,
    batch_centered,
    discounted_returns,
    explained_variance,
    gae,
    group_advantages,
    group_centered,
    kl_in_reward,
    leave_one_out,
    moving_average,
    whiten,
)

GROUP = [group_advantages, group_centered, leave_one_out]


def test_group_advantages_by_hand():
    """0 0 1 1: mean 1/2, deviation √(4·(1/4)/3) = 1/√3; 1 2 3: mean 2, deviation 1."""
    found = group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), eps=0.0)
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1.0, 1.0, 1.0]]) * math.sqrt(3) / 2)
    found = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [30.0, 10.0, 20.0]], dtype=torch.float64))
    want = torch.tensor([[-1.0, 0.0, 1.0], [10.0, -10.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, want / torch.tensor([[1 + 1e-6], [10 + 1e-6]]))
    assert not group_advantages(torch.full((2, 3), 0.1), eps=0.0).any()  # not 0/0
    assert group_advantages(torch.tensor([[0.0, 1.0]]), eps=1.0)[0, 1].item() == pytest.approx(0.5 / (0.5**0.5 + 1))


def test_centered_and_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(group_centered(rewards), torch.tensor([[-2.0, -1.0, 3.0], [-1 / 3, -1 / 3, 2 / 3]]))
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2
    torch.testing.assert_close(leave_one_out(rewards), torch.tensor([[-3.0, -1.5, 4.5], [-0.5, -0.5, 1.0]]))


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(7):
        others = torch.cat((rewards[:, :i], rewards[:, i + 1 :]), dim=1)
        torch.testing.assert_close(leave_one_out(rewards)[:, i], rewards[:, i] - others.mean(1))


@pytest.mark.parametrize("function", GROUP)
def test_equal_groups_give_exactly_zero(function):
    """The mean of seven times 0.1 is not 0.1 in fp32, yet the advantages must be 0."""
    for value in (0.0, 0.1, 1.1, -0.7, 1e6, 1e-30):
        for size in (2, 3, 7, 8, 16):
            rewards = torch.full((3, size), value)
            rewards[1, 0] += 1 + abs(value)  # beside a group that is mixed
            found = function(rewards)
            assert not found[0].any() and not found[2].any() and found[1].all()


@pytest.mark.parametrize("function", GROUP)
def test_groups_are_independent_and_sum_to_zero(function):
    rewards = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    found = function(rewards)
    torch.testing.assert_close(found.sum(1), torch.zeros(6), atol=1e-5, rtol=0)
    for p in range(6):
        torch.testing.assert_close(found[p : p + 1], function(rewards[p : p + 1]))
    torch.testing.assert_close(function(rewards + 5), found, atol=1e-4, rtol=0)  # a constant changes nothing


@pytest.mark.parametrize("function", GROUP)
@pytest.mark.parametrize(
    "rewards, message",
    [
        (torch.ones(4, 1), "G >= 2"),
        (torch.ones(4), "G >= 2"),
        (torch.tensor([[1.0, float("nan")]]), "finite"),
        (torch.tensor([[1.0, float("inf")]]), "finite"),
        (torch.tensor([[1, 0]]), "int64"),
    ],
)
def test_other_shapes_and_values_raise(function, rewards, message):
    with pytest.raises(ValueError, match=message):
        function(rewards)


# ---- GAE


def plain(rewards, values, trained, gamma, lam):
    """The sums of equation 16 for one row, over the list of its trained columns."""
    advantages, returns = [0.0] * len(values), [0.0] * len(values)
    for i, t in enumerate(trained):
        total = 0.0
        for step, later in enumerate(trained[i:]):
            after = values[later + 1] if later + 1 in trained else 0.0
            total += (gamma * lam) ** step * (rewards[later] + gamma * after - values[later])
        advantages[t], returns[t] = total, total + values[t]
    return advantages, returns


def example(seed=0):
    """Rewards, values and the mask of ragged rows; the last row has nothing to train."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    starts, ends = torch.tensor([1, 3, 2, 5, 1, 4]), torch.tensor([9, 6, 9, 6, 4, 4])
    columns = torch.arange(9)
    return rewards, values, (columns >= starts.unsqueeze(1)) & (columns < ends.unsqueeze(1))


def test_gae_by_hand():
    """γ = 1/2, λ = 1/2; a reward of 8 at the end. δ = (0 + 2 - 2, 0 + 1 - 4, 8 - 2), then sums with 1/4."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 8.0, 0.0]])
    values = torch.tensor([[9.0, 2.0, 4.0, 2.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0, 0 + 0.25 * -1.5, -3 + 0.25 * 6, 6, 0]]
    assert returns.tolist() == [[0, 2 - 0.375, 4 - 1.5, 8, 0]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_against_the_plain_sums(gamma, lam):
    rewards, values, mask = example()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(6):
        trained = mask[row].nonzero().flatten().tolist()
        want = plain(rewards[row].tolist(), values[row].tolist(), trained, gamma, lam)
        assert advantages[row].tolist() == pytest.approx(want[0], abs=1e-12)
        assert returns[row].tolist() == pytest.approx(want[1], abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_limits():
    """λ = 1: the sum of later rewards minus the value. λ = 0: the error of one step."""
    rewards, values, mask = example()
    earned = rewards.masked_fill(~mask, 0.0)
    monte_carlo = earned.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(returns, monte_carlo * mask)
    torch.testing.assert_close(advantages, (monte_carlo - values) * mask)
    after = torch.cat((values * mask, torch.zeros(6, 1)), dim=1)[:, 1:]
    advantages, returns = gae(rewards, values, mask, 0.9, 0.0)
    torch.testing.assert_close(returns, (rewards + 0.9 * after) * mask)
    torch.testing.assert_close(advantages, (rewards + 0.9 * after - values) * mask)


def test_gae_with_a_reward_at_the_end_and_no_value_is_the_reward():
    """GRPO's token advantages are the case V = 0, γ = λ = 1."""
    _, values, mask = example()
    last = mask & ~torch.cat((mask[:, 1:], torch.zeros(6, 1, dtype=torch.bool)), dim=1)
    advantages, returns = gae(3.0 * last, torch.zeros_like(values), mask, 1.0, 1.0)
    assert torch.equal(advantages, 3.0 * mask) and torch.equal(returns, advantages)


def test_gae_ignores_what_is_outside_the_mask():
    rewards, values, mask = example()
    want = gae(rewards, values, mask, 0.9, 0.8)
    other = (x.masked_fill(~mask, float("nan")) for x in (rewards, values))
    assert all(torch.equal(a, b) for a, b in zip(gae(*other, mask, 0.9, 0.8), want))
    rewards.requires_grad_(), values.requires_grad_()
    assert not any(x.requires_grad for x in gae(rewards, values, mask.long(), 0.9, 0.8))
    assert gae(rewards.bfloat16(), values.bfloat16(), mask, 0.9, 0.8)[0].dtype == torch.float32


def test_gae_refuses():
    rewards, values, mask = example()
    for gamma, lam in ((1.1, 1.0), (1.0, -0.1)):
        with pytest.raises(ValueError, match=f"gamma = {gamma}, lam = {lam}"):
            gae(rewards, values, mask, gamma, lam)
    with pytest.raises(ValueError, match=r"rewards has shape \(9,\), the mask \(6, 9\)"):
        gae(rewards[0], values, mask, 1.0, 1.0)  # it would broadcast
    for f in (discounted_returns, lambda r, m, gamma: gae(r, r, m, gamma, 1.0)):
        with pytest.raises(ValueError, match="gamma = nan"):
            f(rewards, mask, math.nan)
    with pytest.raises(ValueError, match=r"rewards has shape \(9,\), the mask \(9,\): both \[B, T\]"):
        gae(rewards[0], values[0], mask[0], 1.0, 1.0)
    values[2, 5] = float("nan")
    with pytest.raises(ValueError, match="values of trained tokens holds numbers that are not finite"):
        gae(rewards, values, mask, 1.0, 1.0)


def test_gae_over_turns_by_hand():
    """Two turns with a tool's two tokens between them, γ = 1/2, λ = 1/2: the successor of the first turn's last token
    is the first token of the second. δ = (0 + 4/2 - 2, 1 + 6/2 - 4, 8 - 6); rewards of the tool's tokens are not seen.
    """
    rewards = torch.tensor([[9.0, 0.0, 1.0, 7.0, 7.0, 8.0, 9.0]])
    values = torch.tensor([[9.0, 2.0, 4.0, 5.0, 5.0, 6.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0, 0 + 0.5 / 4, 0 + 2 / 4, 0, 0, 2, 0]]
    assert returns.tolist() == [[0, 2.125, 4.5, 0, 0, 8, 0]]
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[0, 0 + 1 / 2 + 8 / 4, 1 + 8 / 2, 0, 0, 8, 0]]
    assert at_last_token(torch.tensor([3.0]), mask).tolist() == [[0, 0, 0, 0, 0, 3, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_holes_in_the_mask_are_as_if_cut_out(seed):
    rewards, values, _ = example(seed)
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0] = False
    rewards, values = (x.masked_fill(~mask, math.nan) for x in (rewards, values))
    found = *gae(rewards, values, mask, 0.9, 0.8), discounted_returns(rewards, mask, 0.9), whiten(values, mask)
    earned, level = at_last_token(torch.arange(6.0), mask), explained_variance(values, rewards, mask)
    for row, m in enumerate(mask):
        short = [x[row, m].unsqueeze(0) for x in (rewards, values)]
        every = torch.ones_like(short[0])
        want = *gae(*short, every, 0.9, 0.8), discounted_returns(short[0], every, 0.9)
        for a, b in zip(found, want):
            assert torch.equal(a[row, m], b[0]) and not a[row, ~m].any()
        assert torch.equal(earned[row, m], at_last_token(torch.tensor([float(row)]), every)[0])
        assert not earned[row, ~m].any() and not found[3][row, ~m].any()
    cut = [x[mask].unsqueeze(0) for x in (values, rewards)]  # in these two the rows are one batch
    torch.testing.assert_close(found[3][mask], whiten(cut[0], torch.ones_like(cut[0]))[0])
    assert level == pytest.approx(explained_variance(*cut, torch.ones_like(cut[0])))


def test_no_rows_and_no_columns():
    for shape in ((3, 0), (0, 5), (0, 0)):
        x, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        results = (*gae(x, x, mask, 1.0, 0.9), discounted_returns(x, mask, 0.9), whiten(x, mask))
        results += kl_in_reward(x, x, x, mask, 0.1), at_last_token(torch.zeros(shape[0]), mask)
        assert all(result.shape == shape for result in results) and explained_variance(x, x, mask) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_numbers_are_upcast_first(dtype):
    """Every result has the bits of that of the upcast numbers."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 300, generator=generator) < 0.9
    tokens = [torch.randn(6, 300, generator=generator).to(dtype) for _ in range(3)]
    rewards = (5 + torch.randn(6, 8, generator=generator)).to(dtype)
    cases = [(f, (rewards,)) for f in (*GROUP, batch_centered, lambda r: torch.tensor(moving_average(0.3, r, 0.9)))]
    cases += [
        (lambda r: at_last_token(r[:, 0], mask), (rewards,)),
        (lambda *x: kl_in_reward(*x, mask, 0.1), tokens),
        (lambda x: whiten(x, mask), tokens[:1]),
        (lambda x: discounted_returns(x, mask, 0.9), tokens[:1]),
        (lambda *x: torch.stack(gae(*x, mask, 0.99, 0.95)), tokens[:2]),
        (lambda *x: torch.tensor(explained_variance(*x, mask)), tokens[:2]),
    ]
    for f, inputs in cases:
        found = f(*inputs)
        assert found.dtype == torch.float32 and torch.equal(found, f(*(x.float() for x in inputs)))
        assert f(*(x.double() for x in inputs)).dtype in (torch.float64, torch.float32)
    for kind in (torch.int64, torch.bfloat16, torch.float64):
        for f in (lambda m: whiten(tokens[0], m), lambda m: gae(*tokens[:2], m, 0.99, 0.95)[0]):
            assert torch.equal(f(mask.to(kind)), f(mask))


@pytest.mark.parametrize("eps", [-1e-6, math.nan])
def test_eps_is_no_less_than_0(eps):
    for f in (lambda: group_advantages(torch.rand(2, 4), eps), lambda: whiten(torch.rand(2, 4), torch.ones(2, 4), eps)):
        with pytest.raises(ValueError, match=f"eps = {eps}: 0 or more"):
            f()


def test_batch_centered_by_hand():
    """Against the mean of all six, 2: groups have no effect."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    torch.testing.assert_close(batch_centered(rewards), torch.tensor([[-1.0, 0.0, 4.0], [-2.0, -2.0, 1.0]]))
    assert not batch_centered(torch.full((3, 7), 0.1)).any() and batch_centered(torch.ones(1, 1)).tolist() == [[0.0]]
    torch.testing.assert_close(batch_centered(rewards.view(6, 1)).flatten(), batch_centered(rewards).flatten())
    for bad in (torch.tensor([[1.0, math.nan]]), torch.ones(0, 2), torch.ones(3), torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="rewards"):
            batch_centered(bad)


def test_moving_average_by_hand():
    baseline = moving_average(None, torch.tensor([[1.0, 3.0]]), 0.9)
    assert baseline == 2.0
    assert moving_average(baseline, torch.tensor([7.0]), 0.9) == pytest.approx(0.9 * 2 + 0.1 * 7)
    assert moving_average(2.0, torch.tensor([7.0]), 1.0) == 2.0 and moving_average(2.0, torch.tensor([7.0]), 0.0) == 7.0
    with pytest.raises(ValueError, match="decay = 1.5: 0 to 1"):
        moving_average(None, torch.ones(1), 1.5)
    for bad in (torch.tensor([math.inf]), torch.ones(0)):
        with pytest.raises(ValueError, match="rewards is empty or holds numbers that are not finite"):
            moving_average(0.0, bad, 0.5)


def test_the_reward_lands_on_the_last_token():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    found = at_last_token(torch.tensor([1.0, 2.0, 3.0, -4.0]), mask)
    assert found.tolist() == [[0, 0, 1, 0], [0, 0, 0, 2], [0, 0, 0, 0], [0, -4, 0, 0]]  # no token, no reward
    for bad in (torch.ones(3), torch.tensor([1.0, math.nan, 0, 0])):
        with pytest.raises(ValueError, match="want finite"):
            at_last_token(bad, mask)


def test_kl_in_reward_by_hand():
    mask = torch.tensor([[False, True, True, False]])
    rewards = torch.tensor([[9.0, 0.0, 1.0, 9.0]])
    logp = torch.tensor([[math.nan, -1.0, -2.0, 5.0]], requires_grad=True)
    found = kl_in_reward(rewards, logp, torch.tensor([[0.0, -3.0, -1.0, 0.0]]), mask, 0.1)
    torch.testing.assert_close(found, torch.tensor([[0.0, -0.2, 1.1, 0.0]]))
    assert not found.requires_grad
    with pytest.raises(ValueError, match="ref_logp of trained tokens holds numbers that are not finite"):
        kl_in_reward(rewards, logp, torch.full((1, 4), -math.inf), mask, 0.1)
    with pytest.raises(ValueError, match="logp has shape"):
        kl_in_reward(rewards, logp[:, :2], logp, mask, 0.1)
    for beta in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"beta = {beta}: 0 or more, and finite"):
            kl_in_reward(rewards, logp, logp, mask, beta)


def test_discounted_returns_by_hand():
    """Ragged rows; what follows the mask does not count."""
    rewards = torch.tensor([[9.0, 1.0, 2.0, 4.0], [9.0, 8.0, 0.0, math.nan], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    found = discounted_returns(rewards, mask, 0.5)
    assert found.tolist() == [[0, 1 + 0.5 * 4, 2 + 0.5 * 4, 4], [0, 8, 0, 0], [0, 0, 0, 0]]
    assert discounted_returns(rewards, mask, 0.0).tolist() == [[0, 1, 2, 4], [0, 8, 0, 0], [0] * 4]
    with pytest.raises(ValueError, match="gamma = 1.5"):
        discounted_returns(rewards, mask, 1.5)


def test_whitened_advantages_have_mean_zero_and_deviation_one():
    _, advantage, mask = example()
    found = whiten(advantage, mask)
    chosen = found[mask]
    assert chosen.mean().item() == pytest.approx(0, abs=1e-9) and chosen.std().item() == pytest.approx(1, abs=1e-6)
    assert not found[~mask].any()
    torch.testing.assert_close(whiten(5 * advantage + 3, mask), found, atol=1e-6, rtol=0)  # scale and level are gone
    torch.testing.assert_close(whiten(advantage.masked_fill(~mask, math.nan), mask), found)
    by_hand = whiten(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[False, True, True]]))
    torch.testing.assert_close(by_hand, torch.tensor([[0.0, -1.0, 1.0]]) / math.sqrt(2))


def test_equal_advantages_whiten_to_zero():
    for value, trained in ((0.1, [1, 1, 1]), (5.0, [0, 1, 0]), (5.0, [0, 0, 0])):
        assert not whiten(torch.full((1, 3), value), torch.tensor([trained])).any()
    with pytest.raises(ValueError, match="advantage of trained tokens holds numbers that are not finite"):
        whiten(torch.tensor([[math.inf, 1.0]]), torch.ones(1, 2))


def test_rounding_is_not_whitened_to_full_steps():
    """What differs in the last place, as sums in another order do, stays far below 1: √(var + eps) is about 1e-4."""
    noisy = torch.tensor([[1.0, 1.0 + 2**-23, 1.0, 1.0 - 2**-24]])
    assert 0 < whiten(noisy, torch.ones(1, 4)).abs().max() < 2e-3
    by_hand = whiten(torch.tensor([[0.0, 1e-4]]), torch.ones(1, 2))  # variance 5e-9, half of eps
    torch.testing.assert_close(by_hand, torch.tensor([[-1.0, 1.0]]) * 0.5e-4 / math.sqrt(1.5e-8))


def test_rounding_in_a_group_of_equal_rewards_is_below_its_eps():
    """0.1 + 0.2 is not 0.3 in fp64."""
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]], dtype=torch.float64)
    assert 0 < group_advantages(rewards).abs().max() < 1e-9
    for dtype in (torch.float16, torch.bfloat16):
        for f in GROUP:
            assert not f(torch.full((2, 7), 0.1, dtype=dtype)).any()


def test_explained_variance_by_hand():
    mask, returns = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 4), 7.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), returns, mask) == pytest.approx(-3.0)  # 1 - 4/1
    assert explained_variance(returns, torch.ones(1, 4), mask) == 0.0  # nothing to explain
    assert explained_variance(returns, returns, torch.zeros(1, 4)) == 0.0

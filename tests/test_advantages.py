"""advantages.py: numbers worked by hand, plain recursions and limits."""

import math

import pytest
import torch

from minir1.advantages import gae, group_advantages, group_centered, leave_one_out

GROUP = [group_advantages, group_centered, leave_one_out]


def test_group_advantages_by_hand():
    """0 0 1 1: mean 1/2, deviation √(4·(1/4)/3) = 1/√3; 1 2 3: mean 2, deviation 1."""
    found = group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), eps=0.0)
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1.0, 1.0, 1.0]]) * math.sqrt(3) / 2)
    found = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [30.0, 10.0, 20.0]], dtype=torch.float64))
    want = torch.tensor([[-1.0, 0.0, 1.0], [10.0, -10.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, want / torch.tensor([[1 + 1e-6], [10 + 1e-6]]))
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
    """The mean of seven times 0.1 is not 0.1 in fp32, yet nothing was better than anything."""
    for value in (0.0, 0.1, 1.1, -0.7, 1e6, 1e-30):
        for size in (2, 3, 7, 8, 16):
            rewards = torch.full((3, size), value)
            rewards[1, 0] += 1 + abs(value)  # beside a group that is mixed
            found = function(rewards)
            assert not found[0].any() and not found[2].any() and found[1].all()


@pytest.mark.parametrize("function", GROUP)
def test_groups_are_apart_and_sum_to_zero(function):
    rewards = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    found = function(rewards)
    torch.testing.assert_close(found.sum(1), torch.zeros(6), atol=1e-5, rtol=0)
    for p in range(6):
        torch.testing.assert_close(found[p : p + 1], function(rewards[p : p + 1]))
    torch.testing.assert_close(function(rewards + 5), found, atol=1e-4, rtol=0)  # the level says nothing


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
def test_what_is_no_group_raises(function, rewards, message):
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
    """λ = 1: the discounted sum of what came after, less the value. λ = 0: the error of one step."""
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


def test_gae_sees_nothing_outside_the_mask():
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
    values[2, 5] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        gae(rewards, values, mask, 1.0, 1.0)
    mask[2, 5] = False
    with pytest.raises(ValueError, match="row 2 of the mask has a hole"):
        gae(rewards, values, mask, 1.0, 1.0)

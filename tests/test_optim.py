"""optim.py: Newton-Schulz against singular values, Muon against its formula, schedules by hand."""

import math

import pytest
import torch
from torch import nn

from minir1.model.config import ModelConfig, dense
from minir1.model.transformer import Transformer
from minir1.optim import Muon, clip_gradients, follow, orthogonalize, split_parameters, warmup_stable_decay


def well_conditioned(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random matrices with singular values in 0.5 … 1.5, times a large factor."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
    s = 0.5 + torch.rand(*shape[:-2], min(shape[-2:]), generator=generator)
    return 40 * (u * s.unsqueeze(-2)) @ vt


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (1, 8), (8, 1), (5, 24, 16), (2, 3, 8, 12)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    g = well_conditioned(*shape)
    before = g.clone()
    x = orthogonalize(g)
    s = torch.linalg.svdvals(x)
    assert x.shape == g.shape and x.dtype == g.dtype and torch.equal(g, before)
    assert 0.6 < s.min() and s.max() < 1.3


def test_orthogonalize_keeps_the_singular_vectors():
    """Uᵀ X V stays diagonal: only the singular values move. So g = 3·(orthogonal) gives a multiple of it."""
    u, _, vt = torch.linalg.svd(torch.randn(20, 12, generator=torch.Generator().manual_seed(3)), full_matrices=False)
    g = u @ torch.diag(torch.linspace(1, 3, 12)) @ vt
    inner = u.T @ orthogonalize(g) @ vt.T
    assert (inner - torch.diag(inner.diag())).abs().max() < 1e-4
    scaled = orthogonalize(3 * u @ vt) @ vt.T @ u.T
    assert (scaled - scaled.trace() / 12 * u @ u.T).abs().max() < 1e-4
    torch.testing.assert_close(orthogonalize(1000 * g), orthogonalize(g), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(6, 24, 16), (6, 16, 24)])
def test_batched_is_one_by_one(shape):
    g = well_conditioned(*shape)
    torch.testing.assert_close(orthogonalize(g), torch.stack([orthogonalize(x) for x in g]), atol=1e-5, rtol=0)


def test_orthogonalize_of_nothing_is_nothing():
    assert not orthogonalize(torch.zeros(3, 4, 6)).any()


def parameter(*shape, seed=0):
    p = nn.Parameter(well_conditioned(*shape, seed=seed))
    p.grad = well_conditioned(*shape, seed=seed + 1)
    return p


@pytest.mark.parametrize("shape, scale", [((8, 16), 1.0), ((64, 16), 2.0)])
def test_two_steps_of_muon_by_hand(shape, scale):
    """M = G, W -= lr·√max(1, m/n)·O(G + μM); then M = μG₁ + G₂. Decay is decoupled."""
    p = parameter(*shape)
    w, g1, g2 = p.detach().clone(), p.grad.clone(), well_conditioned(*shape, seed=9)
    muon = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    muon.step()
    want = w * (1 - 0.1 * 0.5) - 0.1 * scale * orthogonalize(g1 + 0.9 * g1)
    torch.testing.assert_close(p.detach(), want, atol=1e-5, rtol=0)
    p.grad = g2.clone()
    muon.step()
    want = want * (1 - 0.1 * 0.5) - 0.1 * scale * orthogonalize(g2 + 0.9 * (0.9 * g1 + g2))
    torch.testing.assert_close(p.detach(), want, atol=1e-5, rtol=0)
    assert torch.equal(p.grad, g2)


def test_muon_on_stacked_experts_is_muon_on_each():
    stack, lone = parameter(4, 24, 16), parameter(24, 16, seed=5)
    apart = [nn.Parameter(w.clone()) for w in stack.detach()] + [nn.Parameter(lone.detach().clone())]
    together, one_by_one = Muon([stack, lone], lr=0.02), [Muon([p], lr=0.02) for p in apart]
    for step in range(3):
        gradients = [well_conditioned(4, 24, 16, seed=20 + step), well_conditioned(24, 16, seed=30 + step)]
        stack.grad, lone.grad = gradients
        for p, g in zip(apart, [*gradients[0], gradients[1]]):
            p.grad = g.clone()
        together.step()
        for muon in one_by_one:
            muon.step()
    for p, q in zip([*stack.detach(), lone.detach()], apart):
        torch.testing.assert_close(p, q.detach(), atol=1e-5, rtol=0)


def test_muon_leaves_alone_what_has_no_gradient_and_refuses_vectors():
    p, q = parameter(6, 4), parameter(6, 4, seed=3)
    q.grad = None
    before = q.detach().clone()
    Muon([p, q], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(q.detach(), before)
    for shape in ((4,), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match="matrices"):
            Muon([nn.Parameter(torch.ones(shape))], lr=0.1)


@pytest.mark.parametrize(
    "config", [ModelConfig(vocab=32, layers=2), dense(vocab=32, layers=2), dense(vocab=32, layers=1, tied=True)]
)
def test_split_parameters_covers_each_once(config):
    model = Transformer(config)
    matrices, rest = split_parameters(model)
    assert sorted(map(id, matrices + rest)) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim in (2, 3) and names[id(p)].startswith("blocks.") for p in matrices)
    for p in rest:
        name = names[id(p)]
        assert p.ndim == 1 or "router" in name or name in ("embedding.weight", "head.weight"), name
    Muon(matrices, lr=0.1)  # takes all of them
    if config.experts:
        assert any(p.ndim == 3 for p in matrices) and any("router" in names[id(p)] for p in rest)


def test_a_gradient_step_of_muon_lowers_the_loss():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab=32, dim=32, layers=2, heads=2, ffn=48, expert_ffn=16, experts=4))
    matrices, rest = split_parameters(model)
    muon, adam = Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)
    tokens = torch.randint(0, 32, (8, 16))
    losses = []
    for _ in range(8):
        loss = -model.logprob(tokens)[:, 1:].mean()
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3


def test_a_restored_state_goes_on_to_the_bit():
    def run(p, muon, steps):
        for step in steps:
            for i, q in enumerate(p):
                q.grad = well_conditioned(*q.shape, seed=100 * step + i)
            muon.step()

    def fresh():
        p = [parameter(8, 12), parameter(3, 8, 12, seed=4), parameter(12, 8, seed=7)]
        return p, Muon(p, lr=0.05, momentum=0.9, weight_decay=0.01)

    p, muon = fresh()
    run(p, muon, range(6))
    q, before = fresh()
    run(q, before, range(3))
    r, after = fresh()
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        for a, b in zip(r, q):
            a.copy_(b)
    run(r, after, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(p, r))


def test_schedule_by_hand():
    """Ten steps, two of warm-up, decay from the sixth: ½, 1, 1, 1, 1, 1, then 4/5 … 1/5 of the way down."""
    factors = [warmup_stable_decay(step, 10, 2) for step in range(11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])
    assert [warmup_stable_decay(step, 4, 0, decay_from=1.0) for step in range(4)] == [1, 1, 1, 1]
    assert [warmup_stable_decay(step, 4, 0, decay_from=0.0) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [warmup_stable_decay(step, 4, 4) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 0.5])
    assert all(0 <= warmup_stable_decay(step, steps, 3) <= 1 for steps in (1, 2, 7) for step in range(12))
    assert math.isclose(warmup_stable_decay(0, 1, 1), 1.0)


def test_clip_gradients_by_hand():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(model, 10.0, step=1) == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[3.0, 4.0]]))
    assert clip_gradients(model, 1.0, step=1) == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_names_step_and_tensor(bad):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[0, 1] = bad
    with pytest.raises(RuntimeError, match="step 7: the gradient of 1.weight is not finite"):
        clip_gradients(model, 1.0, step=7)


def test_a_reference_follows_the_policy_by_a_share():
    """(1 - τ)^n of the distance is left after n steps; the expert bias, a buffer, follows too; 0 and 1 are the ends."""
    torch.manual_seed(0)
    shape = {"dim": 16, "layers": 2, "heads": 2, "ffn": 16, "kv_lora": 8, "nope": 8, "rope": 8}
    config = ModelConfig(vocab=8, experts=4, expert_ffn=16, **shape)
    policy, reference = Transformer(config), Transformer(config)
    policy.blocks[1].ffn.bias += 1.0
    start = {name: value.clone() for name, value in reference.state_dict().items()}
    for _ in range(3):
        follow(reference, policy, 0.25)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(value, 0.75**3 * start[name] + (1 - 0.75**3) * policy.state_dict()[name])
    follow(reference, policy, 0.0)
    assert reference.blocks[1].ffn.bias.max() < 1
    follow(reference, policy, 1.0)
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in reference.state_dict().items())
    with pytest.raises(ValueError, match="share = 1.5: 0 to 1"):
        follow(reference, policy, 1.5)

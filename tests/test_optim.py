"""optim.py: Newton-Schulz against singular values, Muon against its formula, masters against fp32."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from minir1.model.config import ModelConfig, dense
from minir1.model.transformer import Transformer
from minir1.optim import (
    POLAR,
    Masters,
    Muon,
    adamw,
    clip_gradients,
    ema_update,
    muon,
    orthogonalize,
    split_parameters,
    warmup_cosine,
    warmup_stable_decay,
)


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


def test_each_quintic_is_the_best_for_what_the_ones_before_leave():
    """The error of the best one is the same at both ends of the interval and equally large above and below 1."""
    low, high = 0.01, 1.0
    for a, b, c in POLAR:
        x = torch.linspace(low, high, 10_001, dtype=torch.float64)
        y = a * x + b * x**3 + c * x**5
        low, high = y.min().item(), y.max().item()
        assert 1 - low == pytest.approx(high - 1, abs=1e-3)
        assert y[0].item() == pytest.approx(low, abs=2e-3) and y[-1].item() == pytest.approx(high, abs=2e-3)
    assert low == pytest.approx(0.73, abs=5e-3)
    least = torch.diag(torch.tensor([1.0, 1e-5]))
    assert orthogonalize(least)[1, 1].item() == pytest.approx(1e-5 * math.prod(a for a, _, _ in POLAR), rel=1e-3)


def test_orthogonalize_keeps_the_singular_vectors():
    """Uᵀ X V stays diagonal: only the singular values move. So g = 3·(orthogonal) gives a multiple of it."""
    u, _, vt = torch.linalg.svd(torch.randn(20, 12, generator=torch.Generator().manual_seed(3)), full_matrices=False)
    g = u @ torch.diag(torch.linspace(1, 3, 12)) @ vt
    inner = u.T @ orthogonalize(g) @ vt.T
    assert (inner - torch.diag(inner.diag())).abs().max() < 1e-4
    scaled = orthogonalize(3 * u @ vt) @ vt.T @ u.T
    assert (scaled - scaled.trace() / 12 * u @ u.T).abs().max() < 1e-4
    torch.testing.assert_close(orthogonalize(1000 * g), orthogonalize(g), atol=1e-4, rtol=0)


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
    optimizer = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    optimizer.step()
    want = w * (1 - 0.1 * 0.5) - 0.1 * scale * orthogonalize(g1 + 0.9 * g1)
    torch.testing.assert_close(p.detach(), want, atol=1e-5, rtol=0)
    p.grad = g2.clone()
    optimizer.step()
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
        for optimizer in one_by_one:
            optimizer.step()
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


def test_schedule_by_hand():
    """Ten steps, two of warm-up, decay after the sixth: ½, 1, 1, 1, 1, 1, then 4/5 … 1/5, 0."""
    factors = [warmup_stable_decay(step, 10, 2) for step in range(11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])
    assert [warmup_stable_decay(step, 4, 0, decay_from=1.0) for step in range(4)] == [1, 1, 1, 1]
    assert [warmup_stable_decay(step, 4, 0, decay_from=0.0) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [warmup_stable_decay(step, 4, 4) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 0.5])
    assert all(0 <= warmup_stable_decay(step, steps, 3) <= 1 for steps in (1, 2, 7) for step in range(12))
    assert math.isclose(warmup_stable_decay(0, 1, 1), 1.0)


def test_the_cosine_ends_at_a_tenth():
    factors = [warmup_cosine(step, 12, 2) for step in range(12)]
    assert factors[:2] == [0.5, 1.0] and factors[-1] == pytest.approx(0.1)
    assert factors[6] == pytest.approx(0.55)  # half of the way, 5 of 10 steps after the warm-up
    assert factors[1:] == sorted(factors[1:], reverse=True)
    assert warmup_cosine(0, 1, 0) == 1.0 and warmup_cosine(2, 3, 0, last=0.0) == pytest.approx(0.0)
    assert [warmup_cosine(step, 3, 9) for step in range(3)] == pytest.approx([1 / 9, 2 / 9, 3 / 9])


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


def test_ema_reference_by_hand():
    """After n steps (1 - τ)^n of the distance is left, also of the expert bias, a buffer; τ = 0 and τ = 1."""
    torch.manual_seed(0)
    shape = {"dim": 16, "layers": 2, "heads": 2, "ffn": 16, "kv_lora": 8, "nope": 8, "rope": 8}
    config = ModelConfig(vocab=8, experts=4, expert_ffn=16, **shape)
    policy, reference = Transformer(config), Transformer(config)
    policy.blocks[1].ffn.bias += 1.0
    start = {name: value.clone() for name, value in reference.state_dict().items()}
    for _ in range(3):
        ema_update(reference, policy, 0.25)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(value, 0.75**3 * start[name] + (1 - 0.75**3) * policy.state_dict()[name])
    ema_update(reference, policy, 0.0)
    assert reference.blocks[1].ffn.bias.max() < 1
    ema_update(reference, policy, 1.0)
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in reference.state_dict().items())
    with pytest.raises(ValueError, match="tau = 1.5: 0 to 1"):
        ema_update(reference, policy, 1.5)


def test_a_compiled_model_is_split_and_averaged_as_a_plain_one():
    shape = {"dim": 16, "layers": 2, "heads": 2, "ffn": 16, "kv_lora": 8, "nope": 8, "rope": 8}
    config = ModelConfig(vocab=8, experts=4, expert_ffn=16, **shape)
    policy, reference = Transformer(config), Transformer(config)
    plain = split_parameters(policy)
    policy.blocks[0] = torch.compile(policy.blocks[0], backend="eager")
    whole = torch.compile(policy, backend="eager")
    for have, want in zip(split_parameters(whole), plain):
        assert have and [id(p) for p in have] == [id(p) for p in want]
    ema_update(reference, whole, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(reference.state_dict().values(), policy.state_dict().values()))


def test_ema_reference_moves_a_tied_matrix_once():
    config = dense(vocab=8, dim=16, layers=1, heads=2, ffn=16, tied=True)
    policy, reference = Transformer(config), Transformer(config)
    nn.init.ones_(policy.embedding.weight)
    nn.init.zeros_(reference.embedding.weight)
    ema_update(reference, policy, 0.25)
    assert (reference.head.weight == 0.25).all() and reference.head.weight is reference.embedding.weight


def test_ema_reference_in_fp32_of_a_bf16_policy_and_a_bf16_reference_is_refused():
    policy = nn.Linear(2, 2, bias=False).bfloat16()
    nn.init.constant_(policy.weight, 2.0)
    reference = nn.Linear(2, 2, bias=False)
    nn.init.ones_(reference.weight)
    for _ in range(100):
        ema_update(reference, policy, 0.001)
    torch.testing.assert_close(reference.weight.detach(), torch.full((2, 2), 2 - 0.999**100), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="the reference is in torch.bfloat16.*keep it in float32"):
        ema_update(copy.deepcopy(policy), policy, 0.001)


# ---- masters -----------------------------------------------------------------------------------


def test_without_16_bit_weights_the_optimizers_are_the_plain_ones():
    """Same class, same state, same bits."""
    parts = [parameter(6, 4), parameter(6, 4)]
    ours, theirs = adamw(parts[:1], 0.1), torch.optim.AdamW(parts[1:], 0.1, (0.9, 0.95), weight_decay=0.0, fused=True)
    assert type(ours) is type(theirs) is torch.optim.AdamW and type(muon([parameter(6, 4)], 0.1)) is Muon
    for optimizer in (ours, theirs):
        optimizer.step()
    assert torch.equal(*parts)
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]


def test_one_step_of_masters_by_hand():
    """Muon's step on the fp32 master; the weight is the rounded master; the fp32 weight beside it is its own master."""
    half, full = nn.Parameter(parameter(6, 4).detach().bfloat16()), parameter(6, 4, seed=2)
    start, g = half.detach().float(), well_conditioned(6, 4, seed=5).bfloat16()
    half.grad = g.clone()
    alone = nn.Parameter(full.detach().clone())
    alone.grad = full.grad.clone()
    optimizer = muon([half, full], lr=0.01)
    assert isinstance(optimizer, Masters) and len(optimizer.masters) == 1
    assert optimizer.masters[0].dtype == torch.float32 and optimizer.param_groups[0]["params"][1] is full
    optimizer.step()
    Muon([alone], lr=0.01).step()
    want = start - 0.01 * math.sqrt(6 / 4) * orthogonalize(g.float() + 0.95 * g.float())
    torch.testing.assert_close(optimizer.masters[0].detach(), want, atol=1e-6, rtol=0)
    assert torch.equal(half, optimizer.masters[0].bfloat16()) and torch.equal(full, alone)
    assert half.grad is None and optimizer.masters[0].grad is None
    before = half.detach().clone()
    optimizer.zero_grad()
    optimizer.step()  # without gradients nothing moves
    assert torch.equal(half, before) and full.grad is None


def fall(dtype, make, steps=200):
    """How much training in `dtype` lowers the loss of a small MoE model on one batch. The loss is computed in fp32; the
    initial weights are bfloat16 numbers."""
    torch.manual_seed(0)
    shape = {"dim": 32, "layers": 2, "heads": 2, "ffn": 48, "kv_lora": 8, "nope": 8, "rope": 8, "v_dim": 16}
    model = Transformer(ModelConfig(vocab=32, experts=4, expert_ffn=16, **shape)).bfloat16().to(dtype)
    exact = copy.deepcopy(model).float()
    tokens = torch.randint(0, 32, (8, 16))
    before = -exact.logprob(tokens).detach()[:, 1:].mean()
    optimizers = make(model)
    for _ in range(steps):
        (-model.logprob(tokens)[:, 1:].mean()).backward()
        clip_gradients(model, 1.0, step=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    masters = {w: m for o in optimizers if isinstance(o, Masters) for w, m in zip(o.weights, o.masters)}
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters()):
            p.copy_(masters.get(q, q))
    return (before + exact.logprob(tokens).detach()[:, 1:].mean()).item()


def test_training_in_bf16_equals_fp32_where_plain_adamw_does_not_learn():
    """Steps of 1e-6 are 1/50,000 of a weight, and half a unit of bfloat16 is 1/512: without masters they vanish."""
    full = fall(torch.float32, lambda model: [adamw(model.parameters(), 1e-6)])
    half = fall(torch.bfloat16, lambda model: [adamw(model.parameters(), 1e-6)])
    naive = fall(torch.bfloat16, lambda model: [torch.optim.AdamW(model.parameters(), 1e-6, weight_decay=0.0)])
    assert full > 0.01 and half == pytest.approx(full, rel=0.01) and abs(naive) < 0.1 * full


def test_muon_and_adamw_in_bf16_learn_as_in_fp32():
    def both(model):
        matrices, rest = split_parameters(model)
        return muon(matrices, 1e-4), adamw(rest, 1e-5)

    full, half = fall(torch.float32, both, 50), fall(torch.bfloat16, both, 50)
    assert full > 0.02 and half == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize(
    "dtype, make",
    [(torch.bfloat16, adamw), (torch.bfloat16, muon), (torch.float32, lambda p, lr: Muon(p, 0.05, 0.9, 0.01))],
    ids=["adamw bf16", "muon bf16", "muon fp32"],
)
def test_a_resumed_run_has_the_same_bits(dtype, make):
    def new():
        weights = [nn.Parameter(parameter(*shape).detach().to(dtype)) for shape in ((6, 4), (3, 6, 4), (4, 6))]
        return weights, make(weights, 1e-3)

    def run(weights, optimizer, steps):
        for step in steps:
            for i, p in enumerate(weights):
                p.grad = well_conditioned(*p.shape, seed=10 * step + i).to(dtype)
            optimizer.step()

    weights, optimizer = new()
    run(weights, optimizer, range(6))
    other, before = new()
    run(other, before, range(3))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    again, after = new()
    after.load_state_dict(torch.load(file, weights_only=True))
    if isinstance(after, Masters):  # which restore the weights too
        assert all(torch.equal(a, b) for a, b in zip(again, other))
        with pytest.raises(ValueError, match="does not hold 3 masters"):
            after.load_state_dict(make([parameter(6, 4)], 1e-3).state_dict())
    for a, b in zip(again, other):
        a.data.copy_(b)
    run(again, after, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights, again))
    assert all(torch.equal(a, b) for a, b in zip(getattr(optimizer, "masters", []), getattr(after, "masters", [])))


def test_the_norm_of_bf16_gradients_has_fp32_digits():
    layer = nn.Linear(1000, 100, bias=False).bfloat16()
    layer.weight.grad = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = layer.weight.grad.double().norm().item()
    assert clip_gradients(layer, 1e9, step=0) == pytest.approx(want, rel=1e-6)


def test_gradients_of_16_bit_weights_are_summed_in_fp32():
    """1 + 256 · 2^-9: in bfloat16 each of the small gradients would be lost."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = adamw([weight], lr=0.0)
    for g in [1.0, *[2.0**-9] * 256]:
        (weight * g).sum().backward()
    assert weight.grad is None and optimizer.masters[0].grad.item() == 1.5
    optimizer.zero_grad()
    assert optimizer.masters[0].grad is None

"""moe.py: the grouped product against a loop over tokens, routing against the formulas, balance by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.model.config import ModelConfig
from minir1.model.moe import (
    FEW,
    Experts,
    Gather,
    MoE,
    Routing,
    SwiGLU,
    balance_step,
    expert_load,
    grouped_linear,
    idle_share,
    maximal_violation,
    rerouted,
    routes_of,
    rows_of,
    sequence_balance_loss,
)
from minir1.model.transformer import Transformer


def config(**changes):
    base = {"dim": 8, "experts": 4, "experts_per_token": 2, "shared_experts": 1, "expert_ffn": 12}
    return ModelConfig(**base | changes)


def init(module, seed=0, std=0.5):
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.normal_(std=std, generator=gen)
    return module


def one(experts, e, x):
    """Expert e of one token, x [D]"""
    gate, up = experts.gate_up[e].chunk(2)
    return experts.down[e] @ (F.silu(gate @ x) * (up @ x))


def loop(experts, x, chosen, gates):
    out = x.new_zeros(x.shape)
    for n, es in enumerate(chosen.tolist()):
        out[n] = sum(g * one(experts, e, x[n]) for e, g in zip(es, gates[n]))
    return out


# ---------------------------------------------------------------- the experts


@pytest.mark.parametrize("dim,inner", [(8, 12), (6, 8), (8, 6), (7, 5)])  # the last three: not multiples of 4
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_equals_a_loop_over_tokens_with_gradients(dim, inner, dtype):
    experts = init(Experts(config(dim=dim, expert_ffn=inner, experts=5))).to(dtype)
    x = torch.randn(11, dim, dtype=dtype, requires_grad=True)
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(11)])
    gates = torch.rand(11, 2, dtype=dtype, requires_grad=True)
    inputs = (x, gates, *experts.parameters())
    have, want = experts(x, chosen, gates), loop(experts, x, chosen, gates)
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(have, inputs, g), torch.autograd.grad(want, inputs, g)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(0, 9), E=st.integers(1, 6), K_r=st.integers(1, 6), dim=st.sampled_from([4, 5]),
    seed=st.integers(0, 99),
)
def test_any_routing(N, E, K_r, dim, seed):
    """Experts without tokens, all tokens on one expert, no tokens at all, all experts for each."""
    K_r = min(K_r, E)
    gen = torch.Generator().manual_seed(seed)
    experts = init(Experts(config(dim=dim, experts=E, experts_per_token=K_r, expert_ffn=4)), seed)
    order = torch.randperm(E, generator=gen)
    few = max(K_r, E // 2)  # the other experts get nothing
    chosen = torch.zeros(N, K_r, dtype=torch.int64)
    for n in range(N):
        chosen[n] = order[torch.randperm(few, generator=gen)[:K_r]]
    x, gates = torch.randn(N, dim, generator=gen), torch.rand(N, K_r, generator=gen)
    have = experts(x, chosen, gates)
    torch.testing.assert_close(have, loop(experts, x, chosen, gates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", [12, 6])
def test_an_expert_without_tokens_gets_the_gradient_zero(inner):
    experts = init(Experts(config(expert_ffn=inner)))
    chosen = torch.tensor([[0, 3], [3, 0], [0, 3]])
    experts(torch.randn(3, 8), chosen, torch.rand(3, 2)).square().sum().backward()
    for p in experts.parameters():
        assert p.grad.isfinite().all()
        assert p.grad[[1, 2]].abs().sum() == 0 and all(p.grad[e].abs().sum() > 0 for e in (0, 3))


@pytest.mark.parametrize("inner", [12, 6])
def test_no_tokens(inner):
    layer = init(MoE(config(expert_ffn=inner)))
    x = torch.zeros(0, 8, requires_grad=True)
    record = []
    out = layer(x, record)
    assert out.shape == (0, 8) and expert_load(record[0]).tolist() == [0, 0, 0, 0]
    out.sum().backward()
    assert x.grad.shape == (0, 8)
    assert layer(torch.zeros(2, 0, 8)).shape == (2, 0, 8)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("inner", [12, 6])
def test_stride_0_upstream_gradients(inner, shared):
    """The gradient of `.sum()` is one number with strides of 0, which grouped products refuse."""
    layer = init(MoE(config(expert_ffn=inner, shared_experts=shared)))
    x = torch.randn(6, 8)
    layer(x).sum().backward()
    have = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).backward(torch.ones(6, 8))
    for a, p in zip(have, layer.parameters()):
        torch.testing.assert_close(a, p.grad)


@pytest.mark.parametrize(
    "dtype,padded,odd", [(torch.float32, 8, 6), (torch.bfloat16, 16, 12), (torch.float64, 8, 7)]
)
def test_both_paths_of_the_grouped_product_agree(dtype, padded, odd):
    """The same numbers, padded with zeros to a width that the grouped product supports."""
    ends = torch.tensor([3, 3, 7], dtype=torch.int32)
    x, w = torch.randn(7, odd).to(dtype), torch.randn(3, 8, odd).to(dtype)
    have = grouped_linear(x, w, ends)
    want = grouped_linear(F.pad(x, (0, padded - odd)), F.pad(w, (0, padded - odd)), ends)
    torch.testing.assert_close(have, want)
    for e, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 7))):
        torch.testing.assert_close(have[rows], x[rows] @ w[e].T)


def test_swiglu_by_hand():
    """D = 1, inner 1: down · silu(gate x) · up x."""
    layer = SwiGLU(1, 1)
    for linear, value in ((layer.gate, 2.0), (layer.up, 3.0), (layer.down, 5.0)):
        linear.weight.data.fill_(value)
    x = 0.5
    want = 5 * (1 / (1 + torch.e**-1.0)) * 1.5  # silu(1) = σ(1)
    assert layer(torch.tensor([x])).item() == pytest.approx(want, rel=1e-6)


# ---------------------------------------------------------------- routing


def plain(config, logits, bias):
    """Chosen experts and gates of one token, from V3's equations and V2's groups, with sorted() alone."""
    E, size = config.experts, config.experts // config.groups
    s = (logits.sigmoid() if config.score == "sigmoid" else logits.softmax(0)).tolist()
    choice = [a + b for a, b in zip(s, bias.tolist())]
    count = 2 if config.score == "sigmoid" else 1

    def worth(group):
        return sum(sorted(choice[group * size : (group + 1) * size], reverse=True)[:count])

    open_groups = sorted(range(config.groups), key=worth, reverse=True)[: config.groups_kept]
    chosen = sorted((e for e in range(E) if e // size in open_groups), key=choice.__getitem__, reverse=True)
    chosen = chosen[: config.experts_per_token]
    total = sum(s[e] for e in chosen) if config.norm_topk else 1.0
    return {e: s[e] / total * config.route_scale for e in chosen}


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm_topk,route_scale", [(True, 1.0), (True, 2.5), (False, 1.0), (False, 16.0)])
@pytest.mark.parametrize("groups,groups_kept", [(1, 1), (4, 2), (4, 1), (2, 2), (12, 4)])
def test_routing_against_the_formulas(score, norm_topk, route_scale, groups, groups_kept):
    layer = init(MoE(config(
        experts=12, experts_per_token=3, groups=groups, groups_kept=groups_kept,
        score=score, norm_topk=norm_topk, route_scale=route_scale,
    )))
    layer.bias.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    x = torch.randn(20, 8)
    routing = layer.route(x)
    gates = layer.gates(routing)
    assert routing.chosen.shape == gates.shape == (20, 3) and gates.dtype == torch.float32
    for logits, chosen, gate in zip(x @ layer.router.weight.T, routing.chosen.tolist(), gates.tolist()):
        want = plain(layer.config, logits, layer.bias)
        assert set(chosen) == set(want)
        assert [want[e] for e in chosen] == pytest.approx(gate, rel=1e-5)


@pytest.mark.parametrize("shared", [0, 2])
def test_the_layer_is_shared_plus_gated_experts(shared):
    layer = init(MoE(config(shared_experts=shared)))
    x = torch.randn(2, 3, 8)
    record = []
    have = layer(x, record)
    flat = x.view(6, 8)
    want = loop(layer.experts, flat, record[0].chosen, layer.gates(record[0]))
    if shared:
        want = want + layer.shared(flat)
        assert layer.shared.gate.weight.shape == (2 * 12, 8)
    torch.testing.assert_close(have, want.view(2, 3, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {}, {"shared_experts": 0, "norm_topk": False}, {"shared_experts": 2, "route_scale": 2.5, "groups": 2},
], ids=str)
def test_few_tokens_go_to_every_expert(changes):
    """As one SwiGLU with gate 0 where an expert was not chosen; the shared ones count once."""
    layer = init(MoE(config(**changes))).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x, fused=layer.fuse()), layer(x), rtol=1e-6, atol=1e-6)  # gates are in fp32
    many = torch.randn(FEW // 4 + 1, 8, dtype=torch.float64)
    assert torch.equal(layer(many, fused=layer.fuse()), layer(many))


def test_gathering_pairs_and_summing_them_are_each_the_gradient_of_the_other():
    pair = torch.randperm(12).view(4, 3)
    token = torch.empty(12, dtype=torch.int64)
    token[pair] = torch.arange(4).unsqueeze(1)
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    assert torch.equal(rows_of(x, token), x[token])
    torch.testing.assert_close(rows_of(y, pair), y[pair].sum(1))
    for value, index, inverse in ((x, token, pair), (y, pair, token)):
        assert torch.autograd.gradcheck(lambda v: Gather.apply(v, index, inverse), value.requires_grad_())


def test_the_bias_changes_the_choice_and_not_the_gates():
    layer, x = init(MoE(config(norm_topk=False))), torch.randn(5, 8)
    free = layer.route(x)
    layer.bias.copy_(torch.tensor([0.0, 0, 9, 9]))  # scores are below 1
    pushed = layer.route(x)
    assert set(pushed.chosen.flatten().tolist()) == {2, 3}
    assert torch.equal(pushed.scores, free.scores)
    torch.testing.assert_close(layer.gates(pushed), pushed.scores.gather(-1, pushed.chosen))


def test_the_bias_is_kept_but_not_trained():
    layer = init(MoE(config()))
    assert "bias" in layer.state_dict() and "bias" not in dict(layer.named_parameters())
    layer(torch.randn(9, 8)).square().sum().backward()
    assert layer.bias.grad is None and not layer.bias.requires_grad
    assert layer.router.weight.grad.abs().sum() > 0  # through the gates


def test_the_bias_and_the_router_stay_exact_in_half_precision():
    layer = init(MoE(config()))
    layer.bias.copy_(torch.tensor([1.0, 1.001, -0.3331, 0.0]))  # bf16 has no 1.001
    half = MoE(config())
    half.load_state_dict(layer.state_dict())
    half.to(torch.bfloat16)
    assert half.bias.dtype == torch.float32 and torch.equal(half.bias, layer.bias)
    assert half.experts.down.dtype == torch.bfloat16
    x = torch.randn(3, 8).bfloat16()
    routing = half.route(x)
    assert routing.scores.dtype == torch.float32
    torch.testing.assert_close(routing.scores, (x.float() @ half.router.weight.float().T).sigmoid())
    assert half(x).dtype == torch.bfloat16
    assert half.double().bias.dtype == torch.float32


# ---------------------------------------------------------------- replay


def by_hand():
    """D = 1, three experts that give 2, 9 and 4 for x = 1, scores 1/2, σ(5) and 3/4; the best two are 1 and 2."""
    layer = MoE(config(dim=1, experts=3, expert_ffn=1, shared_experts=0))
    layer.router.weight.data = torch.tensor([[0.0], [5.0], [math.log(3)]])
    layer.experts.gate_up.data.fill_(1.0)
    layer.experts.down.data = torch.tensor([2.0, 9.0, 4.0]).view(3, 1, 1) / F.silu(torch.ones(()))
    return layer


def test_replay_and_its_gradient_by_hand():
    """Experts 0 and 2: y = (1/2·2 + 3/4·4) / (5/4) = 3.2; with s_0 + s_2 = 5/4 and ds/dw = s (1 - s),

    dy/dw_0 = (2 - 4)·(3/4) / (25/16)·1/4 = -0.24      dy/dw_2 = (4 - 2)·(1/2) / (25/16)·3/16 = 0.12
    """
    layer, x, record = by_hand(), torch.ones(1, 1), []
    assert set(layer.route(x).chosen[0].tolist()) == {1, 2}
    y = layer(x, record, torch.tensor([[0, 2]], dtype=torch.int16))
    y.sum().backward()
    assert y.item() == pytest.approx(3.2, rel=1e-6)
    assert layer.router.weight.grad.flatten().tolist() == pytest.approx([-0.24, 0.0, 0.12], rel=1e-5)
    assert routes_of(record).tolist() == [[[0, 2]]]  # the record says what was done
    torch.testing.assert_close(record[0].scores, torch.tensor([[0.5, torch.tensor(5.0).sigmoid(), 0.75]]))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_router_chooses_for_tokens_without_a_route(groups):
    """Routes may also name experts of a group that the router would not select."""
    layer = init(MoE(config(experts=8, groups=groups, groups_kept=1)))
    x, free, record = torch.randn(9, 8), [], []
    layer(x, free)
    routes = (7 - free[0].chosen).to(torch.int16)
    routes[::3] = -1
    out = layer(x, record, routes)
    want = torch.where(routes < 0, free[0].chosen, routes.long())
    assert torch.equal(record[0].chosen, want) and torch.equal(record[0].scores, free[0].scores)
    gates = layer.gates(Routing(free[0].scores, want))
    torch.testing.assert_close(out, loop(layer.experts, x, want, gates) + layer.shared(x), rtol=1e-5, atol=1e-5)


def test_replaying_what_was_chosen_changes_no_bit():
    layer, x, record = init(MoE(config(experts=8))), torch.randn(9, 8), []
    want = layer(x, record)
    assert torch.equal(layer(x, None, routes_of(record)[:, 0]), want)


def test_rerouted_by_hand():
    """Three tokens, two layers: six pairs, of which three differ and one is unknown."""
    a = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [-1, -1]]], dtype=torch.int16)
    b = torch.tensor([[[1, 0], [2, 1]], [[0, 2], [2, 3]], [[3, 1], [0, 1]]])
    assert rerouted(a, b).tolist() == [[False, True], [True, False], [True, False]]
    assert torch.equal(rerouted(b, a), rerouted(a, b))


def test_routes_of_a_record():
    record = [routing_of([[0, 1], [2, 3]]), routing_of([[3, 1], [0, 2]])]
    routes = routes_of(record)
    assert routes.dtype == torch.int16 and routes.tolist() == [[[0, 1], [3, 1]], [[2, 3], [0, 2]]]


# ---------------------------------------------------------------- balance


def routing_of(chosen, scores=None, experts=4):
    chosen = torch.tensor(chosen)
    return Routing(torch.ones(len(chosen), experts) if scores is None else torch.tensor(scores), chosen)


def test_load_by_hand():
    assert expert_load(routing_of([[0, 1], [0, 3], [0, 1]])).tolist() == [3, 2, 0, 1]


def test_load_counts_real_tokens_alone():
    torch.manual_seed(0)
    shape = {"vocab": 20, "layers": 2, "heads": 2, "kv_lora": 8, "nope": 4, "rope": 4, "v_dim": 4}
    model = Transformer(config(**shape, dense_layers=0))
    tokens, lengths = torch.randint(0, 20, (3, 7)), torch.tensor([7, 2, 4])
    padded, alone = [], []
    model.hidden(tokens, lengths=lengths, record=padded)
    for row, n in zip(tokens, lengths.tolist()):
        model.hidden(row[None, :n], record=alone)
    for layer in range(2):
        load = expert_load(padded[layer])
        assert load.sum() == 2 * 13
        assert torch.equal(load, sum(expert_load(r) for r in alone[layer::2]))


def test_balance_step_by_hand():
    bias = torch.tensor([0.0, 0.5, -0.1, 0.0])
    address = bias.data_ptr()
    balance_step(bias, torch.tensor([10, 2, 6, 6]), 0.1)  # the mean is 6
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.6, -0.1, 0.0]))
    assert bias.data_ptr() == address


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_repeated_steps_balance_an_unbalanced_load(score):
    layer = init(MoE(config(experts=8, score=score)), std=0.3)
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(3)) + 1.0  # a few experts win
    before = maximal_violation(expert_load(layer.route(x)))
    for _ in range(300):
        balance_step(layer.bias, expert_load(layer.route(x)), 0.005)
    after = maximal_violation(expert_load(layer.route(x)))
    assert before > 0.8 and after < 0.15


def test_an_idle_expert_has_less_than_a_tenth_of_the_mean_load():
    assert idle_share(torch.tensor([107, 8, 3, 2])) == 0.25  # a tenth of the mean is 3
    assert idle_share(torch.tensor([5, 5])) == idle_share(torch.tensor([0, 0])) == 0
    assert idle_share(torch.tensor([8, 0, 0, 0])) == 0.75


def test_maximal_violation():
    assert maximal_violation(torch.tensor([5, 5, 5, 5])) == 0
    assert maximal_violation(torch.tensor([8, 0, 0, 0])) == 3  # all on one of four


def test_sequence_balance_loss_by_hand():
    """Two sequences, E = 2, K_r = 1.

    First, T = 2: both tokens choose expert 0, f = (2, 0); s' = (.75, .25), (.5, .5); P = (.625, .375): 1.25.
    Second, T = 1: expert 1, f = (0, 2); s' = (.2, .8): 1.6. The mean is 1.425.
    """
    routing = routing_of([[0], [0], [1]], [[0.6, 0.2], [0.3, 0.3], [0.1, 0.4]], experts=2)
    loss = sequence_balance_loss(routing, torch.tensor([2, 1]))
    assert loss.item() == pytest.approx(1.425, rel=1e-6)
    with_empty = sequence_balance_loss(routing, torch.tensor([2, 0, 1, 0]))  # empty ones do not count
    assert with_empty.item() == pytest.approx(1.425, rel=1e-6)


def test_sequence_balance_loss_is_one_under_balance():
    def loss(routing):
        return sequence_balance_loss(routing, torch.tensor([len(routing.chosen)])).item()

    lopsided, scores = [[0, 1]] * 4, [[0.9, 0.9, 0.1, 0.1]] * 4
    assert loss(routing_of([[0, 1], [2, 3], [1, 2], [3, 0]], scores)) == pytest.approx(1)  # equal loads
    assert loss(routing_of(lopsided)) == pytest.approx(1)  # equal scores
    assert loss(routing_of(lopsided, scores)) == pytest.approx(1.8)


def test_sequence_balance_loss_is_per_sequence():
    """Two sequences that are lopsided in opposite ways: balanced over the batch, yet not over a sequence."""
    routing = routing_of([[0], [0], [1], [1]], [[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 2, experts=2)
    assert sequence_balance_loss(routing, torch.tensor([2, 2])).item() == pytest.approx(1.8)
    assert sequence_balance_loss(routing, torch.tensor([4])).item() == pytest.approx(1)


def test_a_step_down_the_sequence_loss_lowers_it():
    layer = init(MoE(config()))
    x, lengths = torch.randn(12, 8) + 1.0, torch.tensor([5, 7])
    before = sequence_balance_loss(layer.route(x), lengths)
    before.backward()
    assert layer.router.weight.grad.abs().sum() > 0
    with torch.no_grad():
        layer.router.weight -= 1e-3 * layer.router.weight.grad
    assert sequence_balance_loss(layer.route(x), lengths) < before


def test_no_tokens_have_no_balance_loss():
    routing = Routing(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64))
    assert sequence_balance_loss(routing, torch.tensor([0, 0])).item() == 0

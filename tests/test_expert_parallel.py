"""expert_parallel.py and exchange.py: two ranks with half of the experts each, against one process with all of them."""
import copy

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from minir1.losses import nll
from minir1.model.config import ModelConfig
from minir1.model.expert_parallel import divide_experts, expert_parameters, gather_experts
from minir1.model.lora import add_adapters
from minir1.model.moe import MoE, expert_load, sequence_balance_loss
from minir1.model.transformer import Transformer
from minir1.optim import adamw
from minir1.reduction import token_mean, weighted_sum
from minir1.sample import generate

RANKS = 2
CASES = {  # changes of the layer, number of tokens of each rank
    "even": ({}, (6, 6)),
    "uneven": ({}, (9, 2)),
    "none on the first": ({}, (0, 5)),
    "none on the second": ({}, (7, 0)),
    "none at all": ({}, (0, 0)),
    "one expert gets all": ({"experts_per_token": 1}, (5, 6)),
    "softmax, no shared expert": ({"score": "softmax", "shared_experts": 0, "norm_topk": False}, (20, 9)),
    "limited to a group": ({"groups": 2, "groups_kept": 1, "route_scale": 2.5}, (8, 6)),
    "widths of no 16 bytes": ({"dim": 7, "expert_ffn": 5}, (5, 6)),
}
THREE_AND_ONE, ALL_AND_NONE = (slice(0, 3), slice(3, 4)), (slice(0, 4), slice(4, 4))  # rows of each rank
SHAPE = {"vocab": 20, "layers": 3, "heads": 2, "kv_lora": 8, "nope": 4, "rope": 4, "v_dim": 4, "mtp_depth": 1}


def config(**changes):
    base = {"dim": 8, "experts": 6, "experts_per_token": 2, "shared_experts": 1, "expert_ffn": 12, "dense_layers": 1}
    return ModelConfig(**base | changes)


def filled(module, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.normal_(std=0.3, generator=gen)
    return module


def layer_of(case):
    layer = filled(MoE(config(**CASES[case][0])))
    if case == "one expert gets all":
        layer.bias[4] = 9.0  # scores are below 1
    return layer


def tokens_of(case):
    """Inputs and the gradients of outputs, of each rank."""
    gen, (changes, numbers) = torch.Generator().manual_seed(1), CASES[case]
    x, grad = torch.randn(2, sum(numbers), changes.get("dim", 8), generator=gen)
    return x.split(numbers), grad.split(numbers)


def passes(layer, x, grad):
    """Output, gradients of the input and of all weights, loads."""
    x, record = x.clone().requires_grad_(), []
    y = layer(x, record)
    y.backward(grad)
    return y.detach(), x.grad, {name: own(p.grad) for name, p in layer.named_parameters()}, expert_load(record[0])


def own(x):
    """This rank's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def model_of(seed=0, **changes):
    return filled(Transformer(config(**SHAPE | changes)), seed)


def padded():
    """Four rows of a batch, and how many tokens each has."""
    return torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(2)), torch.tensor([9, 3, 6, 8])


def backward(model, rows):
    """Gradients of mean losses over the four rows, from some of them; returns the loads of each layer."""
    tokens, lengths = padded()
    total, record = (lengths - 1).sum().item(), []
    logp, ahead = model.mtp_logprob(tokens[rows], lengths=lengths[rows], record=record)
    columns = torch.arange(9)
    mask = (columns > 0) & (columns < lengths[rows].unsqueeze(1))
    weights = token_mean(mask, total)
    loss = weighted_sum(weights, nll(logp)) + weighted_sum(weights * (columns > 1), nll(ahead))
    for routing in record[:2]:
        loss = loss + 0.1 * sequence_balance_loss(routing, lengths[rows]) * len(lengths[rows]) / 4
    loss.backward()
    return [expert_load(routing) for routing in record]


def descend(model):
    torch.optim.SGD(model.parameters(), lr=0.5, foreach=False).step()


def state_of(model):
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in model.state_dict().items()}


# ---------------------------------------------------------------- what the ranks do, all in one start of processes


def mesh():
    return init_device_mesh("cpu", (RANKS,))


def step(rows, recompute=False):
    """One step of gradient descent; the gradients of what every rank has are summed by hand."""
    model = divide_experts(model_of(), mesh())
    model.recompute(recompute)
    loads = backward(model, rows[dist.get_rank()])
    experts = set(expert_parameters(model))
    for p in model.parameters():
        if p not in experts:
            dist.all_reduce(p.grad)
    descend(model)
    with gather_experts(model):
        return state_of(model), loads


def step_with_fsdp(rows):
    model = divide_experts(model_of(), mesh())
    experts = set(expert_parameters(model))
    for module in (*model.blocks, *model.mtp, model):
        fully_shard(module, mesh=mesh(), ignored_params=experts)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    assert experts == set(expert_parameters(model))
    register_fsdp_forward_method(model, "mtp_logprob")
    loads = backward(model, rows[dist.get_rank()])
    descend(model)
    with gather_experts(model):
        state = state_of(model)
    adamw(model.parameters(), 0.1).step()  # fused, over the shards of FSDP and those of experts
    assert all((p.full_tensor() - state[name]).abs().max() > 0.05 for name, p in model.named_parameters())
    return state, loads


def gathered():
    """Whether weights survive division and gathering; what ranks sample together, and one without the other."""
    model = divide_experts(model_of(), mesh())
    together = sample(model)
    parameters = list(model.parameters())
    sizes = [tuple(own(p).shape) for p in expert_parameters(model)]
    with gather_experts(model):
        state, none = state_of(model), expert_parameters(model)
        answers = sample(model) if dist.get_rank() == 0 else None
    after = [tuple(own(p).shape) for p in expert_parameters(model)]
    with pytest.raises(KeyError), gather_experts(model):
        raise KeyError
    with gather_experts(model, torch.bfloat16):
        half = state_of(model)
    same = all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    return state, together, answers, half, sizes, after, none, same


def sample(model):
    return generate(model, [[1, 2, 3], [4]], answers=2, max_tokens=5, stop=[], seed=3).tokens


def adapted(mesh=None):
    """The gradients of adapters of experts."""
    model = model_of(mtp_depth=0)
    add_adapters(model, 2, 4.0, ["experts"])
    filled(model)
    if mesh is not None:
        divide_experts(model, mesh)
    tokens, lengths = padded()
    model.logprob(tokens, lengths=lengths).sum().backward()
    return {name: own(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def refused():
    """The messages where experts cannot be divided."""
    layer, messages = MoE(config(experts=5)), []
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            divide_experts(layer, mesh())
        messages.append(str(error.value))
        layer = divide_experts(MoE(config()), mesh())
    return messages


def half_precision():
    """Experts in bfloat16, and with fp32 masters whose layer computes in bfloat16."""
    layers = [divide_experts(layer_of("even"), mesh()).to(torch.bfloat16), divide_experts(layer_of("even"), mesh())]
    layers[1].shared.to(torch.bfloat16)
    x = tokens_of("even")[0][dist.get_rank()].bfloat16()
    return [layer(x).detach() for layer in layers]


def copied():
    """A copy, as of the policy for a reference, is divided like the original."""
    layer, x = divide_experts(layer_of("even"), mesh()), tokens_of("even")[0][dist.get_rank()]
    twin = copy.deepcopy(layer)
    before = layer(x)
    with torch.no_grad():
        layer.experts.down.zero_()
    return torch.equal(twin(x), before) and not torch.equal(layer(x), before)


def everything():
    rank, layers = dist.get_rank(), {}
    for case in CASES:
        x, grad = tokens_of(case)
        layers[case] = passes(divide_experts(layer_of(case), mesh()), x[rank], grad[rank])
    return {
        "layers": layers,
        "steps": [step(THREE_AND_ONE), step(ALL_AND_NONE), step(THREE_AND_ONE, True), step_with_fsdp(THREE_AND_ONE)],
        "gathered": gathered(),
        "adapted": adapted(mesh()),
        "refused": refused(),
        "half": half_precision(),
        "copied": copied(),
    }


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(RANKS, everything)


# ---------------------------------------------------------------- what one process does


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_and_its_gradients_equal_those_of_one_process(ranks, case):
    x, grad = tokens_of(case)
    y, x_grad, grads, load = passes(layer_of(case), torch.cat(x), torch.cat(grad))
    parts = [rank["layers"][case] for rank in ranks]
    close(torch.cat([part[0] for part in parts]), y)
    close(torch.cat([part[1] for part in parts]), x_grad)
    for name, want in grads.items():
        each = [part[2][name] for part in parts]
        close(torch.cat(each) if name.startswith("experts.") else sum(each), want)
    assert torch.equal(sum(part[3] for part in parts), load)
    if case == "one expert gets all":
        assert load.tolist() == [0, 0, 0, 0, 11, 0]


def test_without_shared_experts_the_experts_have_the_same_bits(ranks):
    """Their rows come in the order of one process."""
    case = "softmax, no shared expert"
    x, grad = tokens_of(case)
    y, _, grads, _ = passes(layer_of(case), torch.cat(x), torch.cat(grad))
    parts = [rank["layers"][case] for rank in ranks]
    assert torch.equal(torch.cat([part[0] for part in parts]), y)
    for name in ("experts.gate_up", "experts.down"):
        assert torch.equal(torch.cat([part[2][name] for part in parts]), grads[name])


@pytest.mark.parametrize("how", range(4), ids=["by hand", "a rank without rows", "recomputed", "FSDP2"])
def test_a_step_equals_that_of_one_process(ranks, how):
    """Padded rows, with a module for multi-token prediction."""
    model = model_of()
    before, loads = state_of(model), backward(model, slice(0, 4))
    descend(model)
    want = state_of(model)
    for rank in ranks:
        state, _ = rank["steps"][how]
        assert state.keys() == want.keys()
        for name in want:
            close(state[name], want[name])
    moved = [name for name in want if (want[name] - before[name]).abs().max() > 1e-4]
    assert sum(".experts." in name for name in moved) == 6  # two matrices of two layers and of the module
    assert len(loads) == 3
    for layer, load in enumerate(loads):
        assert torch.equal(sum(rank["steps"][how][1][layer] for rank in ranks), load)


def test_gathering_gives_all_weights_and_no_rank_waits(ranks):
    model = model_of()
    for rank in ranks:
        state, together, _, half, sizes, after, none, same = rank["gathered"]
        assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())
        assert {name for name, x in half.items() if x.dtype == torch.bfloat16} == {n for n in half if ".experts." in n}
        assert all(torch.equal(x, state[name].to(x.dtype)) for name, x in half.items())
        assert sizes == after == [(3, 24, 8), (3, 8, 12)] * 3
        assert none == [] and same and torch.equal(together, sample(model))
    assert torch.equal(ranks[0]["gathered"][2], sample(model))


def test_adapters_are_divided_with_their_experts(ranks):
    want = adapted()
    assert len(want) == 8 and want.keys() == ranks[0]["adapted"].keys()
    for name, grad in want.items():
        parts = torch.cat([rank["adapted"][name] for rank in ranks])
        close(parts / RANKS, grad)  # both ranks had all rows


def test_refusals_name_the_numbers(ranks):
    assert ranks[0]["refused"] == [
        "5 experts over 2 ranks: must divide evenly",
        "the experts are divided already, over 2 ranks",
    ]


def test_half_precision(ranks):
    layer = layer_of("even").to(torch.bfloat16)
    want = layer(torch.cat(tokens_of("even")[0]).bfloat16())
    for parts in zip(*(rank["half"] for rank in ranks)):
        assert parts[0].dtype == torch.bfloat16
        torch.testing.assert_close(torch.cat(parts), want, rtol=2e-2, atol=2e-2)


def test_a_copy_is_divided_too(ranks):
    assert all(rank["copied"] for rank in ranks)


def test_one_process_gathers_nothing():
    model = model_of()
    with gather_experts(model) as same:
        assert same is model and expert_parameters(model) == []

"""Feed-forward layers: SwiGLU, and DeepSeekMoE with auxiliary-loss-free balancing (V3, arXiv:2412.19437, 2.1.2)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minir1.model.config import ModelConfig
from minir1.model.exchange import over_ranks
from minir1.ops.chunks import no_autocast

FEW = 1024  # tokens times experts: up to here all experts on all tokens cost less than sorting the pairs


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x) (arXiv:2002.05202). x: [..., D] -> [..., D]."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.gate = nn.Linear(dim, inner, bias=False)
        self.up = nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def fuse(self) -> tuple[Tensor, Tensor]:
        """[W_gate ; W_up] as one matrix, [2·inner, D], and W_down."""
        return torch.cat((self.gate.weight, self.up.weight)), self.down.weight

    def forward(self, x: Tensor, fused=None) -> Tensor:
        """x: [..., D] -> [..., D]; fused: `fuse()`, or None."""
        if fused is None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        gate, up = F.linear(x, fused[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, fused[1])


class Routing(NamedTuple):
    """What one MoE layer decided for N tokens."""

    scores: Tensor  # fp32 [N, E], s_{i,t}
    chosen: Tensor  # int64 [N, K_r]


class Experts(nn.Module):
    """E SwiGLU networks with stacked weights and grouped products: each token passes through K_r of them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mesh = None  # of the W ranks over which `expert_parallel.divide_experts` has divided them, each with E/W
        self.gate_up = nn.Parameter(torch.empty(config.experts, 2 * config.expert_ffn, config.dim))
        self.down = nn.Parameter(torch.empty(config.experts, config.dim, config.expert_ffn))
        self.adapters = nn.ModuleDict()  # name of the matrix -> its LoRAExperts (lora.py)

    def linear(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """The rows of each expert times its matrix of that name. x: [N, in]; ends: int32 [E] -> [N, out]."""
        y = grouped_linear(x, getattr(self, name), ends)
        return self.adapters[name](x, y, ends) if name in self.adapters else y

    def products(self, x: Tensor, gates: Tensor, ends: Tensor) -> Tensor:
        """gates[n] · expert(x[n]) for rows sorted by expert. x: [N, D]; gates: [N]; ends: int32 [E] -> [N, D]."""
        gate, up = self.linear("gate_up", x, ends).chunk(2, dim=-1)
        return self.linear("down", F.silu(gate) * up * gates.unsqueeze(1), ends)

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor, shared: nn.Module | None = None) -> Tensor:
        """Σ_k gates[n, k] · expert_{chosen[n, k]}(x_n), plus shared(x_n) if there are shared experts.

        Dropless: the N·K_r pairs are sorted by expert, and each expert multiplies its own rows. x: [N, D]; chosen,
        gates: [N, K_r]; returns [N, D].
        """
        k = chosen.shape[1]
        expert, order = chosen.flatten().sort(stable=True)
        pair = torch.empty_like(order)  # index of each pair in the order of experts
        pair[order] = torch.arange(len(order), device=order.device)
        each = torch.arange(len(self.gate_up), device=x.device)
        ends = torch.searchsorted(expert, each, right=True, out_int32=True)  # bincount would wait for a GPU
        token, pair = order // k, pair.view(-1, k)
        pending = []  # exchanges between ranks, during which the shared experts compute
        products = self.products if self.mesh is None else partial(over_ranks, self.products, self.mesh, pending)
        out = products(Gather.apply(x, token, pair), gates.to(x.dtype).flatten().index_select(0, order), ends)
        beside = None if shared is None else shared(x)
        for work in pending:
            work.wait()
        out = Gather.apply(out, pair, token)
        return out if beside is None else out + beside


class Gather(torch.autograd.Function):
    """`rows_of(x, index)`. Its gradient is `rows_of` with the inverse index, instead of a scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows_of(x, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return rows_of(grad, *ctx.saved_tensors), None, None


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for int64 [M] -> [M, D]; Σ_k x[index[n, k]] for int64 [N, K] -> [N, D]. x: [·, D]."""
    if index.ndim == 1:
        return x.index_select(0, index)
    return F.embedding_bag(index, x, mode="sum") if x.device.type == "cpu" else x[index].sum(1)  # the first in one pass


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[e-1] to ends[e] of x times weight[e]ᵀ. x: [N, in]; weight: [E, out, in]; ends: int32 [E] -> [N, out].

    torch's grouped product needs row strides that are multiples of 16 bytes, and has no fp64. Other widths are padded
    with zeros on CUDA; on the CPU, and always in fp64 and on Apple's GPUs, the experts run one after the other, for
    which the host waits for their counts.
    """
    weight = weight.to_local() if hasattr(weight, "to_local") else weight  # this rank's E/W experts, of a DTensor of E
    weight = weight.to(x.dtype)  # a master computes in another dtype
    step = 16 // x.element_size()
    padding = [-n % step for n in (weight.shape[2], weight.shape[1])]  # of in, out
    one_by_one = x.device.type == "mps" or (any(padding) and x.device.type == "cpu")
    if one_by_one or x.dtype == torch.float64 or len(x) == 0:
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.cat([F.linear(part, w) for part, w in zip(x.split(counts), weight)])
    if any(padding):
        x, weight = F.pad(x, (0, padding[0])), F.pad(weight, (0, padding[0], 0, padding[1]))
    out = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return out[:, : out.shape[1] - padding[1]] if padding[1] else out


class MoE(nn.Module):
    """DeepSeekMoE layer: shared experts for every token, and the K_r best of E routed experts (V3, equations 12-16).

        s_i = σ(x·e_i)     chosen = the K_r largest s_i + b_i     g_i = s_i / Σ_chosen s · route_scale
        y   = Σ_shared FFN(x) + Σ_chosen g_i FFN_i(x)

    b (`bias`) only selects and has no gradient; `balance_step` moves it. With groups, a token may use only the experts
    of its `groups_kept` best groups (V3: score of a group = sum of its two best s + b; V2: its best).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.dim, config.experts, bias=False)
        self.register_buffer("bias", torch.zeros(config.experts))
        self.experts = Experts(config)
        self.shared = SwiGLU(config.dim, config.shared_experts * config.expert_ffn) if config.shared_experts else None

    def _apply(self, fn, recurse=True):
        # `.to(bfloat16)` must not round the bias: its steps of 1e-3 would vanish.
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            self.bias = bias.to(self.bias.device)
        return self

    def route(self, x: Tensor) -> Routing:
        """x: [N, D]. The router runs in fp32 whatever the dtype of the model, also under torch.autocast."""
        config = self.config
        with no_autocast(x):
            logits = F.linear(x.float(), self.router.weight.float())
        scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
        choice = (scores + self.bias).detach()
        if config.groups > 1:
            grouped = choice.unflatten(-1, (config.groups, -1))
            best = min(2 if config.score == "sigmoid" else 1, grouped.shape[-1])
            groups = grouped.topk(best, dim=-1).values.sum(-1).topk(config.groups_kept, dim=-1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, groups, False)
            choice = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        return Routing(scores, choice.topk(config.experts_per_token, dim=-1).indices)

    def gates(self, routing: Routing) -> Tensor:
        """g: fp32 [N, K_r]"""
        gates = routing.scores.gather(-1, routing.chosen)
        if self.config.norm_topk:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return gates if self.config.route_scale == 1.0 else gates * self.config.route_scale

    def fuse(self) -> tuple[Tensor, Tensor]:
        """All experts, the shared ones last, as one SwiGLU: gates and ups, and downs.

        Their shapes are [2·(E + N_s)·expert_ffn, D] and [D, (E + N_s)·expert_ffn].
        """
        gate, up = (part.flatten(0, 1) for part in self.experts.gate_up.chunk(2, dim=1))
        down = self.experts.down.transpose(0, 1).flatten(1)
        if self.shared is not None:
            gate, up = torch.cat((gate, self.shared.gate.weight)), torch.cat((up, self.shared.up.weight))
            down = torch.cat((down, self.shared.down.weight), dim=1)
        return torch.cat((gate, up)), down

    def every_expert(self, x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        """y of few tokens: every expert takes every token, with gate 0 where it was not chosen, and 1 for shared ones.

        x: [N, D]; gate_up, down: `fuse()`. Returns [N, D].
        """
        gates = torch.zeros_like(routing.scores).scatter_(1, routing.chosen, self.gates(routing)).to(x.dtype)
        gates = F.pad(gates, (0, self.config.shared_experts), value=1.0)
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        inner = (F.silu(gate) * up).unflatten(1, (gates.shape[1], -1)) * gates.unsqueeze(-1)
        return F.linear(inner.flatten(1), down)

    def forward(self, x: Tensor, record: list[Routing] | None = None, routes: Tensor | None = None, fused=None):
        """x: [..., D] -> [..., D]; the routing is appended to `record`, if any. fused: `fuse()`, or None.

        routes: int [N, K_r], experts that the N tokens must use, or -1 for a token whose experts the router chooses.
        Scores and gates of these experts come from the current router, so that gradients reach it.
        """
        flat = x.flatten(0, -2)
        routing = self.route(flat)
        if routes is not None:
            routing = Routing(routing.scores, torch.where(routes < 0, routing.chosen, routes.long()))
        if record is not None:
            record.append(routing)
        if fused and len(flat) * self.config.experts <= FEW:
            return self.every_expert(flat, routing, *fused).view_as(x)
        return self.experts(flat, routing.chosen, self.gates(routing), self.shared).view_as(x)


def routes_of(record: list[Routing]) -> Tensor:
    """The chosen experts in a record of all MoE layers, int16 [N, L_moe, K_r]."""
    return torch.stack([routing.chosen for routing in record], dim=1).to(torch.int16)


def rerouted(routes: Tensor, other: Tensor) -> Tensor:
    """Where the set of chosen experts differs, whatever their order; False where one of the two is unknown (-1).

    routes, other: int [..., L_moe, K_r]. Returns bool [..., L_moe].
    """
    differs = (routes.sort(-1).values != other.sort(-1).values).any(-1)
    return differs & (routes >= 0).all(-1) & (other >= 0).all(-1)


def expert_load(routing: Routing) -> Tensor:
    """How many tokens chose each expert, int64 [E]; the load of a batch is the sum over micro-batches and ranks."""
    return routing.chosen.flatten().bincount(minlength=routing.scores.shape[-1])


@torch.no_grad()
def balance_step(bias: Tensor, load: Tensor, speed: float) -> None:
    """Move the selection bias of an overloaded expert down by γ = `speed` and of an underloaded one up, in place.

    b_i <- b_i + γ·sign(mean load - load_i) (arXiv:2408.15664, algorithm 1), once per optimizer step. bias: fp32 [E];
    load: [E], of the whole batch.
    """
    load = load.to(bias)
    bias += speed * (load.mean() - load).sign()


def sequence_balance_loss(routing: Routing, lengths: Tensor) -> Tensor:
    """V3's complementary loss (section 2.1.2), without its factor α: mean over sequences of Σ_i f_i P_i.

        f_i = E / (K_r T) · Σ_t 1[i chosen by t]      P_i = 1/T · Σ_t s_{i,t} / Σ_j s_{j,t}

    "Chosen" includes the effect of the selection bias and of groups. routing: of N packed tokens; lengths: int64 [B],
    summing to N; sequences without tokens do not count. Returns fp32 [], which is 1 under perfect balance.
    """
    experts, k = routing.scores.shape[-1], routing.chosen.shape[-1]
    row = torch.repeat_interleave(lengths)
    total = lengths.clamp(min=1).unsqueeze(1)
    hits = F.one_hot(routing.chosen, experts).sum(1).to(routing.scores.dtype)
    shape = routing.scores.new_zeros(len(lengths), experts)
    share = shape.index_add(0, row, hits) * (experts / k) / total
    affinity = shape.index_add(0, row, routing.scores / routing.scores.sum(-1, keepdim=True)) / total
    return (share * affinity).sum() / (lengths > 0).sum().clamp(min=1)


def maximal_violation(load: Tensor) -> float:
    """MaxVio = max_i load_i / mean load - 1 (arXiv:2408.15664, equation 4); 0 is perfect balance."""
    return (load.max() / load.float().mean() - 1).item()


def idle_share(load: Tensor) -> float:
    """The share of experts with less than a tenth of the mean load; 0 for a layer that saw no token. load: [E]."""
    return (load.float() < 0.1 * load.float().mean()).float().mean().item()

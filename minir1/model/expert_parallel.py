"""Expert parallelism: the experts of every MoE layer divided over the ranks of a group (GShard, arXiv:2006.16668).

    model = divide_experts(model, group)                           # rank r of W keeps experts r·E/W to (r+1)·E/W - 1
    fully_shard(..., ignored_params=set(expert_parameters(model)))
    with gather_experts(model): hf.save(...), collect(...)         # every rank has all experts

Each rank routes its own tokens with its own copy of the router, sends each token to the ranks of its experts and gets
their outputs back (`exchange.py`). The result is that of one process with the tokens of all ranks.

**Every forward and backward pass is a collective**: all ranks of the group must make the same passes in the same
order, a rank that has run out of tokens with none (N = 0), else the others wait for it forever. Ranks that sample do
not stop at the same token, so sampling belongs inside `gather_experts`.

**Gradients.** With L = Σ_r L_r, where the weights of a loss sum to one over the tokens of all ranks (the `total` of
minir1/reduction.py), a parameter that every rank has needs the sum of all ranks' gradients. An expert has it already:
the tokens of all ranks come to it, and their gradients with them.

    ∂L/∂W_e    = Σ_r Σ_{t of r, e chosen}    complete on the rank of e: neither sum it over the group nor divide it
    ∂L/∂θ_rest = Σ_r ∂L_r/∂θ_rest            FSDP2 divides this sum by its R ranks

So tell FSDP2 not to divide, with `set_gradient_divide_factor(1.0)` on each of its modules (and, with gloo,
`set_force_sum_reduction_for_comms(True)`). If instead the loss is multiplied by R to cancel FSDP2's division, every
expert's gradient is R times too large: divide it by R. Where several groups have copies of the same experts, their
gradients must be summed over these copies. The joint norm for clipping is √(‖g_rest‖² + Σ_r ‖g_experts of r‖²).
The loads of experts count the tokens of one rank: sum them over ranks before `balance_step`.

**What is not here.** V3 (section 3.2) divides its experts over 64 ranks on 8 nodes. Its routing limits each token to 4
nodes (section 2.1.2; `groups_kept` in ModelConfig), so that a token crosses InfiniBand once per node and is forwarded
over NVLink to all its experts there; here it is sent once per expert. DeepEP's kernels route the rows inside the
exchange; here the host waits for the counts, once per layer. DualPipe hides the exchange of one micro-batch behind the
computation of another; here only the shared experts overlap, with the way back of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from minir1.model.moe import Experts


def divided(model: nn.Module) -> list[Experts]:
    """The experts of all layers that are divided, those of MTP modules included."""
    return [module for module in model.modules() if isinstance(module, Experts) and module.group is not None]


def divide_experts(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Keep this rank's experts of every MoE layer, with their adapters, in place; returns the model.

    All ranks of the group must have equal weights. Call it before FSDP and before the optimizer is made. ValueError
    where the experts cannot be divided evenly, or are divided already.
    """
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    world = group.size()
    for experts in layers:
        if experts.total % world:
            raise ValueError(f"{experts.total} experts over {world} ranks: the ranks must divide the experts evenly")
        if experts.group is not None:
            raise ValueError(f"the experts are divided already, over {experts.group.size()} ranks")
    for experts in layers:
        for p in experts.parameters():
            p.data = own(p.data, group).clone()
        experts.group = group
    return model


def own(stack: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of a stack of all experts, a view. stack: [E, ...] -> [E/W, ...]."""
    return stack.chunk(group.size())[group.rank()]


def whole(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `own`, on all ranks; also for what an optimizer keeps of a part. part: [E/W, ...] -> [E, ...]."""
    result = part.new_empty(group.size() * len(part), *part.shape[1:])
    dist.all_gather_into_tensor(result, part.contiguous(), group=group)
    return result


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that each rank has a part of, which FSDP has to ignore; none where no experts are divided."""
    return [p for experts in divided(model) for p in experts.parameters()]


@contextmanager
def gather_experts(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, every rank has all experts and needs no other rank: to save the weights, load them, copy them, sample.

    On exit each rank keeps its part of what the weights are then. All ranks must enter it together. It needs memory for
    all experts on each rank, in addition to their parts. Without divided experts it does nothing.
    """
    parts = [(experts, experts.group, [(p, p.data) for p in experts.parameters()]) for experts in divided(model)]
    for experts, group, parameters in parts:
        for p, part in parameters:
            p.data = whole(part, group)
        experts.group = None
    try:
        yield model
    finally:
        for experts, group, parameters in parts:
            for p, part in parameters:
                p.data = part.copy_(own(p.data, group))
            experts.group = group

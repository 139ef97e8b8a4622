"""Expert parallelism: the experts of every MoE layer divided over the ranks of a mesh (GShard, arXiv:2006.16668).

    divide_experts(model, mesh)                          # rank r of W keeps experts r·E/W to (r + 1)·E/W - 1
    fully_shard(model, ignored_params=set(expert_parameters(model)))
    with gather_experts(model): ...                      # every rank has all experts

Each rank routes its own tokens with its own copy of the router, sends each token to the ranks of its experts and gets
their outputs back (`exchange.py`). The result is that of one process with the tokens of all ranks. The parameters are
DTensors in shards of the first dimension, as FSDP2 would store them, but never gathered to compute; an optimizer that
steps all tensors at once needs the rest of the model in shards as well.

**Every pass is an exchange.** All ranks must make the same forward and backward passes in the same order, a rank that
has run out of tokens with none (N = 0), else the others wait for it forever. Ranks that sample do not end at the same
token, so sampling belongs inside `gather_experts`.

**Gradients.** With L = Σ_r L_r, where the weights of a loss sum to one over the tokens of all ranks (the `total` of
minir1/reduction.py), a parameter that every rank has needs the sum of all ranks' gradients. An expert's gradient is
that sum already, since the tokens of all ranks come to it:

    ∂L/∂W_e = Σ_r ∂L_r/∂W_e     complete on the rank that has e: neither to be summed over ranks nor to be divided
    ∂L/∂θ   = Σ_r ∂L_r/∂θ       for all other parameters; FSDP2 divides this sum by W

So tell FSDP2 not to divide, by `set_gradient_divide_factor(1.0)` on each of its modules (with gloo also
`set_force_sum_reduction_for_comms(True)`). If the loss is multiplied by W instead, to cancel that division, the
gradients of experts are W times too large. Where several meshes have copies of the same experts, the gradients of the
copies must be summed. The norm for clipping is √Σ_r ‖g of r's shards‖². The loads of experts count the tokens of one
rank: sum them over ranks before `balance_step`.

**What is missing.** V3 divides its experts over 64 ranks on 8 nodes (section 3.2). It routes each token to at most 4
nodes (section 2.1.2; here `groups_kept`), sends it once to each over InfiniBand and forwards it to its experts there
over NVLink (section 3.2.2); here it is sent once per expert. The host waits for the numbers of rows in every layer,
which DeepEP's kernels avoid. DualPipe hides the exchanges of one micro-batch behind the computation of another (section
3.2.1); here only the shared experts compute during an exchange, the second one of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from minir1.model.moe import Experts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# DTensor is imported where it is used: it takes half as long as importing torch.


def divided(model: nn.Module) -> list[Experts]:
    """The experts of all layers that are divided, those of MTP modules included."""
    return [module for module in model.modules() if isinstance(module, Experts) and module.mesh is not None]


def divide_experts(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Keep this rank's experts of every MoE layer, with their adapters, in place; returns the model.

    mesh: of one dimension. All its ranks must have equal weights, on its device. Call it before FSDP, and before the
    optimizer is made: parameters are new ones, DTensors in shards of the first dimension. ValueError where the ranks
    cannot divide the experts evenly, or have done so already.
    """
    from torch.distributed.tensor import DTensor, Shard

    layers = [module for module in model.modules() if isinstance(module, Experts)]
    for experts in layers:
        if len(experts.gate_up) % mesh.size():
            raise ValueError(f"{len(experts.gate_up)} experts over {mesh.size()} ranks: must divide evenly")
        if experts.mesh is not None:
            raise ValueError(f"the experts are divided already, over {experts.mesh.size()} ranks")
    for experts in layers:
        for module, name, p in named(experts):
            own = p.detach().chunk(mesh.size())[mesh.get_local_rank()].clone().to(mesh.device_type)
            shard = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            setattr(module, name, nn.Parameter(shard, p.requires_grad))
        experts.mesh = mesh
    return model


def named(experts: Experts) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """All parameters, each with its module and its name there."""
    return [(module, name, p) for module in experts.modules() for name, p in module.named_parameters(recurse=False)]


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that each rank has a part of, which FSDP has to ignore; none where no experts are divided."""
    return [p for experts in divided(model) for p in experts.parameters()]


@contextmanager
def gather_experts(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """Inside, every rank has all experts and needs no other rank: to save the weights, copy the model, sample.

    All ranks must enter it together. The weights inside are copies, in addition to the parts: what is written into them
    is lost. dtype: of the copies, by default that of the parts. Without divided experts it does nothing.
    """
    layers = [(experts, experts.mesh, named(experts)) for experts in divided(model)]
    for experts, _, parameters in layers:
        for module, name, p in parameters:
            setattr(module, name, nn.Parameter(p.detach().to(dtype or p.dtype).full_tensor(), p.requires_grad))
        experts.mesh = None
    try:
        yield model
    finally:
        for experts, mesh, parameters in layers:
            for module, name, p in parameters:
                setattr(module, name, p)
            experts.mesh = mesh

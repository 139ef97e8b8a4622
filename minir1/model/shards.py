"""A model divided over the ranks: FSDP2's shards, block by block, and experts that stay where they are.

    shard(device, dtype, model)         before the optimizer is made; in one process nothing happens
    with gathered(model): ...           passes without gradient, saving

minir1/distributed.py has what is where.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minir1.distributed import computed_in, divided, exchanged, is_shard, local, mesh, world
from minir1.model.expert_parallel import divide_experts, expert_parameters, gather_experts
from minir1.model.moe import Experts

UNITS = re.compile(r"(trunk\.)?(blocks|mtp)\.\d+")  # modules whose weights are gathered together
FORWARD = ("logprob", "mtp_logprob", "states", "hidden", "values", "score")  # methods that are a forward pass


def shard(device: torch.device, dtype: torch.dtype, *models: nn.Module) -> None:
    """Divide models over the ranks, in place: of each parameter's first dimension 1/W on each rank, on `device`.

    dtype: of the computation. The parameters stay in fp32: they are the masters, and gradients are summed in fp32.
    Experts are divided whole, and tokens go to them (expert_parallel.py), if the ranks divide their number; else FSDP
    gathers them like the rest. Blocks are its units; embedding, last norm and head are one, gathered from the beginning
    of a pass to the end of its backward pass. So a pass without one belongs into `gathered`: they would still be there
    after the next step. The head of a scalar model computes in fp32, as in one process. There nothing happens.
    """
    if world() == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    for model in dict.fromkeys(models):
        experts = [module for module in model.modules() if isinstance(module, Experts)]
        if all(len(each.gate_up) % world() == 0 for each in experts):
            divide_experts(model, mesh(device))
        elsewhere = set(expert_parameters(model))
        units = [(module, dtype) for name, module in model.named_modules() if UNITS.fullmatch(name)]
        units += [(model.head, torch.float32)] if hasattr(model, "trunk") else []
        model.sums = Sums()
        for unit, used in (*units, (model, dtype)):
            # Inputs are not cast: the embedding already gives states in `dtype`.
            policy = MixedPrecisionPolicy(param_dtype=used, reduce_dtype=torch.float32, cast_forward_inputs=False)
            settings = {"reshard_after_forward": unit is not model, "ignored_params": elsewhere}
            fully_shard(unit, mesh=mesh(device), mp_policy=policy, **settings)
            unit.set_gradient_divide_factor(1.0)  # the sum over ranks
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
            unit.set_custom_reduce_scatter(model.sums)
        for name in FORWARD:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
        model._get_fsdp_state()._lazy_init()  # else a first pass through blocks alone, as in sampling, makes them roots
        for unit, used in ((model, dtype), *units):  # the units last: the head of a scalar model is in fp32
            for parameter in unit.parameters():
                parameter.computed_in = used


class Sums:
    """FSDP's sum of gradients over ranks; remembers whether this rank's own were finite, as the sum does not show whose
    were not."""

    finite: Tensor | bool = True

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for input and output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group, op, async_op: bool = False):
        """Each rank's part of the sum into output_tensor. Waits for no device."""
        self.finite = torch.linalg.vector_norm(input_tensor).isfinite() & self.finite
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.13
        return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def not_finite(model: nn.Module) -> str:
    """", first on rank 1": where a gradient that is not finite comes from; all ranks ask. "" in one process.

    It is the rank whose part of the weights is not finite, if there is one, or else whose loss or backward pass is not.
    """
    if not is_sharded(model):
        return ""
    weights = [name for name, p in model.named_parameters() if not local(p).isfinite().all()]
    of_ranks = exchanged((weights[:1], bool(model.sums.finite)))
    bad = [f"rank {r}, in its part of {weight}" for r, (names, _) in enumerate(of_ranks) for weight in names]
    bad = bad or [f"rank {r}, in its own loss or backward pass" for r, (_, finite) in enumerate(of_ranks) if not finite]
    return f", first on {' and '.join(bad)}" if bad else ""


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The whole weights on every rank, in the dtype of the computation, as long as the block lasts, without gradient.

    In it, passes exchange nothing, so that ranks may make different numbers of them. Each rank needs the memory of one
    more copy, in 16 bits on a GPU; a model for which there is none cannot be sampled here. May be nested.
    """
    units = [m for m in model.modules() if hasattr(m, "unshard") and not getattr(m, "is_gathered", False)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        with torch.no_grad():
            unit.unshard()
        unit.is_gathered = True
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not units), gather_experts(model, _dtype_of(model)):
            yield
    finally:
        for unit in units:
            unit.is_gathered = False
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return computed_in(next(model.parameters()))


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has divided the model."""
    return any(map(is_shard, model.parameters()))


@torch.no_grad()
def fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors, whole or divided, into the parameters and buffers of these names. ValueError for another shape."""
    targets = module.state_dict()
    for name, x in tensors.items():
        if name not in targets or x.shape != targets[name].shape:
            raise ValueError(f"{name}, {tuple(x.shape)}: no tensor of the model has this name and shape")
        x = x.to(targets[name].device)
        local(targets[name]).copy_(local(divided(x) if is_shard(targets[name]) else x))

"""Tokens to the ranks that have their experts, and back: all-to-all with gradients (V3, section 3.2.2).

    dispatch   x[n] -> the rank of its expert        combine   y[n] -> the rank of its token

Each is the gradient of the other. No token is dropped (V3, section 2.1.2): ranks send and receive any number of rows,
also none, so they first tell each other how many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Plan(NamedTuple):
    """Which rows a rank of W sends and receives. N: its rows, sorted by expert; M: those that its own experts get."""

    send: list[int]  # of the N rows, to each rank
    receive: list[int]  # of the M rows, from each rank
    order: Tensor  # int64 [M], from the order of arrival (by rank, then expert) to the order by expert, then rank
    inverse: Tensor  # int64 [M], back
    ends: Tensor  # int32 [E/W], end of the rows of each expert here
    group: dist.ProcessGroup


def plan_of(ends: Tensor, group: dist.ProcessGroup) -> Plan:
    """The plan for rows sorted by expert. ends: int32 [E], end of the rows of each of all experts."""
    world = group.size()
    counts = ends.diff(prepend=ends.new_zeros(1)).view(world, -1)  # [W, E/W], to each rank for each of its experts
    arriving = torch.empty_like(counts)  # [W, E/W], from each rank for each expert here
    dist.all_to_all_single(arriving, counts, group=group)
    send, receive = torch.stack((counts.sum(1), arriving.sum(1))).tolist()  # the host waits for a GPU here
    here = torch.arange(counts.shape[1], device=ends.device).repeat(world)
    expert = here.repeat_interleave(arriving.flatten(), output_size=sum(receive))
    order = expert.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return Plan(send, receive, order, inverse, arriving.sum(0).cumsum(0, dtype=torch.int32), group)


def dispatch(x: Tensor, plan: Plan) -> Tensor:
    """The rows for this rank's experts, sorted by expert. x: [N, ...] -> [M, ...]."""
    y = x.new_empty(sum(plan.receive), *x.shape[1:])
    dist.all_to_all_single(y, x.contiguous(), plan.receive, plan.send, group=plan.group)
    return y.index_select(0, plan.order)


def combine(y: Tensor, plan: Plan, pending: list | None = None) -> Tensor:
    """The inverse of `dispatch`. y: [M, ...] -> [N, ...], valid once everything that is put into `pending` is waited
    for, or at once where it is None."""
    x = y.new_empty(sum(plan.send), *y.shape[1:])
    back = y.index_select(0, plan.inverse), plan.send, plan.receive
    work = dist.all_to_all_single(x, *back, group=plan.group, async_op=pending is not None)
    if pending is not None:
        pending.append(work)
    return x


class Dispatch(torch.autograd.Function):
    """`dispatch`, with `combine` as its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return dispatch(x, plan)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return combine(grad, ctx.plan), None


class Combine(torch.autograd.Function):
    """`combine`, with `dispatch` as its gradient."""

    @staticmethod
    def forward(ctx, y: Tensor, plan: Plan, pending: list) -> Tensor:
        ctx.plan = plan
        return combine(y, plan, pending)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return dispatch(grad, ctx.plan), None, None


def over_ranks(
    products: Callable[[Tensor, Tensor, Tensor], Tensor],
    mesh: DeviceMesh,
    pending: list,
    x: Tensor,
    gates: Tensor,
    ends: Tensor,
) -> Tensor:
    """`products(x, gates, ends)` of rows whose experts are divided over the ranks of a mesh, rank r of W having
    those from r·E/W.

    x: [N, D], sorted by expert; gates: [N]; ends: int32 [E]. Each rank calls `products` with the rows of all ranks for
    its own E/W experts, in the order of ranks, and so in the order that one process would have. Returns [N, D], valid
    once the works in `pending` are waited for: until then the tokens are on their way and other work may overlap.
    """
    plan = plan_of(ends, mesh.get_group())
    out = products(Dispatch.apply(x, plan), Dispatch.apply(gates, plan), plan.ends)
    return Combine.apply(out, plan, pending)

"""Many processes that train one model: PyTorch's groups and FSDP2, and the few exchanges that R1 needs on top.

    torchrun --nproc-per-node 8 -m experiments.r1_zero --checkpoint Qwen2.5-7B --out runs/r1-zero

torchrun starts the same script once a GPU; each process is a rank. What is where:

    weights, gradients, moments    a shard on each rank (model/shards.py): FSDP2 gathers a block's while it computes
    a forward pass with gradient   each rank takes micro-batches of its own (`deal`), all equally many
    passes without gradient        the weights are gathered once, then each rank works through rows of its own
    a rollout and its verdicts     whole on every rank: each samples whole groups, judges every W-th answer, exchanges
    files, the terminal            rank 0 alone (`on_first`, `group`)

So every rank computes the same rewards, advantages and decisions from the same numbers, and a script has no branch for
it. The sum over ranks of a loss is the loss of one process, since its weights count tokens and answers of the whole
batch (minir1/reduction.py): gradients are summed, never averaged. In one process there is no group, and every function
here returns what it was given.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minir1 import faults
from minir1.ranks import rank, world

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
WAIT = timedelta(minutes=float(os.environ.get("MINIR1_WAIT_MINUTES", 30)))  # for a rank that does not come

# DTensor is imported where it is used: it takes half as long as importing torch.


@contextmanager
def group() -> Iterator[None]:
    """The process group of torchrun's processes, as long as the block lasts: NCCL between GPUs, gloo between CPUs.

    Only rank 0 prints. Where one rank fails, the errors of the others name it (minir1/faults.py).
    """
    gpu = torch.cuda.is_available()
    if gpu:
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("LOCAL_RANK, the GPU of this rank, is not set: start the script with torchrun")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here changes one in place
    store, number, size = next(dist.rendezvous("env://", timeout=WAIT))
    faults.refused_before(store)
    started = {"store": faults.attempt(store), "rank": number, "world_size": size, "timeout": WAIT}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", **started)
    stdout = sys.stdout
    if rank():
        sys.stdout = open(os.devnull, "w")
    try:
        with faults.named(store, number, size, WAIT):
            second_group()
            yield
            exchanged(None, in_thread=True)  # the first to end would close the connections of the others
    finally:
        sys.stdout = stdout
    dist.destroy_process_group()


_thread_group = None  # made by second_group


def second_group() -> None:
    """Make the group over which a thread may exchange (`exchanged(in_thread=True)`) while the first group is in use."""
    global _thread_group
    _thread_group = dist.new_group(backend="gloo", timeout=WAIT)


# ---- exchanges -----------------------------------------------------------------------------------


def on_first(function: Callable[[], T]) -> T:
    """Rank 0 calls the function; every rank returns what it returned, or raises what it raised. Others wait for it."""
    if world() == 1:
        return function()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # raised again on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def exchanged(value: T, *, in_thread: bool = False) -> list[T]:
    """The values of all ranks, in their order. in_thread: for a thread beside the one that trains."""
    if world() == 1:
        return [value]
    values: list = [None] * world()
    dist.all_gather_object(values, value, group=_thread_group if in_thread else None)
    return values


def my_share(items: Sequence[T]) -> Sequence[T]:
    """Every W-th item, from the number of this rank on."""
    return items[rank() :: world()]


def sum_of_ranks(value):
    """The sum over ranks of a number, or of a tensor of the same shape on each."""
    if world() == 1:
        return value
    summed = value.clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed if isinstance(value, Tensor) else summed.item()


def deal(parts: Sequence[list[int]]) -> list[tuple[list[int], float]]:
    """This rank's micro-batches, each with its share in the loss: as many on every rank, as a pass gathers weights.

    parts: rows of each micro-batch of the whole batch, the same on every rank, similar ones next to each other. Rank r
    takes parts r, r + W, r + 2W … Where W does not divide their number, the ones with most rows are halved; single
    rows, if need be, are computed by k ranks, with a share of 1/k in each. Else the share is 1.
    """
    parts, W = list(parts), world()
    while len(parts) % W and max(map(len, parts)) > 1:
        longest = max(range(len(parts)), key=lambda i: len(parts[i]))
        rows, middle = parts[longest], len(parts[longest]) // 2
        parts[longest : longest + 1] = [rows[:middle], rows[middle:]]
    copies = -len(parts) % W  # of the first part, the shortest
    shares = [1 / (1 + copies) if copies else 1] * (1 + copies) + [1] * (len(parts) - 1)
    return list(my_share(list(zip(parts[:1] * copies + parts, shares))))


# ---- tensors in shards ---------------------------------------------------------------------------


def load_target(device: torch.device, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Where, and in which dtype, to load weights for `shards.shard`: these in one process, else the CPU and fp32."""
    return (device, dtype) if world() == 1 else (torch.device("cpu"), torch.float32)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype in which a parameter computes; it differs from its own where that is a master of `shards.shard`."""
    return getattr(x, "computed_in", x.dtype)


def mesh(device: torch.device | str) -> DeviceMesh:
    """All ranks in a row."""
    return _mesh(torch.device(device).type)


@cache
def _mesh(kind: str) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (world(),))


def is_shard(x) -> bool:
    """Whether this is a tensor that is divided over ranks."""
    return hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    return x.to_local() if is_shard(x) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return x.full_tensor() if is_shard(x) else x


def divided(x: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, divided along its first dimension."""
    if world() == 1 or x.ndim == 0 or is_shard(x):
        return x
    from torch.distributed.tensor import DTensor, Replicate, Shard

    everywhere = DTensor.from_local(x, mesh(x.device), [Replicate()], run_check=False)
    return everywhere.redistribute(placements=[Shard(0)])


def unread(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory for a tensor as `divided` returns it."""
    if world() == 1:
        return torch.zeros(shape, dtype=dtype, device=device)
    from torch.distributed.tensor import Shard, zeros

    return zeros(shape, dtype=dtype, device_mesh=mesh(device), placements=[Shard(0)])


def joint_norm(norm: Tensor) -> Tensor:
    """‖g‖ over all ranks from that of each rank's parts."""
    return norm if world() == 1 else sum_of_ranks(norm.square()).sqrt()

"""A training state whose tensors are divided over ranks: each rank writes its parts, any number of ranks reads them.

The files are those of torch.distributed.checkpoint, one a rank and .metadata, in a folder beside training_state.pt. In
that file a tensor without memory (on the meta device) stands for each divided one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minir1.distributed import is_shard, unread, world

FOLDER = "training_state"


def apart(state) -> tuple:
    """The state without its divided tensors, and those by name. state: dicts and lists of tensors and plain values."""
    shards: dict[str, Tensor] = {}

    def without(name: str, value):
        if not is_shard(value):
            return value
        shards[name] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return _each(state, without), shards


def _each(state, function: Callable, name: str = "state"):
    """The state with function(name, value) in place of each value in its dicts and lists."""
    if isinstance(state, dict):
        return {key: _each(value, function, f"{name}.{key}") for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_each(value, function, f"{name}.{i}") for i, value in enumerate(state))
    return function(name, state)


def write(path: Path, shards: dict[str, Tensor]) -> None:
    """Write the divided tensors below the checkpoint `path`, if there are any; every rank calls this.

    RuntimeError on all ranks, with the rank and its cause, if one cannot write its part.
    """
    if not shards:
        return
    import torch.distributed.checkpoint as dcp  # half as long as importing torch

    try:
        dcp.save(shards, checkpoint_id=path / FOLDER)
    except dcp.api.CheckpointException as error:
        raise RuntimeError(f"{path / FOLDER} cannot be written: {_failures(error)}") from error


def _failures(error) -> str:
    """What each rank that failed says, in one line."""
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())


def together(path: Path, state, device: torch.device | str):
    """The state with its divided tensors, read from the checkpoint `path`: divided again, or whole in one process.

    ValueError naming the folder if it is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}

    def with_memory(name: str, value):
        if not (isinstance(value, Tensor) and value.is_meta):
            return value
        tensors[name] = unread(value.shape, value.dtype, device)
        return tensors[name]

    state = _each(state, with_memory)
    if not tensors:
        return state
    import torch.distributed.checkpoint as dcp

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that there is one process
            dcp.load(tensors, checkpoint_id=path / FOLDER, no_dist=world() == 1)
    except dcp.api.CheckpointException as error:
        raise ValueError(f"{path / FOLDER} cannot be read: {_failures(error)}") from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path / FOLDER} cannot be read, it is cut short or damaged: {error}") from error
    return state

"""A training state whose tensors are divided over ranks: each rank writes its parts, any number of ranks reads them.

The files are those of torch.distributed.checkpoint, one a rank and .metadata, in a folder beside training_state.pt. In
that file a tensor without memory (on the meta device) stands for each divided one.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from minir1.distributed import is_shard, unread, world

FOLDER = "training_state"


def apart(state, name: str = "state") -> tuple:
    """The state without its divided tensors, and those by name. state: dicts and lists of tensors and plain values."""
    if is_shard(state):
        return torch.empty(state.shape, dtype=state.dtype, device="meta"), {name: state}
    if not isinstance(state, (dict, list, tuple)):
        return state, {}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    parts = {key: apart(value, f"{name}.{key}") for key, value in items}
    rest = {key: value for key, (value, _) in parts.items()}
    shards = {key: shard for _, found in parts.values() for key, shard in found.items()}
    return (rest if isinstance(state, dict) else type(state)(rest.values())), shards


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
    state, tensors = _filled(state, device, "state")
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


def _filled(state, device, name: str) -> tuple:
    """The state with memory for each divided tensor, and these by name."""
    if isinstance(state, Tensor) and state.is_meta:
        tensor = unread(state.shape, state.dtype, device)
        return tensor, {name: tensor}
    if not isinstance(state, (dict, list, tuple)):
        return state, {}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    parts = {key: _filled(value, device, f"{name}.{key}") for key, value in items}
    whole = {key: value for key, (value, _) in parts.items()}
    tensors = {key: tensor for _, found in parts.values() for key, tensor in found.items()}
    return (whole if isinstance(state, dict) else type(state)(whole.values())), tensors

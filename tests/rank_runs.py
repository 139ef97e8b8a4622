"""Runs of scripts on several ranks, for `ranks.on_ranks`; imports nothing that registers a device."""

import contextlib
import importlib
import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from minir1 import checkpoint, distributed


def run_all(runs: dict, out: Path) -> None:
    """Every run, to its own folder in `out`."""
    if dist.is_initialized():  # what torchrun would have set
        distributed.second_group()
        os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "RANK": str(dist.get_rank())}
    for name, (script, config) in runs.items():
        importlib.import_module(script).main(replace(config, out=out / name))


class Stopped(BaseException):
    """Ends a run on all ranks."""


def stop_all(runs: dict, out: Path) -> None:
    """`run_all`, but each run ends after its first checkpoint."""
    save = checkpoint.save

    def last(*args, **kwargs):
        save(*args, **kwargs)
        raise Stopped

    checkpoint.save = last
    try:
        for name, run in runs.items():
            with contextlib.suppress(Stopped):
                run_all({name: run}, out)
    finally:
        checkpoint.save = save

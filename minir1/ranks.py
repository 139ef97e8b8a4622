"""The processes that torchrun starts for one script, its ranks, for modules that do not import torch.

What they exchange is in minir1/distributed.py, which is imported only where there are several.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

T = TypeVar("T")


def started() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def group() -> AbstractContextManager:
    """`distributed.group`, if torchrun has started several processes."""
    if started() == 1:
        return nullcontext()
    from minir1 import distributed

    return distributed.group()


def world() -> int:
    """The number of ranks in the group; 1 outside of it."""
    module = sys.modules.get("torch.distributed")
    inside = module is not None and module.is_available() and module.is_initialized()
    return module.get_world_size() if inside else 1


def rank() -> int:
    """The number of this one, from 0."""
    return sys.modules["torch.distributed"].get_rank() if world() > 1 else 0


def on_first(function: Callable[[], T]) -> T:
    """`distributed.on_first`, if there are several ranks; else the function is called."""
    if world() == 1:
        return function()
    from minir1 import distributed

    return distributed.on_first(function)

"""The processes that torchrun starts for one script, its ranks, for modules that do not import torch.

What they exchange is in minir1/distributed.py, which is imported only where there are several.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

T = TypeVar("T")


def world() -> int:
    """How many ranks torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this one, from 0."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def group() -> AbstractContextManager:
    """`distributed.group`, if there are several ranks."""
    if world() == 1:
        return nullcontext()
    from minir1 import distributed

    return distributed.group()


def on_first(function: Callable[[], T]) -> T:
    """`distributed.on_first`, if there are several ranks; else the function is called."""
    if world() == 1:
        return function()
    from minir1 import distributed

    return distributed.on_first(function)

"""Random streams that are functions of the seed and a few keys, so that a resumed run needs no RNG state."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def stream(seed: int, *keys: int) -> int:
    """A number in [0, 2^63) that depends on `seed` and `keys` alone, the same on every machine.

    Near seeds or keys give unrelated streams, and (1, 23) another than (12, 3). Raises ValueError for a non-integer.
    """
    for key in (seed, *keys):
        if not isinstance(key, int):
            raise ValueError(f"seed and keys must be int, not {key!r}")
    text = ",".join(str(int(key)) for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int) -> torch.Generator:
    """A CPU torch.Generator for the stream of (seed, keys), for example (seed, step)."""
    return torch.Generator().manual_seed(stream(seed, *keys))


def python_random(seed: int, *keys: int) -> random.Random:
    """A random.Random for the stream of (seed, keys)."""
    return random.Random(stream(seed, *keys))


def hashed(text: str) -> float:
    """A number in 0 … 1 that depends on the text alone: what is below a share of 1 can be held out, in any file."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64

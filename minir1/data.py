"""Ragged rows into batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


def pad_rows(rows: Sequence[Sequence[int]], device=None) -> tuple[Tensor, Tensor]:
    """Rows of tokens -> int64 [B, T] padded with 0 on the right, and int64 [B] lengths."""
    lengths = [len(row) for row in rows]
    longest = max(lengths, default=0)
    grid = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device)
    return grid.view(len(rows), longest), torch.tensor(lengths, dtype=torch.int64, device=device)


def by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split rows, sorted by length, into batches of at most `budget` tokens, padding counted: lists of row indices.

    A row longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):  # so the newest row is the longest
        if not batches or (len(batches[-1]) + 1) * lengths[row] > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def end_to_end(rows: Sequence[Sequence[int]], device=None) -> tuple[Tensor, Tensor]:
    """Rows one after the other: int64 [N], and int32 [B + 1], where each starts, and N (the model's cu_seqlens)."""
    ends = list(itertools.accumulate(map(len, rows), initial=0))
    flat = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64, device=device)
    return flat, torch.tensor(ends, dtype=torch.int32, device=device)


def packed(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split rows, sorted by length, into batches of at most `budget` tokens for `end_to_end`: lists of row indices.

    Attention without a kernel pads the rows of a batch to one length; this at most doubles a batch. A row longer than
    the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        tokens += lengths[row]
        if not batches or tokens > budget or (len(batches[-1]) + 1) * lengths[row] > 2 * tokens:
            batches.append([])
            tokens = lengths[row]
        batches[-1].append(row)
    return batches


def batches(stream: Iterable[list[int]], budget: int, pool: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Batch documents by about `budget` tokens with little padding: read `pool` batches, sort them by length, split
    and yield them in random order. The last pool is yielded too."""
    documents: list[list[int]] = []
    tokens = 0

    def split() -> Iterator[list[list[int]]]:  # the pool, as shuffled batches
        groups = by_tokens([len(row) for row in documents], budget)
        rng.shuffle(groups)
        for group in groups:
            yield [documents[row] for row in group]

    for document in stream:
        documents.append(document)
        tokens += len(document)
        if tokens >= budget * pool:
            yield from split()
            documents, tokens = [], 0
    yield from split()


def passes(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of `size` of the numbers 0 … count - 1: pass after pass over all, each in its own order.

    A batch may hold the end of a pass and the beginning of the next. A function of the arguments alone.
    ValueError unless both are at least 1.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count = {count}, size = {size}: at least 1")
    orders = (random.Random(f"pass {seed} {number}").sample(range(count), count) for number in itertools.count())
    stream = itertools.chain.from_iterable(orders)
    while True:
        yield list(itertools.islice(stream, size))

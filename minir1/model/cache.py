"""The cache of decoding: keys and values of each head (GQA), or only the latent and the RoPE key (MLA)."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from minir1.model.config import ModelConfig


class Cache:
    """Preallocated slots for B rows. Row b holds its first length[b] tokens in slots 0 … length[b]-1.

    One tensor per layer: [B, M, kv_lora + rope] for MLA, [B, M, 2, K, d] (keys, then values) for GQA.
    `used`, on the host, is an upper bound on the slots that any row uses: a step reads these slots only, and does not
    have to ask the device for the longest row.
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, device=None, dtype=torch.float32):
        entry = (config.kv_lora + config.rope,) if config.attention == "mla" else (2, config.kv_heads, config.head_size)
        self.layers = [_empty(rows, slots, entry, device, dtype) for _ in range(config.layers)]
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rows = torch.arange(rows, device=device).unsqueeze(1)
        self.used = 0
        self.fused = {}  # layer -> `Block.fused_matrices`, of the weights when the first token was decoded

    @property
    def slots(self) -> int:
        """M, the capacity of a row in tokens."""
        return self.layers[0].shape[1]

    def positions(self, new: int) -> Tensor:
        """int64 [B, new]: the positions of the next tokens of each row."""
        return self.length.unsqueeze(1) + torch.arange(new, device=self.length.device)

    def bias(self, positions: Tensor) -> Tensor:
        """fp32 [B, T, M]: 0 where a slot is at or before the token's position, -inf after it."""
        slots = torch.arange(min(self.used + positions.shape[1], self.slots), device=positions.device)
        zero = torch.zeros((), device=positions.device)
        return zero.masked_fill(slots > positions.unsqueeze(-1), float("-inf"))

    def write(self, layer: int, positions: Tensor, entry: Tensor) -> Tensor:
        """Store entry [B, T, ...] at positions [B, T]; return all slots in use, [B, M, ...]."""
        slots = self.layers[layer]
        slots[self.rows, positions] = entry.to(slots.dtype)
        return slots[:, : self.used + positions.shape[1]]

    def advance(self, lengths: Tensor | int, new: int) -> None:
        """Add `lengths` (int64 [B], or one number for all, at most `new`) to the length of each row."""
        self.length = self.length + lengths
        self.used = min(self.used + new, self.slots)

    def rewind(self, tokens: Tensor) -> None:
        """Remove the last `tokens` (int64 [B]) tokens of each row; their slots are masked until overwritten."""
        self.length = self.length - tokens

    def trim(self) -> None:
        """Set `used` to the length of the longest row, after `rewind`. Waits for the device."""
        self.used = int(self.length.max())

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order, in place. A row whose index stays the same is not copied."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        target, source = torch.tensor(moved, dtype=torch.int64, device=self.length.device).view(-1, 2).unbind(1)
        for layer, slots in enumerate(self.layers):
            slots[target, : self.used] = slots[source, : self.used]
            self.layers[layer] = slots[: len(rows)]
        self.length, self.rows = self.length[rows], self.rows[: len(rows)]

    def repeat(self, answers: int, slots: int) -> Cache:
        """A new cache with every row `answers` times, side by side, for up to `slots` tokens."""
        new = copy(self)
        new.layers = []
        for old in self.layers:
            layer = _empty(len(old) * answers, slots, old.shape[2:], old.device, old.dtype)
            layer[:, : self.used] = old[:, : self.used].repeat_interleave(answers, dim=0)
            new.layers.append(layer)
        new.length = self.length.repeat_interleave(answers)
        new.rows = torch.arange(len(new.length), device=new.length.device).unsqueeze(1)
        return new

    def view(self, lengths: list[int]) -> Cache:
        """The first rows as a cache of their own in the same memory, row b with lengths[b] tokens."""
        new = copy(self)
        new.layers = [slots[: len(lengths)] for slots in self.layers]
        new.length = torch.tensor(lengths, dtype=torch.int64, device=self.length.device)
        new.rows, new.used = self.rows[: len(lengths)], max(lengths, default=0)
        return new

    def put(self, rows: list[int], other: Cache, source: list[int]) -> None:
        """Copy the rows `source` of another cache of the same model to `rows`; the lengths are left as they are."""
        for mine, theirs in zip(self.layers, other.layers):
            mine[rows, : other.used] = theirs[source, : other.used]


def _empty(rows: int, slots: int, entry: tuple[int, ...], device, dtype: torch.dtype) -> Tensor:
    """[B, M, *entry] of zeros: a masked slot has weight 0, but 0 times a NaN in uninitialised memory would be NaN.

    GQA's slots of one head lie together in memory, [B, K, 2, M, d], or attention would have to copy them at every step.
    """
    if len(entry) == 1:
        return torch.zeros(rows, slots, *entry, device=device, dtype=dtype)
    pair, kv_heads, size = entry
    return torch.zeros(rows, kv_heads, pair, slots, size, device=device, dtype=dtype).permute(0, 3, 2, 1, 4)

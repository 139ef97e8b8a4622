"""What decoding remembers: per-head keys and values (GQA), or only the latent and the RoPE key (MLA)."""

from __future__ import annotations

import torch
from torch import Tensor

from minir1.model.config import ModelConfig


class Cache:
    """Preallocated slots for B rows. Row b holds its first length[b] tokens in slots 0 … length[b]-1.

    MLA keeps one tensor [B, M, kv_lora + rope] a layer; GQA one tensor [B, M, 2, K, d] a layer (keys, then values).
    `used` counts, on the host, the slots that any row may have used, so that a step reads no more than it must
    without waiting for the device.
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, device=None, dtype=torch.float32):
        entry = (config.kv_lora + config.rope,) if config.attention == "mla" else (2, config.kv_heads, config.head_size)
        self.layers = [_empty(rows, slots, entry, device, dtype) for _ in range(config.layers)]
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.used = 0

    @property
    def slots(self) -> int:
        """M, the most tokens that a row can hold."""
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
        """Store entry [B, T, ...] at positions [B, T]; return every slot in use, [B, M, ...]."""
        slots = self.layers[layer]
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(1)
        slots[rows, positions] = entry.to(slots.dtype)
        return slots[:, : self.used + positions.shape[1]]

    def advance(self, lengths: Tensor | int, new: int) -> None:
        """Count `lengths` (int64 [B], or one number for all) new tokens a row, at most `new`."""
        self.length = self.length + lengths
        self.used = min(self.used + new, self.slots)

    def rewind(self, tokens: Tensor) -> None:
        """Forget the last `tokens` (int64 [B]) of each row; what their slots hold is hidden until overwritten."""
        self.length = self.length - tokens

    def trim(self) -> None:
        """Count the slots in use anew, from the longest row: after rewinding. Waits for the device."""
        self.used = int(self.length.max())

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (int64 [B'], rising), in place."""
        for layer, slots in enumerate(self.layers):
            slots[: len(rows), : self.used] = slots[rows, : self.used]
            self.layers[layer] = slots[: len(rows)]
        self.length = self.length[rows]

    def repeat(self, answers: int, slots: int) -> Cache:
        """A new cache with every row `answers` times, side by side, for up to `slots` tokens."""
        new = object.__new__(Cache)
        new.layers = []
        for old in self.layers:
            layer = _empty(len(old) * answers, slots, old.shape[2:], old.device, old.dtype)
            layer[:, : self.used] = old[:, : self.used].repeat_interleave(answers, dim=0)
            new.layers.append(layer)
        new.length = self.length.repeat_interleave(answers)
        new.used = self.used
        return new


def _empty(rows: int, slots: int, entry: tuple[int, ...], device, dtype: torch.dtype) -> Tensor:
    """[B, M, *entry] of zeros, not of anything: a masked slot has weight 0, and 0 times a NaN would be NaN.

    In memory the slots of one head lie together, [B, K, 2, M, d], or attention would have to copy them at every step.
    """
    if len(entry) == 1:
        return torch.zeros(rows, slots, *entry, device=device, dtype=dtype)
    pair, kv_heads, size = entry
    return torch.zeros(rows, kv_heads, pair, slots, size, device=device, dtype=dtype).permute(0, 3, 2, 1, 4)

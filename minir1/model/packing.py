"""Ragged rows as one flat list of tokens, so that padding costs nothing outside attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where N packed tokens lie in a grid of B rows and T columns; rows start at column 0."""

    rows: int  # B
    columns: int  # T
    index: Tensor | None  # int64 [N], positions in the flattened grid; None when the grid is full (N = B·T)
    lengths: Tensor  # int64 [B]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]"""
        x = x.flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...], zeros where there is no token"""
        if self.index is not None:
            x = x.new_zeros(self.rows * self.columns, *x.shape[1:]).index_copy(0, self.index, x)
        return x.unflatten(0, (self.rows, self.columns))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1]: where each row starts among the packed tokens, and N"""
        return F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    def positions(self) -> Tensor:
        """int64 [N]: the column of each token"""
        return self.pack(torch.arange(self.columns, device=self.lengths.device).expand(self.rows, -1))


def packing(rows: int, columns: int, lengths: Tensor | None, device: torch.device) -> Packing:
    """The packing of right-padded rows. lengths: int [B], or None when every row is full."""
    if lengths is None:
        return Packing(rows, columns, None, torch.full((rows,), columns, device=device))
    if lengths.shape != (rows,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({rows},)")
    lengths = lengths.to(device=device, dtype=torch.int64)
    if ((lengths < 0) | (lengths > columns)).any():
        raise ValueError(f"lengths must lie in 0 to {columns}, got {lengths.tolist()[:16]}")
    real = torch.arange(columns, device=device) < lengths.unsqueeze(1)  # not padding
    return Packing(rows, columns, real.flatten().nonzero().squeeze(1), lengths)


def from_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> Packing:
    """The packing of rows laid end to end: row b has the tokens cu_seqlens[b] to cu_seqlens[b + 1]."""
    lengths = cu_seqlens.diff().to(torch.int64)
    if len(lengths) == 0 or cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (lengths < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, got {cu_seqlens.tolist()[:16]}")
    return packing(len(lengths), int(lengths.max()), lengths, cu_seqlens.device)

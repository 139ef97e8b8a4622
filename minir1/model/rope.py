"""Rotary position embedding (RoFormer, arXiv:2104.09864, section 3.2.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(size: int, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of p·θ^(-2i/R) for i < R/2.

    positions: int64 [...]; returns two fp32 tensors [..., R/2] with R = size.
    """
    inverse = theta ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
    angles = positions.unsqueeze(-1) * inverse  # in fp64: at position 131,072 fp32 angles are off by 1e-2
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of x by their angles: (a, b) -> (a·cos - b·sin, a·sin + b·cos).

    x: [..., H, R]; cos, sin: [..., R/2], the same for every head. Pairs are (x_2i, x_2i+1) when interleaved, as in
    DeepSeek, else (x_i, x_{i+R/2}), as in Llama and Qwen. Returns x's shape and dtype; the product is taken in fp32.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return out.to(x.dtype)

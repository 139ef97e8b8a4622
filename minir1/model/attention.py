"""Scaled dot-product attention over fresh tokens and over a cache, for both kinds of attention layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale + causal mask)·v of rows that start at column 0.

    q: [B, T, H, Dqk]; k: [B, T, K, Dqk]; v: [B, T, K, Dv] with K dividing H; returns [B, T, H, Dv]. On the CPU torch's
    attention is fused only when q, k and v have one head size, so the smaller of them is padded and the output cut.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    size, v_size = q.shape[-1], v.shape[-1]
    if size > v_size:
        v = F.pad(v, (0, size - v_size))
    elif size < v_size:
        q, k = F.pad(q, (0, v_size - size)), F.pad(k, (0, v_size - size))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[..., :v_size].transpose(1, 2)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of a few new tokens over the slots of a cache.

    q: [B, T, H, Dqk]; k: [B, M, K, Dqk]; v: [B, M, K, Dv]; bias: [B, T, M], 0 where a slot is visible and -inf
    elsewhere; returns [B, T, H, Dv]. Softmax in fp32.
    """
    rows, new, heads, _ = q.shape
    kv_heads = k.shape[2]
    shared = heads // kv_heads  # query heads of one key head
    q = q.unflatten(2, (kv_heads, shared)).permute(0, 2, 1, 3, 4).reshape(rows * kv_heads, new * shared, -1)
    k = k.transpose(1, 2).flatten(0, 1) if kv_heads > 1 else k.squeeze(2)
    v = v.transpose(1, 2).flatten(0, 1) if kv_heads > 1 else v.squeeze(2)
    scores = torch.bmm(q, k.transpose(1, 2)).view(rows, kv_heads, new, shared, -1)
    scores = torch.add(bias[:, None, :, None], scores.float(), alpha=scale)
    weights = scores.softmax(-1).to(v.dtype).view(rows * kv_heads, new * shared, -1)
    out = torch.bmm(weights, v).view(rows, kv_heads, new, shared, -1)
    return out.permute(0, 2, 1, 3, 4).reshape(rows, new, heads, -1)

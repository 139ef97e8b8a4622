"""Scaled dot-product attention of packed rows and over a cache, for GQA and MLA.

On CUDA it runs in the kernels of minir1.ops; the other paths are the fastest on devices without them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from minir1.model.packing import Packing
from minir1.ops import attention, decode_attention, decode_latent
from minir1.ops.decode import over_slots
from minir1.ops.dispatch import use_triton

KEY_BLOCK = 1024  # past keys that a chunk of a prompt attends to at a time


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> Tensor:
    """Causal attention within each of the packed rows.

    q: [N, H, Dqk]; k: [N, K, Dqk]; v: [N, K, Dv]; returns [N, H, Dv]. The kernel takes packed rows; without it,
    padding all rows to one length is faster than one row after the other.
    """
    if use_triton("auto", q, k, v):
        cu, longest = packing.cu_seqlens, packing.columns
        return attention(q, k, v, cu, cu, longest, longest, scale, check=False)[0]
    return packing.pack(causal_attention(packing.pad(q), packing.pad(k), packing.pad(v), scale))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale + causal mask)·v of rows that start at column 0.

    q: [B, T, H, Dqk]; k: [B, T, K, Dqk]; v: [B, T, K, Dv] with K dividing H; returns [B, T, H, Dv].
    """
    v_size = v.shape[-1]
    q, k, v = _heads_first(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[..., :v_size].transpose(1, 2)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, H, d] -> [B, H, T, d], padded with zeros to one head size: only then torch fuses on the CPU."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    size = max(q.shape[-1], v.shape[-1])
    return tuple(F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in (q, k, v))


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, past: Iterable[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Attention of one chunk of a prompt over itself, causally, and over all of the blocks of earlier tokens.

    q: [B, T, H, Dqk]; k, v: the chunk's own, [B, T, K, Dqk] and [B, T, K, Dv]; past: pairs of such keys and values,
    [B, S, K, …], an iterator so that one pair at a time is in memory. Returns [B, T, H, Dv]. The attention over several
    parts is the average of those over each part, weighted by their normalisers Z (Milakov and Gimelshein 2018,
    arXiv:1805.02867; FlashAttention, arXiv:2205.14135):

        o = Σ_i exp(log Z_i - log Z) · o_i      log Z = log Σ_i Z_i
    """
    out, log_z = _attention_and_log_z(q, k, v, scale, causal=True)
    for past_k, past_v in past:
        part, part_log_z = _attention_and_log_z(q, past_k, past_v, scale, causal=False)
        total = torch.logaddexp(log_z, part_log_z)
        out = out * (log_z - total).exp() + part * (part_log_z - total).exp()
        log_z = total
    return out.transpose(1, 2).to(v.dtype)


def _attention_and_log_z(q, k, v, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Arguments as for `causal_attention` -> out [B, H, T, Dv] and, in fp32 or better, log Z [B, H, T, 1]."""
    if q.device.type == "cpu" and not use_triton("auto", q, k, v):  # all rows at once, by torch's fused attention
        v_size = v.shape[-1]
        q, k, v = _heads_first(q, k, v)
        out, log_z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out[..., :v_size], log_z.unsqueeze(-1)
    rows = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    new, keys, flat = q.shape[1], k.shape[1], (x.flatten(0, 1) for x in (q, k, v))
    out, log_z = attention(*flat, rows * new, rows * keys, new, keys, scale, causal, check=False)
    return out.unflatten(0, (-1, new)).transpose(1, 2), log_z.unflatten(1, (-1, new)).transpose(0, 1).unsqueeze(-1)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of a few new tokens over the slots of a cache.

    q: [B, T, H, Dqk]; k: [B, M, K, Dqk]; v: [B, M, K, Dv]; positions: int64 [B, T], the slots of the new tokens; bias:
    [B, T, M], the mask for these positions, 0 or -inf (`Cache.bias`); returns [B, T, H, Dv]. Softmax in fp32.
    """
    if use_triton("auto", q, k, v):
        return decode_attention(q, k, v, _past(positions), scale, check=False)
    return over_slots(q, k, v, bias, scale)


def cached_latent_attention(
    q: Tensor, latent: Tensor, positions: Tensor, bias: Tensor, scale: float, kv_lora: int
) -> Tensor:
    """The same with MLA's latents for keys and values.

    q: [B, T, H, C + R], absorbed; latent: [B, M, C + R]; kv_lora: C; returns [B, T, H, C].
    """
    if use_triton("auto", q, latent):
        return decode_latent(q[..., :kv_lora], q[..., kv_lora:], latent, _past(positions), scale, check=False)
    keys = latent.unsqueeze(2)
    return over_slots(q, keys, keys[..., :kv_lora], bias, scale)


def _past(positions: Tensor) -> Tensor:
    """int64 [B]: tokens before the new ones. From the last position: the first may wrap in `speculative.draft`."""
    return positions[:, -1] - (positions.shape[1] - 1)

"""Attention of one or a few new tokens per row over a ragged cache, which is read once, by many programs per row.

    o = Σ_j exp(z_j - lse) v_j           over the slots j that the token sees, z_j = softcap(scale · q·k_j)
    o = Σ_i exp(lse_i - lse) o_i         lse = log Σ_i exp lse_i,   over the splits i of those slots

One program processes all queries that share a key head, those of its group and of all new tokens, so that each key is
read once. The slots are divided into splits of a fixed size (Flash-Decoding; the merge is that of Milakov & Gimelshein,
arXiv:1805.02867, section 3): for each split one kernel writes a normalised output and its log-sum-exp in fp32, and a
second kernel merges them in order. The splits depend on the slot only and there are no atomics: the result is
batch-invariant. The launch depends on shapes only, never on lengths, so that a step can be recorded as a CUDA graph;
programs beyond the end of their row return at once.

MLA caches one latent c and one RoPE key per token (DeepSeek-V2, arXiv:2405.04434, section 2.1). After absorbing W^UK
and W^UV the latent is both key and value: it is read once, as the first of the two parts of a head (576 = 512 + 64).
"""
import torch
import triton

from . import attention as base
from . import decode_jit as jit

INTERPRET = base.INTERPRET


def blocks(rows: int, size: int, dtype: torch.dtype, major: int, shared: int) -> dict:
    """rows: queries of a key head; size: the larger head size; major, shared: of `attention.gpu`. SPLIT depends on
    the head size only, since a dependence on the batch would end batch invariance."""
    if INTERPRET:
        return dict(BLOCK_R=16, BLOCK_N=32, SPLIT=64)
    split = 1024 if size > 256 else 512  # slots; a latent has more queries, whose partial outputs cost more
    many = rows > 16
    if dtype == torch.float32:
        return dict(BLOCK_R=16, BLOCK_N=16 if size > 256 else 32, num_warps=4, num_stages=1, SPLIT=split)
    if size > 256:
        r, n, warps, stages = (64 if many else 16, 64, 8, 2) if major == 9 else (32 if many else 16, 32, 4, 2)
    elif many and size > 128 and shared < base.AMPERE_SHARED:
        r, n, warps, stages = 64, 32, 8, 2
    else:
        r, n, warps, stages = (64 if many else 16, 64, 4, 2)
    return dict(BLOCK_R=r, BLOCK_N=n, num_warps=warps, num_stages=stages, SPLIT=split)


def _decode(q1, q2, k, v, past, sizes: dict, scale, window, softcap, latent: bool):
    """q1 [B, T, H, ≥ D1], q2 [B, T, H, D2] (of any size without a second part), k [B, M, K, Dqk], v [B, M, K, Dv]."""
    (B, T, H, _), M, K, d_v = q1.shape, k.shape[1], k.shape[2], sizes["DV"]
    config = blocks(T * (H // K), max(sizes["D"], d_v), q1.dtype, *base.gpu(q1))
    split = config["SPLIT"]
    splits, rows = triton.cdiv(M, split), T * (H // K)
    part = torch.empty(B, K, rows, splits, d_v, dtype=torch.float32, device=q1.device)
    lse = torch.empty(B, K, rows, splits, dtype=torch.float32, device=q1.device)
    o = torch.empty(B, T, H, d_v, dtype=torch.float32 if INTERPRET else q1.dtype, device=q1.device)
    if o.numel():
        reach = dict(window=window or 0, WINDOW=window is not None)
        jit.split_kernel[(triton.cdiv(rows, config["BLOCK_R"]) * K * B, splits)](
            q1, q2, k, v, past, part, lse, T, K, H // K, M, splits, *q1.stride()[:3], *q2.stride()[:3],
            *k.stride()[:3], *v.stride()[:3], past.stride(0), **reach, **base.scores(scale, softcap),
            **sizes, **config, LATENT=latent, WIDEN=INTERPRET,
        )
        jit.merge_kernel[(B * T * H,)](
            part, lse, past, o, T, K, H // K, M, splits, past.stride(0), **reach, DV=d_v,
            BLOCK_V=triton.next_power_of_2(d_v), SPLIT=split,
        )
    return o.to(q1.dtype)


def decode(q, k, v, past, *, scale, window=None, softcap=None):
    """q [B, T, H, Dqk], k [B, M, K, Dqk], v [B, M, K, Dv] of one dtype (fp32, bf16, fp16), past [B] integer -> o
    [B, T, H, Dv] of that dtype. The T new tokens of row b are in slots past[b] … past[b] + T - 1, and token t sees the
    slots up to its own, with a window w the last w of them. minir1.ops checks the arguments."""
    q, k, v = (base.readable(x) for x in (q, k, v))
    sizes = base.heads(q.shape[-1], v.shape[-1])
    return _decode(q, q[..., sizes["D1"]:], k, v, past, sizes, float(scale), window, softcap, False)


def decode_latent(q_lat, q_rope, latent, past, *, scale):
    """q_lat [B, T, H, C], q_rope [B, T, H, R], latent [B, M, C + R], C a power of two -> [B, T, H, C]; as `decode`,
    with keys latent[b, m] and values latent[b, m, :C] for all heads."""
    q_lat, q_rope, k = (base.readable(x) for x in (q_lat, q_rope, latent.unsqueeze(2)))
    C, R = q_lat.shape[-1], q_rope.shape[-1]
    sizes = dict(D=C + R, D1=C, D2=max(16, triton.next_power_of_2(R)), DV=C, V1=C, V2=0)
    return _decode(q_lat, q_rope, k, k, past, sizes, float(scale), None, None, True)

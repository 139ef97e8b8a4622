"""Log-probability and entropy straight from hidden states and the vocabulary matrix, without [N, V].

    z    = softcap(logit_scale · h wᵀ) / temperature,   softcap(x) = c · tanh(x / c)
    logp = (z_t - m) - log s,        m = max_v z_v,   s = Σ_v exp(z_v - m)
    H    = log s - u / s,            u = Σ_v exp(z_v - m) · (z_v - m)

The vocabulary is cut into splits whose width does not depend on N. One program takes BLOCK_N tokens
through one split, tile by tile, and leaves four numbers a token, (m, s, u, z_t); a second kernel merges
the splits of a token in order. No atomics, and a row never meets its neighbours: the result is
deterministic, and a row alone has the same bits as in any batch. Logits stay in fp32 registers; nothing
is rounded to bf16 on the way. (z_t - m) - log s keeps its digits where z_t - (m + log s) loses them, at
large |z|; and u is a sum of *shifted* logits for the same reason.

Two-level log-sum-exp over vocabulary splits: as in verl's linear cross-entropy; the online merge is that
of Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018), section 3.
"""
import torch
import triton
import triton.language as tl

LOW = tl.constexpr(-1e38)  # no logit: exp(LOW - m) is 0 and, unlike with -inf, so is 0 · (LOW - m)


@triton.jit
def _merge(m_a, s_a, u_a, m_b, s_b, u_b):
    """The (m, s, u) of a union from those of its parts:

    m = max(m_a, m_b),  s = Σ_i e^{m_i - m} s_i,  u = Σ_i e^{m_i - m} (u_i + (m_i - m) s_i)
    """
    m = tl.maximum(m_a, m_b)
    d_a, d_b = m_a - m, m_b - m
    e_a, e_b = tl.exp(d_a), tl.exp(d_b)
    return m, e_a * s_a + e_b * s_b, e_a * (u_a + d_a * s_a) + e_b * (u_b + d_b * s_b)


@triton.jit(do_not_specialize=["N", "splits"])
def _partials_kernel(
    h_ptr, w_ptr, target_ptr, part_ptr,  # [N, D], [V, D], [N], [4, splits, N]
    N, V, D, splits,
    stride_hn, stride_hd, stride_wv, stride_wd,
    scale: tl.float32, cap: tl.float32, inv_temperature: tl.float32,
    SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):
    split = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    m = tl.full([BLOCK_N], LOW, tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    u = tl.zeros([BLOCK_N], tl.float32)
    z_t = tl.zeros([BLOCK_N], tl.float32)
    for start in range(split * SPLIT, tl.minimum(V, split * SPLIT + SPLIT), BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V).to(tl.int64)
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for d in range(0, D, BLOCK_D):
            dims = d + tl.arange(0, BLOCK_D).to(tl.int64)
            h = tl.load(h_ptr + rows[:, None] * stride_hn + dims[None, :] * stride_hd,
                        mask=(rows[:, None] < N) & (dims[None, :] < D), other=0.0)
            w = tl.load(w_ptr + dims[:, None] * stride_wd + cols[None, :] * stride_wv,
                        mask=(dims[:, None] < D) & (cols[None, :] < V), other=0.0)
            if INTERPRET:  # the interpreter multiplies the raw bits of bf16
                h, w = h.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(h, w, acc, input_precision="ieee")
        z = acc * scale
        if SOFTCAP:
            z = cap * (2 * tl.sigmoid(2 * z / cap) - 1)  # tanh(x) = 2 σ(2x) - 1
        z = z * inv_temperature
        z = tl.where(cols[None, :] < V, z, LOW)  # a phantom column must add 0, not exp(0)
        m_tile = tl.max(z, 1)
        shifted = z - m_tile[:, None]
        e = tl.exp(shifted)
        m, s, u = _merge(m, s, u, m_tile, tl.sum(e, 1), tl.sum(e * shifted, 1))
        z_t += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
    out = part_ptr + split.to(tl.int64) * N + rows
    plane = tl.cast(splits, tl.int64) * N
    tl.store(out, m, mask=rows < N)
    tl.store(out + plane, s, mask=rows < N)
    tl.store(out + 2 * plane, u, mask=rows < N)
    tl.store(out + 3 * plane, z_t, mask=rows < N)


@triton.jit(do_not_specialize=["N", "splits"])
def _finish_kernel(
    part_ptr, target_ptr, logp_ptr, entropy_ptr, N, V, splits, ignore_index,
    ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=0)
    plane = tl.cast(splits, tl.int64) * N
    m = tl.full([BLOCK_N], LOW, tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    u = tl.zeros([BLOCK_N], tl.float32)
    z_t = tl.zeros([BLOCK_N], tl.float32)
    for split in range(0, splits):
        part = part_ptr + tl.cast(split, tl.int64) * N + rows
        m_b = tl.load(part, mask=rows < N, other=0.0)
        s_b = tl.load(part + plane, mask=rows < N, other=1.0)
        u_b = tl.load(part + 2 * plane, mask=rows < N, other=0.0)
        m, s, u = _merge(m, s, u, m_b, s_b, u_b)
        z_t += tl.load(part + 3 * plane, mask=rows < N, other=0.0)  # 0 but in the split that holds t
    keep = target != ignore_index
    logp = tl.where((target >= 0) & (target < V), (z_t - m) - tl.log(s), float("nan"))
    tl.store(logp_ptr + rows, tl.where(keep, logp, 0.0), mask=rows < N)
    if ENTROPY:
        tl.store(entropy_ptr + rows, tl.where(keep, tl.log(s) - u / s, 0.0), mask=rows < N)


INTERPRET = not isinstance(_partials_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 at the first import


def _blocks(dtype: torch.dtype) -> dict:
    """By dtype alone: a block size chosen by N would end batch invariance. On sm_90 neither spills (128 x 256
    does with some versions of triton); fp32 runs without tensor cores, so that nothing is rounded to tf32."""
    if INTERPRET:
        return dict(BLOCK_N=32, BLOCK_V=64, BLOCK_D=32, SPLIT=128)
    if dtype == torch.float32:
        return dict(BLOCK_N=64, BLOCK_V=128, BLOCK_D=32, SPLIT=4096, num_warps=8, num_stages=2)
    return dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, SPLIT=4096, num_warps=8, num_stages=3)


def logprob_forward(h, w, target, *, temperature=1.0, softcap=None, logit_scale=1.0, ignore_index=-100,
                    entropy=False):
    """h [N, D], w [V, D] of one dtype (fp32, bf16, fp16), target [N] int64 -> logp, entropy | None, [N] fp32.

    An ignored row is 0; a target outside [0, V) gives NaN, since looking for it would stall the device.
    """
    (N, D), V = h.shape, w.shape[0]
    assert w.shape == (V, D) and target.shape == (N,) and h.dtype == w.dtype and target.dtype == torch.int64
    target = target.contiguous()
    logp = torch.empty(N, dtype=torch.float32, device=h.device)
    ent = torch.empty(N, dtype=torch.float32, device=h.device) if entropy else None
    if N == 0:
        return logp, ent
    blocks = _blocks(h.dtype)
    splits = triton.cdiv(V, blocks["SPLIT"])
    part = torch.empty(4, splits, N, dtype=torch.float32, device=h.device)
    # Tokens on axis 0: the other axes of a grid end at 65535.
    _partials_kernel[(triton.cdiv(N, blocks["BLOCK_N"]), splits)](
        h, w, target, part, N, V, D, splits, *h.stride(), *w.stride(),
        float(logit_scale), float(softcap or 0.0), 1.0 / temperature,
        SOFTCAP=softcap is not None, INTERPRET=INTERPRET, **blocks,
    )
    _finish_kernel[(triton.cdiv(N, 128),)](
        part, target, logp, logp if ent is None else ent, N, V, splits, ignore_index,
        ENTROPY=entropy, BLOCK_N=128,
    )
    return logp, ent

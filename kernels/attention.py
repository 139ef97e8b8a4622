"""Attention over packed sequences, forward and backward, without the score matrix in memory.

    z_ij = softcap(scale · q_i·k_j)      softcap(x) = c · tanh(x / c)
    p_ij = exp(z_ij - lse_i)             lse_i = log Σ_j exp z_ij
    o_i  = Σ_j p_ij v_j                  over the keys j that query i sees

    dv_j = Σ_i p_ij do_i                 Δ_i = do_i·o_i
    dz_ij = p_ij (do_i·v_j - Δ_i)        through the softcap: times 1 - (z_ij / c)²
    dq_i = scale Σ_j dz_ij k_j           dk_j = scale Σ_i dz_ij q_i

FlashAttention-2 (Dao, arXiv:2307.08691), section 3.1: a program processes a block of queries over the keys it sees,
with a running maximum and sum (Milakov & Gimelshein, arXiv:1805.02867), and writes o and lse; the backward pass
recomputes the scores and uses lse. The differences: dq has its own kernel, so that there are no atomics and a repeated
call gives the same bits; one program sums the contributions of all query heads of a group to dk and dv; and a head is
split into two powers of two instead of being padded to the next (192 = 128 + 64).

Scores, maxima, sums and all accumulators are fp32. log₂e is applied after the product, so 16-bit q is not rounded
again; p and dz are rounded once, to the dtype of v and k, before a product. A query that sees no key has o = 0,
lse = -inf and gradient 0.
"""
import math

import torch
import triton

from . import attention_jit as jit
from .once import refuse_second_derivative

INTERPRET = not isinstance(jit.forward_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 at the first import

# (BLOCK_M queries, BLOCK_N keys, warps, stages) by the larger head size. Chosen by compiling, not by timing: the
# fewest spills within the shared memory of a block, 227 KiB on sm_90, 163 on sm_80, 99 on sm_86, sm_89 and sm_120, as
# experiments/benchmarks/kernel_resources.py reports them.
HOPPER = {
    "forward": {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 192: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
    "dq": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 192: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "dkv": {64: (32, 128, 8, 2), 128: (32, 128, 8, 2), 192: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
}
AMPERE_SHARED = 163 << 10  # bytes per block
AMPERE = {
    "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 192: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
    "dq": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 192: (64, 32, 8, 2), 256: (64, 32, 8, 2)},
    "dkv": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 192: (32, 32, 8, 2), 256: (16, 64, 8, 1)},
}
SMALL = {  # for GPUs with less shared memory
    "forward": AMPERE["forward"] | {192: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
    "dq": AMPERE["dq"] | {256: (32, 32, 8, 2)},
    "dkv": AMPERE["dkv"],
}
FP32 = {  # without tensor cores, which would round to tf32
    "forward": {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
    "dq": {64: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "dkv": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
}


def blocks(kind: str, size: int, dtype: torch.dtype, major: int, shared: int) -> dict:
    """Configuration of one kernel; kind: forward, dq or dkv; size: the larger head size; major, shared: of `gpu`."""
    if INTERPRET:
        return dict(BLOCK_M=32, BLOCK_N=32)
    wide = HOPPER if major == 9 else AMPERE if shared >= AMPERE_SHARED else SMALL
    table = (FP32 if dtype == torch.float32 else wide)[kind]
    m, n, warps, stages = table[min(x for x in table if x >= size)]
    return dict(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)


def cut(size: int) -> tuple[int, int]:
    """A head size as the sum of two powers of two, each at least 16, the second maybe 0; beyond it zeros are read."""
    first = max(16, 1 << size.bit_length() - 1)
    left = size - first
    return (first, 0) if left <= 0 else (first, max(16, triton.next_power_of_2(left)))


def heads(d_qk: int, d_v: int) -> dict:
    """The kernels' constants for the two head sizes."""
    (D1, D2), (V1, V2) = cut(d_qk), cut(d_v)
    return dict(D=d_qk, D1=D1, D2=D2, DV=d_v, V1=V1, V2=V2)


def scores(scale: float, softcap: float | None) -> dict:
    """The kernels' arguments for scores in log 2 from q·k."""
    log2e = math.log2(math.e)
    return dict(factor=scale * log2e, cap=(softcap or 0.0) * log2e, SOFTCAP=softcap is not None)


def band(causal: bool, window: int | None) -> dict:
    """Query i (counted from the end, as the keys) sees the keys i - left … i + right; LEFT, RIGHT: bounded sides."""
    near = 0 if window is None else min(window, 1 << 30) - 1  # position + near stays within 32 bits
    return dict(left=near, right=0 if causal else near, LEFT=window is not None, RIGHT=causal or window is not None)


def readable(x):
    """x [..., tokens, heads, d], copied unless d is contiguous and offsets within a tile fit 31 bits."""
    return x if x.stride(-1) == 1 and x.stride(-3) < 1 << 24 else x.contiguous()


def gpu(x) -> tuple[int, int]:
    """Of x's GPU: major compute capability, and bytes of shared memory per block."""
    if not x.is_cuda:
        return 0, 0
    of = torch.cuda.get_device_properties(x.device)
    return of.major, of.shared_memory_per_block_optin


def _strides(**tensors) -> dict:
    """stride_qn and stride_qh, of token and head, for q; likewise for every tensor, by its name."""
    return {f"stride_{name}{axis}": stride for name, x in tensors.items() for axis, stride in zip("nh", x.stride())}


def _outputs(like) -> torch.dtype:
    return torch.float32 if INTERPRET else like.dtype  # the interpreter rounds to bf16 unlike a GPU


def _common(q, k, v) -> dict:
    return dict(WIDEN=INTERPRET, **heads(q.shape[-1], v.shape[-1]))


def _forward(q, k, v, cu_q, cu_k, max_q, scale, causal, window, softcap):
    """o [N, H, Dv], lse [H, N] fp32."""
    (N, H, d_qk), K, d_v = q.shape, k.shape[1], v.shape[-1]
    o = torch.empty(N, H, d_v, dtype=_outputs(q), device=q.device)
    lse = torch.empty(H, N, dtype=torch.float32, device=q.device)
    config = blocks("forward", max(d_qk, d_v), q.dtype, *gpu(q))
    across = triton.cdiv(max_q, config["BLOCK_M"])
    grid = across * H * (len(cu_q) - 1)
    if grid and N:
        jit.forward_kernel[(grid,)](
            q, k, v, cu_q, cu_k, o, lse, blocks=across, N=N, H=H, shared=H // K, **_strides(q=q, k=k, v=v, o=o),
            **band(causal, window), **scores(scale, softcap), **_common(q, k, v), **config,
        )
    return o, lse


def _backward(q, k, v, o, lse, do, cu_q, cu_k, max_q, max_k, scale, causal, window, softcap):
    """dq, dk, dv like q, k, v."""
    (N, H, d_qk), (M, K, _), d_v = q.shape, k.shape, v.shape[-1]
    B, size = len(cu_q) - 1, max(d_qk, d_v)
    stat = torch.empty(2, H, N, dtype=torch.float32, device=q.device)  # lse in log 2, Δ
    dq, dk, dv = (torch.empty(x.shape, dtype=_outputs(x), device=x.device) for x in (q, k, v))
    strides = _strides(q=q, k=k, v=v, g=do)
    common = dict(**band(causal, window), **scores(scale, softcap), **_common(q, k, v), scale=scale)
    if N:
        sizes = {x: common[x] for x in ("WIDEN", "DV", "V1", "V2")}
        jit.stat_kernel[(triton.cdiv(N, 64) * H,)](
            o, do, lse, stat, N=N, H=H, **_strides(o=o, g=do), BLOCK_M=64, **sizes)
    config = blocks("dq", size, q.dtype, *gpu(q))
    across = triton.cdiv(max_q, config["BLOCK_M"])
    if N and across * B:
        jit.dq_kernel[(across * H * B,)](
            q, k, v, do, stat, cu_q, cu_k, dq, blocks=across, N=N, H=H, shared=H // K,
            **strides, **_strides(d=dq), **common, **config)
    config = blocks("dkv", size, q.dtype, *gpu(q))
    across = triton.cdiv(max_k, config["BLOCK_N"])
    if M and across * B:
        jit.dkv_kernel[(across * K * B,)](
            q, k, v, do, stat, cu_q, cu_k, dk, dv, blocks=across, N=N, K=K, shared=H // K,
            **strides, **_strides(dk=dk, dv=dv), **common, **config)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window, softcap):
        o, lse = _forward(q, k, v, cu_q, cu_k, max_q, scale, causal, window, softcap)
        ctx.save_for_backward(q, k, v, cu_q, cu_k, o, lse)
        ctx.how = max_q, max_k, scale, causal, window, softcap
        ctx.mark_non_differentiable(lse)
        return o.to(q.dtype), lse

    @staticmethod
    def backward(ctx, do, _):
        refuse_second_derivative()
        q, k, v, cu_q, cu_k, o, lse = ctx.saved_tensors
        do = do.to(q.dtype)
        do = do if 0 not in do.stride() else do.contiguous()
        return *_backward(q, k, v, o, lse, readable(do), cu_q, cu_k, *ctx.how), *(None,) * 8


def attention(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, causal=True, window=None, softcap=None):
    """q [N, H, Dqk], k [M, K, Dqk], v [M, K, Dv] of one dtype (fp32, bf16, fp16); cu_q, cu_k [B + 1] int32; max_q,
    max_k at least the longest sequences -> o [N, H, Dv] of that dtype, and lse [H, N] fp32, which has no gradient.

    As minir1.ops.attention, which checks the arguments.
    """
    q, k, v, cu_q, cu_k = (*(readable(x) for x in (q, k, v)), cu_q.contiguous(), cu_k.contiguous())
    return _Attention.apply(q, k, v, cu_q, cu_k, max_q, max_k, float(scale), causal, window, softcap)

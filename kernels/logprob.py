"""Log-probability and entropy straight from hidden states and the vocabulary matrix, without [N, V].

    z    = softcap(logit_scale · h wᵀ) / temperature,   softcap(x) = c · tanh(x / c)
    logp = (z_t - m) - log s,        m = max_v z_v,   s = Σ_v exp(z_v - m)
    H    = log s - u / s,            u = Σ_v exp(z_v - m) · (z_v - m)
    dz_v = g (1[v=t] - p_v) - g_H p_v (log p_v + H),   log p_v = (z_v - m) - log s

Two engines compute the same four numbers per token, (m, s, u, z_t), in fp32, and one kernel finishes both:

fused   The vocabulary is divided into splits whose width does not depend on N. One program processes BLOCK_N tokens
        over one split, tile by tile; the splits of a token are merged in order. There are no atomics and rows are
        independent: the result is deterministic and batch-invariant.
hybrid  torch.mm writes an fp32 tile of logits that fits the L2 cache, and a kernel folds it into the four numbers.

Both keep logits in fp32. At large |z|, (z_t - m) - log s keeps its digits where z_t - (m + log s) loses them; u is a
sum of *shifted* logits for the same reason.

The backward pass recomputes the logits of some columns and replaces them by dz, rounded once to the dtype of h and w;
two products follow, dh += dz w and dw = dzᵀ h, summed in fp32. Columns are the outer loop: a sum over them costs [N, D]
where a sum over rows would cost [V, D]. There are no atomics. In fp16, dz under 6e-8 is lost: the loss must be scaled,
as always in fp16.

Two-level log-sum-exp over vocabulary splits: as in verl's linear cross-entropy; the online merge is that of Milakov &
Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867), section 3.
"""
import torch
import triton

from . import logprob_jit as jit
from .once import refuse_second_derivative

INTERPRET = not isinstance(jit.partials_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 at the first import
DX_BYTES = 128 << 20  # of dx in memory at a time

# By dtype alone: a block size chosen by N would end batch invariance. None spills on sm_80 or sm_90, where 128 x 256
# does; fp32 runs without tensor cores, so that nothing is rounded to tf32.
_TENSOR_CORES = dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, num_warps=8, num_stages=3)
BLOCKS = {
    torch.float32: dict(BLOCK_N=64, BLOCK_V=128, BLOCK_D=32, num_warps=8, num_stages=2),
    torch.bfloat16: _TENSOR_CORES,
    torch.float16: _TENSOR_CORES,
}
FOLD = dict(BLOCK_N=4, BLOCK_V=512, num_warps=4)  # of the hybrid engine
SPLIT = 4096  # columns per program of the fused engine
TILE_N, TILE_V = 4096, 2048  # of fp32 logits of the hybrid engine: 33 MB, which fit L2
DX_COLUMNS = 4096  # at least this many at a time: each pass reads and writes dh [N, D]
if INTERPRET:  # several of each in a test
    BLOCKS = dict.fromkeys(BLOCKS, dict(BLOCK_N=32, BLOCK_V=64, BLOCK_D=32))
    FOLD = dict(BLOCK_N=32, BLOCK_V=64)
    SPLIT, TILE_N, TILE_V, DX_COLUMNS = 128, 64, 96, 128


def _mm(a, b):
    """a @ b in fp32; on CUDA, 16-bit operands are multiplied as they are."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _cuts(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def _forward(h, w, target, logits: dict, engine: str):
    """logp [N] and stat [3, N] (m, log s, H)."""
    (N, D), V = h.shape, w.shape[0]
    logp = torch.empty(N, dtype=torch.float32, device=h.device)
    stat = torch.empty(3, N, dtype=torch.float32, device=h.device)
    if N == 0:
        return logp, stat
    splits = triton.cdiv(V, SPLIT) if engine == "fused" else 1
    part = torch.empty(4, splits, N, dtype=torch.float32, device=h.device)
    if engine == "fused":  # tokens on axis 0: the other axes of a grid end at 65535
        blocks = BLOCKS[h.dtype]
        jit.partials_kernel[(triton.cdiv(N, blocks["BLOCK_N"]), splits)](
            h, w, target, part, N, V, D, splits, *h.stride(), *w.stride(), **logits,
            INTERPRET=INTERPRET, SPLIT=SPLIT, **blocks,
        )
    else:
        part[0], part[1:] = jit.LOW.value, 0
        for n in _cuts(N, TILE_N):
            for v in _cuts(V, TILE_V):
                x = _mm(h[n], w[v].T)
                jit.fold_kernel[(triton.cdiv(len(x), FOLD["BLOCK_N"]),)](
                    x, target[n], part[0, 0, n], len(x), N, v.start, x.shape[1], x.stride(0), **logits, **FOLD,
                )
                del x  # so that the next tile reuses its memory, in L2
    jit.finish_kernel[(triton.cdiv(N, 128),)](part, target, logp, stat, N, V, splits, BLOCK_N=128)
    return logp, stat


def _fill_dx(dx, h, w, target, stat, grad, start: int, logits: dict, engine: str):
    """dx [n, v] of rows h [n, D] and columns w [v, D] from `start` on; target, stat and grad at the same rows."""
    (n, D), width = h.shape, w.shape[0]
    flags = dict(ENTROPY=len(grad) == 2, **logits)
    if engine == "fused":
        blocks = BLOCKS[h.dtype]
        grid = (triton.cdiv(n, blocks["BLOCK_N"]) * triton.cdiv(width, blocks["BLOCK_V"]),)
        jit.dx_kernel[grid](
            h, w, target, stat, grad, dx, n, stat.stride(0), start, width, D, *h.stride(), *w.stride(), dx.stride(0),
            INTERPRET=INTERPRET, GROUP=8, **flags, **blocks,
        )
        return
    for r in _cuts(n, TILE_N):
        for c in _cuts(width, TILE_V):
            x = _mm(h[r], w[c].T)
            grid = (triton.cdiv(len(x), FOLD["BLOCK_N"]) * triton.cdiv(x.shape[1], FOLD["BLOCK_V"]),)
            jit.unfold_kernel[grid](
                x, target[r], stat[:, r], grad[:, r], dx[r, c], len(x), stat.stride(0), start + c.start, x.shape[1],
                x.stride(0), dx.stride(0), **flags, **FOLD,
            )
            del x


def _two_products(h, w, fill, dx_bytes: int, want_h: bool, want_w: bool):
    """dh = dx w [N, D] and dw = dxᵀ h [V, D], None where not wanted; fill(dx, n, v) writes dx of rows n, columns v."""
    (N, D), V = h.shape, w.shape[0]
    if want_h and not w.is_meta and w.amin() == -torch.inf:  # dx is 0 where a logit is -∞, and 0·∞ would be NaN
        w = w.masked_fill(w == -torch.inf, 0.0)
    dtype = torch.float32 if INTERPRET else h.dtype  # the interpreter rounds to bf16 unlike a GPU
    rows = min(N, max(1, dx_bytes // (DX_COLUMNS * dtype.itemsize)))
    fitting = dx_bytes // max(1, rows * dtype.itemsize, D * 4)  # columns of dx, and rows of dw in fp32
    width = min(V, max(DX_COLUMNS, fitting // 256 * 256))
    dh = torch.zeros(N, D, dtype=torch.float32, device=h.device) if want_h else None
    dw = torch.zeros_like(w) if want_w else None
    scratch = torch.empty(rows, width, dtype=dtype, device=h.device)
    for v in _cuts(V, width) if N else ():
        dw_v = None
        for n in _cuts(N, rows):
            dx = scratch[: n.stop - n.start, : v.stop - v.start]
            fill(dx, n, v)
            if want_h:
                dh[n] += _mm(dx, w[v])
            if want_w:
                part = _mm(dx.T, h[n])
                dw_v = part if dw_v is None else dw_v.add_(part)
        if want_w:
            dw[v] = dw_v  # rounded once
    return None if dh is None else dh.to(h.dtype), dw


def _backward(h, w, target, stat, grad, logits: dict, engine: str, dx_bytes: int, want_h: bool, want_w: bool):
    """dh and dw from grad [1 or 2, N]: g, and g_H if entropy is in the loss."""
    fill = lambda dx, n, v: _fill_dx(dx, h[n], w[v], target[n], stat[:, n], grad[:, n], v.start, logits, engine)
    return _two_products(h, w, fill, dx_bytes, want_h, want_w)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, target, logits, entropy, engine, dx_bytes):
        logp, stat = _forward(h, w, target, logits, engine)
        ctx.save_for_backward(h, w, target, stat)
        ctx.how = logits, engine, dx_bytes
        ctx.set_materialize_grads(False)
        return logp, stat[2].clone() if entropy else None

    @staticmethod
    def backward(ctx, g, g_H):
        refuse_second_derivative()
        h, w, target, stat = ctx.saved_tensors
        if g is None and g_H is None:
            return (None,) * 7
        grad = stat.new_zeros(1 if g_H is None else 2, len(h))
        for i, x in enumerate((g, g_H)):
            if x is not None:
                grad[i] = x  # of any stride, even 0
        with torch.autocast(h.device.type, enabled=False):
            dh, dw = _backward(h, w, target, stat, grad, *ctx.how, *ctx.needs_input_grad[:2])
        return dh, dw, *(None,) * 5


def linear_logprob(h, w, target, *, temperature=1.0, softcap=None, logit_scale=1.0, entropy=False, engine="hybrid",
                   dx_bytes=DX_BYTES):
    """h [N, D], w [V, D] of one dtype (fp32, bf16, fp16), target [N] int64 -> logp, entropy | None, [N] fp32.

    Differentiable in h and w. A target outside [0, V) gives NaN, since a check would synchronise the device. The
    backward pass needs about dx_bytes for a part of [N, V], as much at most for the rows of dw that belong to it, in
    fp32 (D up to 8,192), and dh [N, D] in fp32.
    """
    assert w.shape[1:] == h.shape[1:] and target.shape == h.shape[:1] and target.dtype == torch.int64
    assert h.dtype == w.dtype and engine in ("hybrid", "fused")
    logits = dict(scale=float(logit_scale), cap=float(softcap or 0.0), inv_temperature=1.0 / temperature,
                  SOFTCAP=softcap is not None)
    with torch.autocast(h.device.type, enabled=False):  # which would round the logits
        return _LinearLogprob.apply(h, w, target.contiguous(), logits, entropy, engine, dx_bytes)

"""Log-probability and entropy from hidden states and the vocabulary matrix: the twin, tile by tile over the tokens."""
import torch
from torch import Tensor

from .choose import use_triton

ENGINES = ("auto", "hybrid", "fused")
CHUNK_BYTES = 64 << 20  # of log-probs that the twin may hold at a time
TILE_BYTES = 1 << 20  # of logits that stay in a core's cache from one pass to the next
TILE_ROWS = 256  # but never fewer rows: below it the products with the vocabulary matrix turn slow


def linear_logprob(
    h: Tensor,
    w: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    impl: str = "auto",
    engine: str = "auto",
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of the targets, and entropy, from hidden states and the vocabulary matrix.

        z = softcap(logit_scale · h wᵀ) / temperature,    softcap(x) = c · tanh(x / c)
        logp_n = z_{n,t_n} - log Σ_v exp z_{n,v},         H_n = -Σ_v p_{n,v} log p_{n,v}

    h [N, D], w [V, D], target [N] int64 -> logp [N], entropy [N] (None if not asked for); fp32, whatever the
    dtype of h and w (fp64 if one of them is fp64). Both are differentiable in h and w. A row whose target is
    ignore_index has value 0 and gradient 0 and costs nothing. ValueError for what does not fit, and on the CPU for
    targets out of range; on a GPU, where looking would stall it, those give NaN or a device assertion.

    engine, of the Triton kernel: "hybrid" (auto) or "fused", whose logp and entropy of a row have the same bits in any
    batch. chunk_bytes: how much of [N, V] is held at a time (None: 64 MiB, in Triton 128 MiB). If all fits, the twin
    keeps the log-probs for the backward pass; else, and in Triton always, they are made again there.
    """
    _check(h, w, target, temperature, softcap, engine, chunk_bytes)
    triton = use_triton(impl, h, w)
    if engine != "auto" and not triton:
        raise ValueError(f"engine={engine!r}: only Triton has engines, and here the twin in torch runs; impl='triton' "
                         "says why the kernel cannot")
    kept = target != ignore_index
    rows = None if bool(kept.all()) else kept.nonzero().squeeze(1)
    if rows is not None:
        h, target = h.index_select(0, rows), target.index_select(0, rows)
    if not target.is_cuda and target.numel():
        low, high = target.aminmax()
        if low < 0 or high >= w.shape[0]:
            allowed = f"0 to {w.shape[0] - 1} and {ignore_index}"
            raise ValueError(f"target in [{low}, {high}]: allowed are {allowed}")
    if triton:
        logp, ent = _triton(h, w, target, temperature, softcap, logit_scale, entropy, engine, chunk_bytes)
    else:
        with torch.autocast(h.device.type, enabled=False):  # autocast would round the logits to bf16
            logp, ent = _LinearLogprob.apply(
                h, w, target, temperature, softcap, logit_scale, entropy, chunk_bytes or CHUNK_BYTES,
                torch.is_grad_enabled(),
            )
    if rows is not None:
        logp = logp.new_zeros(kept.shape).index_copy(0, rows, logp)
        ent = ent.new_zeros(kept.shape).index_copy(0, rows, ent) if entropy else None
    return logp, ent


def _triton(h, w, target, temperature, softcap, logit_scale, entropy, engine, chunk_bytes):
    from minir1.kernels import logprob as kernel  # lazily: triton may not be there

    return kernel.linear_logprob(
        h, w, target, temperature=temperature, softcap=softcap, logit_scale=logit_scale, entropy=entropy,
        engine="hybrid" if engine == "auto" else engine, dx_bytes=chunk_bytes or kernel.DX_BYTES,
    )


def _check(h, w, target, temperature, softcap, engine, chunk_bytes) -> None:
    if h.dim() != 2 or w.dim() != 2 or h.shape[1] != w.shape[1] or target.shape != h.shape[:1]:
        raise ValueError(f"h {tuple(h.shape)}, w {tuple(w.shape)}, target {tuple(target.shape)}: "
                         "want [N, D], [V, D], [N]")
    if target.dtype != torch.int64 or not h.is_floating_point() or not w.is_floating_point():
        raise ValueError(f"h {h.dtype}, w {w.dtype}, target {target.dtype}: want floats, floats, torch.int64")
    if not h.device == w.device == target.device:
        raise ValueError(f"h on {h.device}, w on {w.device}, target on {target.device}: want one device")
    if 0 in w.shape:
        raise ValueError(f"w {tuple(w.shape)}: wants a vocabulary and a width")
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: choose one of {', '.join(ENGINES)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: must be above 0, or None")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes={chunk_bytes}: must be above 0, or None")


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the result in fp32 (fp64 for fp64), never rounded to bf16."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return torch.mm(a.to(dtype), b.to(dtype))


class _LinearLogprob(torch.autograd.Function):
    """The twin, tile by tile over the tokens, with one hand-written derivation whether the log-probs are kept
    or recomputed. Autograd on [N, V] would be shorter and slower, even where all fits: here a tile stays in
    the cache from the product to its gradient, and nothing as large as the logits is filled with zeros.
    """

    @staticmethod
    def forward(ctx, h, w, target, temperature, softcap, logit_scale, entropy, chunk_bytes, grad):
        N, V = h.shape[0], w.shape[0]
        dtype = torch.float64 if torch.float64 in (h.dtype, w.dtype) else torch.float32
        row_bytes = V * dtype.itemsize
        ctx.tile = min(max(TILE_ROWS, TILE_BYTES // row_bytes), max(1, chunk_bytes // row_bytes))
        ctx.temperature, ctx.softcap, ctx.logit_scale = temperature, softcap, logit_scale
        # tanh' needs the logits beside the log-probs: with a softcap nothing is kept.
        keep = grad and softcap is None and N * row_bytes <= chunk_bytes
        lp_NV = h.new_empty(N, V, dtype=dtype) if keep else None
        logp = h.new_empty(N, dtype=dtype)
        ent = h.new_empty(N, dtype=dtype) if entropy else None
        w_ = _operand(w, h)
        for i in range(0, N, ctx.tile):
            n = slice(i, i + ctx.tile)
            z = _tile_logits(h[n], w_, ctx)
            lp = torch.log_softmax(z, -1, out=lp_NV[n] if keep else None)
            logp[n] = lp.gather(1, target[n, None]).squeeze(1)
            if entropy:
                ent[n] = torch.linalg.vecdot(torch.exp(lp, out=z), lp).neg_()
        ctx.save_for_backward(h, w, target, ent, lp_NV)
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_H):
        r"""dL/dz_v = g (1[v=t] - p_v) - g_H p_v (log p_v + H),  then through temperature, softcap and scale:
        dx = dz / temperature · (1 - (softcap(x) / c)²) · logit_scale;  dh = dx w,  dw = dxᵀ h.
        """
        h, w, target, ent, lp_NV = ctx.saved_tensors
        want_h, want_w = ctx.needs_input_grad[:2]
        if g is None and g_H is None:
            return (None,) * 9
        if g is None:
            g = torch.zeros_like(target, dtype=g_H.dtype)
        w_ = _operand(w, h)
        dh = torch.empty_like(h) if want_h else None
        dw = torch.zeros_like(w, dtype=g.dtype) if want_w else None  # summed in fp32, rounded once
        with torch.autocast(h.device.type, enabled=False):
            for i in range(0, h.shape[0], ctx.tile):
                n = slice(i, i + ctx.tile)
                z = _tile_logits(h[n], w_, ctx) if lp_NV is None else None
                lp = torch.log_softmax(z, -1) if lp_NV is None else lp_NV[n]
                dz = lp.exp()
                if g_H is None:
                    dz.mul_(-g[n, None])
                else:
                    dz.mul_((lp + ent[n, None]).mul_(-g_H[n, None]).sub_(g[n, None]))
                dz.scatter_add_(1, target[n, None], g[n, None])
                if ctx.softcap is not None:
                    dz.mul_(1 - (z * (ctx.temperature / ctx.softcap)).square_())
                if ctx.logit_scale != ctx.temperature:
                    dz.mul_(ctx.logit_scale / ctx.temperature)
                dz = dz.to(w_.dtype)
                if want_h:
                    dh[n] = _mm(dz, w_)
                if want_w and w_.dtype == dw.dtype:
                    dw.addmm_(dz.T, h[n].to(dw.dtype))  # no second [V, D] a tile
                elif want_w:
                    dw += _mm(dz.T, h[n])
        return dh, None if dw is None else dw.to(w.dtype), *(None,) * 7


def _operand(w: Tensor, h: Tensor) -> Tensor:
    """w as the products take it: unchanged where they can accumulate in fp32, else upcast once for all."""
    if h.is_cuda and h.dtype == w.dtype:
        return w
    return w.to(torch.float64 if torch.float64 in (h.dtype, w.dtype) else torch.float32)


def _tile_logits(h: Tensor, w: Tensor, ctx) -> Tensor:
    """z [n, V] = softcap(logit_scale · h wᵀ) / temperature."""
    z = _mm(h, w.T)
    if ctx.softcap is not None:
        return z.mul_(ctx.logit_scale / ctx.softcap).tanh_().mul_(ctx.softcap / ctx.temperature)
    return z if ctx.logit_scale == ctx.temperature else z.mul_(ctx.logit_scale / ctx.temperature)

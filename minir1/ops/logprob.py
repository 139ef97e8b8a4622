"""Log-probability and entropy from hidden states and the vocabulary matrix, without logits for all tokens at once."""
import math

import torch
from torch import Tensor

from .checks import check_numbers
from .chunks import factor, mm, no_autocast, refuse_second_derivative, token_chunks, upcast, without_infinities
from .dispatch import use_triton

ENGINES = ("auto", "hybrid", "fused")


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
        logp_n = z_{n,t_n} - log Σ_v exp z_{n,v},         H_n = -Σ_v p_{n,v} log p_{n,v}    (0 log 0 = 0)

    h [N, D], w [V, D], target [N] int64 -> logp [N], entropy [N] or None; fp32 for any dtype of h and w (fp64 if one of
    them is fp64). Both are differentiable in h and w, once. Rows may have any stride, even 0. A row whose target is
    ignore_index has value 0 and gradient 0 and costs nothing; finding such rows synchronises a GPU. ValueError for
    arguments that do not fit, and on the CPU for targets out of range; on a GPU those give NaN or a device assertion.

    chunk_bytes: in torch, of logits in memory at a time (None: 32 MiB, but at least 256 tokens); the backward pass
    reuses the log-probs of the last chunk and recomputes the others. In Triton, of gradients of the logits (None: 128
    MiB). engine, only for Triton: "hybrid" (auto) or "fused", whose logp and entropy are batch-invariant.
    """
    _check(h, w, target, logit_scale, engine)
    check_numbers(temperature=temperature, softcap=softcap, chunk_bytes=chunk_bytes)
    triton = use_triton(impl, h, w)
    if engine != "auto" and not triton:
        raise ValueError(f"engine={engine!r}: only Triton has engines, and this call runs in torch; impl='triton' says "
                         "why the kernel cannot run")
    counted = target != ignore_index
    rows = None if bool(counted.all()) else counted.nonzero().squeeze(1)
    if rows is not None:
        h, target = h.index_select(0, rows), target.index_select(0, rows)
    if not target.is_cuda and target.numel():
        low, high = target.aminmax()
        if low < 0 or high >= w.shape[0]:
            raise ValueError(f"target in [{low}, {high}]: allowed are 0 to {w.shape[0] - 1} and {ignore_index}")
    if triton:
        logp, ent = _triton(h, w, target, temperature, softcap, logit_scale, entropy, engine, chunk_bytes)
    else:
        with no_autocast(h):
            logp, ent = _LinearLogprob.apply(h, w, target, temperature, softcap, logit_scale, entropy, chunk_bytes)
    if rows is not None:
        logp = logp.new_zeros(counted.shape).index_copy(0, rows, logp)
        ent = ent.new_zeros(counted.shape).index_copy(0, rows, ent) if entropy else None
    return logp, ent


class _LinearLogprob(torch.autograd.Function):
    """Chunk by chunk of tokens. The backward pass starts with the last chunk, whose log-probs were saved; it recomputes
    the others."""

    @staticmethod
    def forward(ctx, h, w, target, temperature, softcap, logit_scale, entropy, chunk_bytes):
        N, V, dtype = len(h), len(w), upcast(h, w)
        ctx.chunks, ctx.how = token_chunks(N, V, dtype, chunk_bytes), (temperature, softcap, logit_scale)
        ctx.set_materialize_grads(False)
        logp, ent = h.new_empty(N, 1, dtype=dtype), h.new_empty(N, dtype=dtype) if entropy else None
        buffers = [h.new_empty(ctx.chunks[0].stop, V, dtype=dtype) for _ in range(1 + entropy)]
        target, w_ = target.unsqueeze(1), factor(w, dtype)
        for n in ctx.chunks:
            lp, *p = (x[: n.stop - n.start] for x in buffers)
            torch.log_softmax(_logits(h[n], w_, *ctx.how, out=lp), 1, out=lp)
            torch.gather(lp, 1, target[n], out=logp[n])
            if entropy:  # softmax(lp) is exp(lp), but faster
                torch.sum(torch.softmax(lp, 1, out=p[0]).mul_(lp.clamp_(min=-1e4)), 1, out=ent[n])  # e^-1e4 is 0
        ent = ent.neg_() if entropy else None
        ctx.save_for_backward(h, w, target, ent, lp if softcap is None else None)  # softcap' needs the logits as well
        return logp.squeeze(1), ent

    @staticmethod
    def backward(ctx, g, g_H):
        """dL/dz_v = g (1[v = t] - p_v) - g_H p_v (log p_v + H) = p_v (slope · log p_v + level) + g 1[v = t]"""
        refuse_second_derivative()
        if g is None and g_H is None:
            return (None,) * 8
        h, w, target, ent, lp = ctx.saved_tensors
        (temperature, softcap, logit_scale), dtype = ctx.how, upcast(h, w)
        g, g_H = (x if x is None else x.unsqueeze(1) * (logit_scale / temperature) for x in (g, g_H))
        slope, level = (None, 0) if g_H is None else (-g_H, -g_H * ent.unsqueeze(1))
        level = level if g is None else level - g
        dh, dw = (torch.empty_like(x, dtype=dtype) if want else None for x, want in zip((h, w), ctx.needs_input_grad))
        buffers = [h.new_empty(ctx.chunks[0].stop, len(w), dtype=dtype) for _ in range(2)]
        w_ = factor(w, dtype)
        finite = without_infinities(w_) if dh is not None else None
        with no_autocast(h):
            for n in reversed(ctx.chunks):
                z, p = (x[: n.stop - n.start] for x in buffers)
                if lp is None:
                    _logits(h[n], w_, *ctx.how, out=z)
                    through_cap = None if softcap is None else (z * (temperature / softcap)).square_().neg_().add_(1)
                    lp = torch.log_softmax(z, 1, out=z).clamp_(min=-1e4)
                torch.softmax(lp, 1, out=p)
                dx = p.mul_(level[n]) if slope is None else torch.mul(lp, slope[n], out=z).add_(level[n]).mul_(p)
                if g is not None:
                    dx.scatter_add_(1, target[n], g[n])
                if softcap is not None:
                    dx.mul_(through_cap)
                dx = dx.to(h.dtype) if h.is_cuda else dx
                if dh is not None:
                    mm(dx, finite, out=dh[n])
                if dw is not None:
                    mm(dx.T, h[n], out=dw, add=n is not ctx.chunks[-1])
                lp = None
        return None if dh is None else dh.to(h.dtype), None if dw is None else dw.to(w.dtype), *(None,) * 6


def _logits(h, w, temperature, softcap, logit_scale, out) -> Tensor:
    """z [n, V] = softcap(logit_scale · h wᵀ) / temperature."""
    z = mm(h, w.T, out)
    if softcap is not None:
        return z.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
    return z if logit_scale == temperature else z.mul_(logit_scale / temperature)


def _triton(h, w, target, temperature, softcap, logit_scale, entropy, engine, chunk_bytes):
    from minir1.kernels import logprob as kernel  # lazily: triton may not be installed

    return kernel.linear_logprob(
        h, w, target, temperature=temperature, softcap=softcap, logit_scale=logit_scale, entropy=entropy,
        engine="hybrid" if engine == "auto" else engine, dx_bytes=chunk_bytes or kernel.DX_BYTES,
    )


def _check(h, w, target, logit_scale, engine) -> None:
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
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale={logit_scale}: must be finite")

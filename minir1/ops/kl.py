"""Divergence of a student from a teacher over the whole vocabulary, without logits for all tokens at once."""
import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .checks import check_numbers
from .chunks import factor, mm, no_autocast, refuse_second_derivative, token_chunks, upcast, without_infinities
from .dispatch import use_triton

KINDS = ("forward", "reverse", "js")


def linear_kl(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor,
    w_t: Tensor,
    temperature: float = 1.0,
    kind: str = "forward",
    beta: float = 0.5,
    *,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """The divergence of two next-token distributions, p_s = softmax(h_s w_sᵀ / temperature) and p_t likewise.

        forward   KL(p_t ‖ p_s) = Σ_v p_t (log p_t - log p_s)
        reverse   KL(p_s ‖ p_t)
        js        (1-β) KL(p_s ‖ m) + β KL(p_t ‖ m),   m = (1-β) p_s + β p_t       (a logit may be -∞: 0 log 0 = 0)

    β = ½ is the Jensen-Shannon divergence, any other β in 0 … 1 the generalised one (arXiv:2306.13649).
    Divided by β it becomes the forward KL for β -> 0, divided by 1-β the reverse KL for β -> 1. Other kinds ignore β.

    h_s [N, D_s], w_s [V, D_s] of the student, h_t [N, D_t], w_t [V, D_t] of the teacher -> [N] fp32 (fp64 if an input
    is). Differentiable in h_s and w_s, once; the teacher is a constant and gets no gradient, even if it is the same
    model. The factor temperature², by which Hinton et al. (arXiv:1503.02531, section 2) keep the size of the gradient,
    is left to the caller. Rows may have any stride, even 0. ValueError for arguments that do not fit.

    chunk_bytes: in torch, of each model's logits in memory at a time (None: 32 MiB, but at least 256 tokens); the
    backward pass reuses the gradient of the last chunk's logits and recomputes the others. In Triton, of gradients of
    the student's logits (None: 128 MiB).
    """
    _check(h_s, w_s, h_t, w_t, kind, beta)
    check_numbers(temperature=temperature, chunk_bytes=chunk_bytes)
    if use_triton(impl, h_s, w_s) and use_triton(impl, h_t, w_t):
        from minir1.kernels import kl as kernel  # lazily: triton may not be installed

        return kernel.linear_kl(h_s, w_s, h_t, w_t, temperature=temperature, kind=kind, beta=beta,
                                dx_bytes=chunk_bytes or kernel.DX_BYTES)
    with no_autocast(h_s):
        return _LinearKL.apply(h_s, w_s, h_t.detach(), w_t.detach(), temperature, (kind, beta), chunk_bytes)


class _LinearKL(torch.autograd.Function):
    """The divergence and its slope, the derivative by the student's logits, chunk by chunk of tokens. The backward pass
    starts with the last chunk, whose slope was saved, and recomputes the others."""

    @staticmethod
    def forward(ctx, h_s, w_s, h_t, w_t, temperature, which, chunk_bytes):
        N, V, dtype = len(h_s), len(w_s), upcast(h_s, w_s, h_t, w_t)
        ctx.chunks, ctx.temperature, ctx.which = token_chunks(N, V, dtype, chunk_bytes), temperature, which
        kl = h_s.new_empty(N, dtype=dtype)
        models = (h_s, factor(w_s, dtype)), (h_t, factor(w_t, dtype))
        buffers = [h_s.new_empty(ctx.chunks[0].stop, V, dtype=dtype) for _ in range(3)]
        for n in ctx.chunks:
            kl[n], slope = _divergence(models, n, temperature, which, *(x[: n.stop - n.start] for x in buffers))
        ctx.save_for_backward(h_s, w_s, h_t, w_t, slope)
        return kl

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivative()
        h, w, h_t, w_t, slope = ctx.saved_tensors
        dtype, g = slope.dtype, (g / ctx.temperature).unsqueeze(1)
        dh, dw = (torch.empty_like(x, dtype=dtype) if want else None for x, want in zip((h, w), ctx.needs_input_grad))
        models = (h, factor(w, dtype)), (h_t, factor(w_t, dtype))
        finite = without_infinities(models[0][1]) if dh is not None else None
        buffers = [h.new_empty(ctx.chunks[0].stop, len(w), dtype=dtype) for _ in range(3)]
        with no_autocast(h):
            for n in reversed(ctx.chunks):
                a, b, c = (x[: n.stop - n.start] for x in buffers)
                if slope is None:
                    _, slope = _divergence(models, n, ctx.temperature, ctx.which, a, b, c)
                dx = torch.mul(slope, g[n], out=c)
                dx = dx.to(h.dtype) if h.is_cuda else dx
                if dh is not None:
                    mm(dx, finite, out=dh[n])
                if dw is not None:
                    mm(dx.T, h[n], out=dw, add=n is not ctx.chunks[-1])
                slope = None
        return None if dh is None else dh.to(h.dtype), None if dw is None else dw.to(w.dtype), *(None,) * 5


def _divergence(models, n: slice, temperature: float, which: tuple[str, float], a, b, c):
    """The divergence [n] of the tokens n, from student and teacher (h [N, D], w [V, D]), and its slope [n, V]:

        forward  p_s - p_t    reverse  p_s (log p_s - log p_t - KL)    js  (1-β) p_s (log p_s - log m - KL(p_s ‖ m))

    log (p_s / m) is -log (1-β) - log (1 + e^x), x = log p_t - log p_s + log β/(1-β), which is finite where both are 0
    in fp32. which: kind and β. a, b and c [n, V] are overwritten; the slope may lie in a or b.
    """
    kind, beta = which
    for (h, w), out in zip(models, (a, b)):
        z = mm(h[n], w.T, out)
        torch.log_softmax(z if temperature == 1 else z.div_(temperature), 1, out=z)
    d = torch.sub(a, b, out=c) if kind == "reverse" else torch.sub(b, a, out=c)
    p_s, p_t = (torch.softmax(lp, 1, out=lp) for lp in (a, b))  # softmax(lp) is exp(lp), but faster
    if kind == "forward":
        return d.masked_fill_(p_t == 0, 0.0).mul_(p_t).sum(1), p_s.sub_(p_t)
    if kind == "reverse":
        kl = torch.mul(p_s, d.masked_fill_(p_s == 0, 0.0), out=b).sum(1)
        return kl, torch.sub(d, kl[:, None], out=b).mul_(p_s)
    d.nan_to_num_(0.0, 1e4, -1e4)  # of logits -∞; other NaN are in p as well
    d.add_(math.log(beta) - math.log1p(-beta))
    t_to_m = softplus(d.neg_(), threshold=40).neg_().sub_(math.log(beta))
    kl_t = p_t.mul_(t_to_m).sum(1)
    del t_to_m  # one more [n, V] at a time, not two
    to_m = softplus(d.neg_(), threshold=40).neg_().sub_(math.log1p(-beta))
    kl_s = torch.mul(p_s, to_m, out=b).sum(1)
    return (1 - beta) * kl_s + beta * kl_t, torch.sub(to_m, kl_s[:, None], out=b).mul_(p_s).mul_(1 - beta)


def _check(h_s, w_s, h_t, w_t, kind, beta) -> None:
    pairs = {"h_s": h_s, "w_s": w_s, "h_t": h_t, "w_t": w_t}
    each = lambda what: ", ".join(f"{name} {what(x)}" for name, x in pairs.items())
    if any(x.dim() != 2 for x in pairs.values()) or not (
        len(h_s) == len(h_t) and len(w_s) == len(w_t) and h_s.shape[1] == w_s.shape[1] and h_t.shape[1] == w_t.shape[1]
    ):
        raise ValueError(f"{each(lambda x: tuple(x.shape))}: want [N, D_s], [V, D_s], [N, D_t], [V, D_t]")
    if 0 in (*w_s.shape, *w_t.shape):
        raise ValueError(f"w_s {tuple(w_s.shape)}, w_t {tuple(w_t.shape)}: want a vocabulary and a width")
    if not all(x.is_floating_point() for x in pairs.values()):
        raise ValueError(f"{each(lambda x: x.dtype)}: want floats")
    if len({x.device for x in pairs.values()}) > 1:
        raise ValueError(f"{each(lambda x: x.device)}: want one device")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    if kind == "js" and not 0 < beta < 1:
        raise ValueError(f"beta={beta}: above 0 and below 1; the ends are forward and reverse")

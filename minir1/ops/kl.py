"""Divergence of a student from a teacher over the whole vocabulary, from hidden states, without [N, V]."""
import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .choose import use_triton
from .tiles import float32_products, mm, shares, tile, waiting, wants_grad, wide

KINDS = ("forward", "reverse", "js")
CHUNK_BYTES = 48 << 20  # of log-probs of both models that are kept for the backward pass


def linear_kl(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor,
    w_t: Tensor,
    temperature: float = 1.0,
    kind: str = "forward",
    *,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """The divergence of two next-token distributions, p_s = softmax(h_s w_sᵀ / temperature) and p_t likewise.

        forward   KL(p_t ‖ p_s) = Σ_v p_t (log p_t - log p_s)
        reverse   KL(p_s ‖ p_t)
        js        ½ KL(p_s ‖ m) + ½ KL(p_t ‖ m),   m = ½ (p_s + p_t)

    h_s [N, D_s], w_s [V, D_s] of the student, h_t [N, D_t], w_t [V, D_t] of the teacher -> [N] fp32 (fp64 if an input
    is). Differentiable in h_s and w_s; the teacher is a constant and gets no gradient, even if it is the same model.
    Nothing is multiplied by temperature² (Hinton et al., arXiv:1503.02531, section 2, does, to keep the size of the
    gradient): that is the caller's. chunk_bytes: the twin keeps that much of the log-probs of both models for the
    backward pass (None: 48 MiB) and makes the others again there; Triton keeps none, and holds that much of the
    gradients of the student's logits (128 MiB). ValueError for what does not fit.
    """
    _check(h_s, w_s, h_t, w_t, temperature, kind, chunk_bytes)
    if use_triton(impl, h_s, w_s) and use_triton(impl, h_t, w_t):
        from minir1.kernels import kl as kernel  # lazily: triton may not be there

        return kernel.linear_kl(h_s, w_s, h_t, w_t, temperature=temperature, kind=kind,
                                dx_bytes=chunk_bytes or kernel.DX_BYTES)
    kept_bytes = (chunk_bytes or CHUNK_BYTES) if wants_grad(h_s, w_s) else 0
    with float32_products(h_s):
        return _LinearKL.apply(h_s, w_s, h_t.detach(), w_t.detach(), temperature, kind, kept_bytes)


def _check(h_s, w_s, h_t, w_t, temperature, kind, chunk_bytes) -> None:
    pairs = {"h_s": h_s, "w_s": w_s, "h_t": h_t, "w_t": w_t}
    told = lambda what: ", ".join(f"{name} {what(x)}" for name, x in pairs.items())
    if any(x.dim() != 2 for x in pairs.values()) or not (
        len(h_s) == len(h_t) and len(w_s) == len(w_t) and h_s.shape[1] == w_s.shape[1] and h_t.shape[1] == w_t.shape[1]
    ):
        raise ValueError(f"{told(lambda x: tuple(x.shape))}: want [N, D_s], [V, D_s], [N, D_t], [V, D_t]")
    if 0 in (*w_s.shape, *w_t.shape):
        raise ValueError(f"w_s {tuple(w_s.shape)}, w_t {tuple(w_t.shape)}: want a vocabulary and a width")
    if not all(x.is_floating_point() for x in pairs.values()):
        raise ValueError(f"{told(lambda x: x.dtype)}: want floats")
    if len({x.device for x in pairs.values()}) > 1:
        raise ValueError(f"{told(lambda x: x.device)}: want one device")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes={chunk_bytes}: must be above 0, or None")


class _LinearKL(torch.autograd.Function):
    """Tile by tile over tokens and words, as linear_logprob's twin: each tile is normalised by itself, and its shares
    of the two distributions are known at the end. Forward and reverse KL need no second pass (the chain rule)

        KL(p_t ‖ p_s) = Σ_tiles π_t (KL_tile + log π_t - log π_s)

    and js, whose mixture is not known before the shares, makes its tiles again, as far as they were not kept.
    """

    @staticmethod
    def forward(ctx, h_s, w_s, h_t, w_t, temperature, kind, chunk_bytes):
        N, V = len(h_s), len(w_s)
        dtype = wide(h_s, w_s, h_t, w_t)
        ctx.tokens, ctx.words = tile(N, V, dtype, h_s.device, models=2)
        ctx.temperature, ctx.kind = temperature, kind
        wait = chunk_bytes and ctx.needs_input_grad[1] and w_s.dtype == dtype and N
        wait = bool(wait and 2 * ctx.tokens[0].stop <= w_s.shape[1])
        ctx.dw, ctx.first_waits = w_s.new_empty(w_s.shape) if wait else None, wait
        inputs, kept, left = (h_s, w_s, h_t, w_t), [], chunk_bytes
        stat = h_s.new_empty(2, 2, len(ctx.words), N, dtype=dtype)  # max z, max lp of student and teacher
        part = h_s.new_zeros(len(ctx.words), N, dtype=dtype)
        for j, i, z in _tiles(ctx, inputs, (), dtype):
            n = ctx.tokens[i]
            if i == 0 and wait:
                z = waiting(ctx.dw, ctx.words[j], *z.shape).copy_(z)
            elif left >= z.nbytes:
                left -= z.nbytes
                z = z.clone()
                kept.append(z)
            torch.amax(z, 2, out=stat[0, :, j, n])
            lp_s, lp_t = torch.log_softmax(z, 2, out=z)
            torch.amax(z, 2, out=stat[1, :, j, n])
            if kind != "js":
                p, d = (lp_t.softmax(1), lp_t - lp_s) if kind == "forward" else (lp_s.softmax(1), lp_s - lp_t)
                part[j, n] = torch.linalg.vecdot(p, d)
        log_share = torch.stack([shares(*pair)[2] for pair in zip(stat[0], -stat[1])]) if N else stat[0]
        if kind == "js":
            kl_s, kl_t = h_s.new_zeros(2, N, dtype=dtype)
            for j, i, z in _tiles(ctx, inputs, kept, dtype, ctx.dw, normal=True):
                n = ctx.tokens[i]
                (p_s, p_t), r_s, r_t = _against_mixture(z, log_share[:, j, n])
                kl_s[n] += torch.linalg.vecdot(p_s, r_s)
                kl_t[n] += torch.linalg.vecdot(p_t, r_t)
            kl, own = (kl_s + kl_t) / 2, kl_s
        else:
            a, b = log_share.flip(0) if kind == "forward" else log_share
            kl = own = (a.exp() * (part + a - b)).sum(0)
        ctx.save_for_backward(*inputs, log_share, own, *kept)
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        """Of the student's logits:  forward  g (p_s - p_t);   reverse  g p_s (log p_s - log p_t - KL(p_s ‖ p_t));
        js  ½ g p_s (log p_s - log m - KL(p_s ‖ m)).
        """
        *inputs, log_share, own = ctx.saved_tensors[:6]
        h, w, dtype = *inputs[:2], log_share.dtype
        want_h, want_w = ctx.needs_input_grad[:2]
        dh = torch.zeros_like(h, dtype=dtype) if want_h else None
        there = ctx.dw
        if want_w:
            dw, ctx.dw = torch.zeros_like(w, dtype=dtype) if there is None else there, None  # given away
        with float32_products(h):
            for j, i, z in _tiles(ctx, inputs, ctx.saved_tensors[6:], dtype, there, normal=True):
                n, v = ctx.tokens[i], ctx.words[j]
                if ctx.kind == "forward":
                    p_s, p_t = z.softmax(2) * log_share[:, j, n].exp()[..., None]
                    dz = p_s - p_t
                elif ctx.kind == "reverse":
                    lp_s, lp_t = z + log_share[:, j, n, None]
                    dz = lp_s.exp() * (lp_s - lp_t - own[n, None])
                else:
                    (p_s, _), r_s, _ = _against_mixture(z, log_share[:, j, n])
                    dz = p_s * (r_s - own[n, None]) / 2
                dx = dz.mul_((g[n] / ctx.temperature)[:, None])
                dx = dx.to(h.dtype) if h.is_cuda else dx
                if want_h:
                    mm(dx, w[v], dh[n], add=True)
                if want_w:
                    mm(dx.T, h[n], dw[v], add=i > 0)
        return None if dh is None else dh.to(h.dtype), dw.to(w.dtype) if want_w else None, *(None,) * 5


def _tiles(ctx, inputs, kept, dtype, there=None, normal: bool = False):
    """(word piece, token piece, z [2, n, v] of student and teacher): logits, or with `normal` their log_softmax.

    What was kept, or waits in `there` (dw), is normal; the rest is made in one room, which the next tile overwrites.
    """
    h_s, w_s, h_t, w_t = inputs
    sizes = [max((x.stop - x.start for x in side), default=0) for side in (ctx.tokens, ctx.words)]
    room = h_s.new_empty(2, *sizes, dtype=dtype)
    kept = iter(kept)
    for j, v in enumerate(ctx.words):
        pairs = [(h, w[v] if h.is_cuda else w[v].to(dtype)) for h, w in ((h_s, w_s), (h_t, w_t))]
        for i, n in enumerate(ctx.tokens):
            size = n.stop - n.start, v.stop - v.start
            if i == 0 and ctx.first_waits:
                z = None if there is None else waiting(there, v, 2, *size)
            else:
                z = next(kept, None)
            if z is None:
                z = room[:, : size[0], : size[1]]
                for out, (h, w) in zip(z, pairs):
                    mm(h[n], w.T, out)
                if ctx.temperature != 1:
                    z.div_(ctx.temperature)
                if normal:
                    torch.log_softmax(z, 2, out=z)
            yield j, i, z


def _against_mixture(z, log_share):
    """Probabilities [2, n, v] of student and teacher, and log (p_s / m), log (p_t / m) [n, v]:

    log (p_s / m) = log 2 - log (1 + e^d),  d = log p_t - log p_s,  which is finite where both are 0 in fp32.
    """
    lp = z + log_share[..., None]
    d = lp[1] - lp[0]
    return lp.exp(), *(math.log(2) - softplus(x, threshold=40) for x in (d, -d))

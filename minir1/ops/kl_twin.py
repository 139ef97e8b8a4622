"""The twin of linear_kl in torch, whose gradients are written by hand; by tiles, as that of linear_logprob."""
import math

import torch
from torch.nn.functional import softplus

from .tiles import differentiable_once, float32_products, mm, room_in_dw, shares, tile, waiting, wide


def kl(h_s, w_s, h_t, w_t, temperature: float, kind: str, kept_bytes: int):
    """What minir1.ops.linear_kl returns, of arguments that fit each other."""
    one = len(tile(len(h_s), len(w_s), wide(h_s, w_s, h_t, w_t), h_s.device)[1]) == 1
    with float32_products(h_s):
        return (_Rows if one else _Tiles).apply(h_s, w_s, h_t.detach(), w_t.detach(), temperature, kind, kept_bytes)


class _Rows(torch.autograd.Function):
    """A small vocabulary: a tile holds whole rows, so that the slope, but for g, is known at once, and is kept."""

    @staticmethod
    def forward(ctx, h_s, w_s, h_t, w_t, temperature, kind, kept_bytes):
        N, V, dtype = len(h_s), len(w_s), wide(h_s, w_s, h_t, w_t)
        ctx.tokens = tile(N, V, dtype, h_s.device, models=2)[0]
        ctx.how = temperature, kind
        fit = kept_bytes // (V * dtype.itemsize)
        kept = h_s.new_empty(max((n.stop for n in ctx.tokens if n.stop <= fit), default=0), V, dtype=dtype)
        room = h_s.new_empty(2, ctx.tokens[0].stop if N else 0, V, dtype=dtype)
        found = h_s.new_empty(N, dtype=dtype)
        for n in ctx.tokens:
            lp = _log_softmax(room[:, : n.stop - n.start], ((h_s[n], w_s), (h_t[n], w_t)), temperature)
            found[n] = _row(lp, kind, kept[n] if n.stop <= len(kept) else None)
        ctx.save_for_backward(h_s, w_s, h_t, w_t, kept)
        return found

    @staticmethod
    @differentiable_once
    def backward(ctx, g):
        """dL/dz_s = g times the slope, which _row writes."""
        h, w, h_t, w_t, kept = ctx.saved_tensors
        want_h, want_w = ctx.needs_input_grad[:2]
        N, V, dtype, (temperature, kind) = len(h), len(w), kept.dtype, ctx.how
        dh = torch.empty_like(h, dtype=dtype) if want_h else None
        dw = torch.zeros_like(w, dtype=dtype) if want_w else None
        room = h.new_empty(1 if len(kept) == N else 3, ctx.tokens[0].stop if N else 0, V, dtype=dtype)
        w_, g = w if h.is_cuda else w.to(dtype), (g / temperature).unsqueeze(1)
        with float32_products(h):
            for n in ctx.tokens:
                dz, *lp = room[:, : n.stop - n.start]
                if n.stop <= len(kept):
                    slope = kept[n]
                else:
                    slope = dz
                    _row(_log_softmax(room[1:, : len(dz)], ((h[n], w), (h_t[n], w_t)), temperature), kind, slope)
                dx = torch.mul(slope, g[n], out=dz)
                dx = dx.to(h.dtype) if h.is_cuda else dx
                if want_h:
                    mm(dx, w_, dh[n])
                if want_w:
                    mm(dx.T, h[n], dw, add=n.start > 0)
        return dh.to(h.dtype) if want_h else None, dw.to(w.dtype) if want_w else None, *(None,) * 5


def _log_softmax(room, models, temperature):
    """log p [2, n, V] of the two (h [n, D], w [V, D]), in room."""
    for out, (h, w) in zip(room, models):
        mm(h, w.T, out)
    return torch.log_softmax(room if temperature == 1 else room.div_(temperature), 2, out=room)


def _row(lp, kind: str, slope):
    """The divergence [n], from log-probs [2, n, V] of student and teacher. Its derivative by the student's logits,

        forward  p_s - p_t      reverse  p_s (log p_s - log p_t - KL)      js  ½ p_s (log p_s - log m - KL(p_s ‖ m))

    goes into slope [n, V], unless that is None.
    """
    if kind == "forward":
        p_t = lp[1].softmax(1)  # faster than exp
        if slope is not None:
            torch.softmax(lp[0], 1, out=slope).sub_(p_t)
        return torch.linalg.vecdot(p_t, lp[1] - lp[0])
    if kind == "reverse":
        p_s, d = lp[0].softmax(1), lp[0] - lp[1]
        found = own = torch.linalg.vecdot(p_s, d)
    else:
        (p_s, p_t), d, d_t = _against_mixture(lp)
        own = torch.linalg.vecdot(p_s, d)
        found = (own + torch.linalg.vecdot(p_t, d_t)) / 2
    if slope is not None:
        torch.mul(p_s, d - own[:, None], out=slope)
        if kind == "js":
            slope.div_(2)
    return found


class _Tiles(torch.autograd.Function):
    """A large vocabulary: each tile is normalised by itself, and its shares π of the two distributions are known at the
    end. Forward and reverse KL need no second pass (the chain rule)

        KL(p_t ‖ p_s) = Σ_tiles π_t (KL_tile + log π_t - log π_s)

    and js, whose mixture is not known before the shares, makes its tiles again, as far as they were not kept.
    """

    @staticmethod
    def forward(ctx, h_s, w_s, h_t, w_t, temperature, kind, kept_bytes):
        N, V = len(h_s), len(w_s)
        dtype = wide(h_s, w_s, h_t, w_t)
        ctx.tokens, ctx.words = tile(N, V, dtype, h_s.device, models=2)
        ctx.temperature, ctx.kind = temperature, kind
        ctx.dw = room_in_dw(w_s, dtype, ctx.tokens, 2, kept_bytes) if ctx.needs_input_grad[1] else None
        ctx.first_waits = ctx.dw is not None
        inputs, kept, left = (h_s, w_s, h_t, w_t), [], kept_bytes
        stat = h_s.new_empty(2, 2, len(ctx.words), N, dtype=dtype)  # max z, max lp of student and teacher
        part = h_s.new_zeros(len(ctx.words), N, dtype=dtype)
        for j, i, z in _tiles(ctx, inputs, (), dtype):
            n = ctx.tokens[i]
            if i == 0 and ctx.first_waits:
                z = waiting(ctx.dw, ctx.words[j], *z.shape).copy_(z)
            elif left >= z.nbytes:
                left -= z.nbytes
                z = z.clone()
                kept.append(z)
            else:
                left = 0  # a later, smaller tile might fit, but what is kept comes first
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
                (p_s, p_t), r_s, r_t = _against_mixture(z + log_share[:, j, n, None])
                kl_s[n] += torch.linalg.vecdot(p_s, r_s)
                kl_t[n] += torch.linalg.vecdot(p_t, r_t)
            kl, own = (kl_s + kl_t) / 2, kl_s
        else:
            a, b = log_share.flip(0) if kind == "forward" else log_share
            kl = own = (a.exp() * (part + a - b)).sum(0)
        ctx.save_for_backward(*inputs, log_share, own, *kept)
        return kl

    @staticmethod
    @differentiable_once
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
                    (p_s, _), r_s, _ = _against_mixture(z + log_share[:, j, n, None])
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


def _against_mixture(lp):
    """From log-probs [2, n, v] of student and teacher: probabilities [2, n, v], log (p_s / m) and log (p_t / m) [n, v].

    log (p_s / m) = log 2 - log (1 + e^d),  d = log p_t - log p_s,  which is finite where both are 0 in fp32.
    """
    d = lp[1] - lp[0]
    return lp.exp(), *(math.log(2) - softplus(x, threshold=40) for x in (d, -d))

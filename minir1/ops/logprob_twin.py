"""The twin of linear_logprob in torch, whose gradients are written by hand.

Autograd on [N, V] would be shorter and slower: here a tile stays in a core's cache from the product to what is taken
from it, forward as backward. Log-probs are kept for the backward pass as far as they may be, else made again.
"""
import torch
from torch import Tensor

from .tiles import differentiable_once, float32_products, mm, room_in_dw, shares, tile, waiting, wide


def logprob(h, w, target, temperature, softcap, logit_scale, entropy: bool, kept_bytes: int):
    """What minir1.ops.linear_logprob returns, of arguments that fit each other and targets that all count."""
    one = len(tile(len(h), len(w), wide(h, w), h.device)[1]) == 1
    with float32_products(h):
        return (_Rows if one else _Tiles).apply(h, w, target, temperature, softcap, logit_scale, entropy, kept_bytes)


def _logits(h, w, temperature, softcap, logit_scale, out) -> Tensor:
    """z [n, v] = softcap(logit_scale · h wᵀ) / temperature."""
    z = mm(h, w.T, out)
    if softcap is not None:
        return z.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
    return z if logit_scale == temperature else z.mul_(logit_scale / temperature)


def _through(dz, z, room, temperature, softcap, logit_scale) -> Tensor:
    """dL/d(h wᵀ) from dL/dz, in place:  dz / temperature · (1 - (softcap(x) / c)²) · logit_scale."""
    if softcap is not None:
        dz.mul_(torch.mul(z, temperature / softcap, out=room).square_().neg_().add_(1))
    return dz if logit_scale == temperature else dz.mul_(logit_scale / temperature)


class _Rows(torch.autograd.Function):
    """A small vocabulary: a tile holds whole rows, and its log_softmax is theirs. With the entropy p is kept too."""

    @staticmethod
    def forward(ctx, h, w, target, temperature, softcap, logit_scale, entropy, kept_bytes):
        N, V, dtype = len(h), len(w), wide(h, w)
        ctx.tokens, ctx.how = tile(N, V, dtype, h.device)[0], (temperature, softcap, logit_scale)
        room = [1 + entropy, ctx.tokens[0].stop if N else 0, V]
        fit = 0 if softcap is not None else kept_bytes // (room[0] * V * dtype.itemsize)  # tanh' needs the logits too
        fit = max((n.stop for n in ctx.tokens if n.stop <= fit), default=0)
        kept, room = h.new_empty(room[0], fit, V, dtype=dtype), None if fit == N else h.new_empty(room, dtype=dtype)
        logp, H = h.new_empty(N, 1, dtype=dtype), h.new_empty(N, dtype=dtype) if entropy else None
        place, w_ = target.unsqueeze(1), w if h.is_cuda else w.to(dtype)
        for n in ctx.tokens:
            lp, *p = kept[:, n] if n.stop <= fit else room[:, : n.stop - n.start]
            torch.log_softmax(_logits(h[n], w_, *ctx.how, out=lp), 1, out=lp)  # a row is read before it is written
            torch.gather(lp, 1, place[n], out=logp[n])
            if entropy:  # softmax is faster than exp
                torch.linalg.vecdot(torch.softmax(lp, 1, out=p[0]), lp, out=H[n])
        ctx.save_for_backward(h, w, place, H.neg_() if entropy else None, kept)
        ctx.set_materialize_grads(False)
        return logp.squeeze(1), H

    @staticmethod
    @differentiable_once
    def backward(ctx, g, g_H):
        """dz_v = g (1[v=t] - p_v) - g_H p_v (log p_v + H)"""
        if g is None and g_H is None:
            return (None,) * 8
        h, w, place, H, kept = ctx.saved_tensors
        want_h, want_w = ctx.needs_input_grad[:2]
        fit, dtype = kept.shape[1], kept.dtype
        dh = torch.empty_like(h, dtype=dtype) if want_h else None
        dw = torch.zeros_like(w, dtype=dtype) if want_w else None
        room = h.new_empty(1 if fit == len(h) else 3, ctx.tokens[0].stop if len(h) else 0, len(w), dtype=dtype)
        w_ = w if h.is_cuda else w.to(dtype)
        g = None if g is None else g.unsqueeze(1)
        if g_H is not None:  # dz = p (slope · log p + level), but for the target
            slope = g_H.neg().unsqueeze_(1)
            level = slope * H.unsqueeze(1) if g is None else slope * H.unsqueeze(1) - g
        with float32_products(h):
            for n in ctx.tokens:
                dz, *spare = room[:, : n.stop - n.start]
                z, lp, *p = (None, *kept[:, n]) if n.stop <= fit else spare
                if z is not None:
                    torch.log_softmax(_logits(h[n], w_, *ctx.how, out=z), 1, out=lp)
                p, b = (p[0], dz) if p else (torch.softmax(lp, 1, out=dz), lp)
                torch.mul(p, -g[n] if g_H is None else torch.mul(lp, slope[n], out=b).add_(level[n]), out=dz)
                if g is not None:
                    dz.scatter_add_(1, place[n], g[n])
                dx = _through(dz, z, lp, *ctx.how)
                dx = dx.to(h.dtype) if h.is_cuda else dx
                if want_h:
                    mm(dx, w_, dh[n])
                if want_w:
                    mm(dx.T, h[n], dw, add=n.start > 0)
        return None if dh is None else dh.to(h.dtype), None if dw is None else dw.to(w.dtype), *(None,) * 6


class _Tiles(torch.autograd.Function):
    """A large vocabulary. Words are the outer loop, so that a piece of w and of dw stays in the cache too. The first
    tile of each piece waits for the backward pass in the memory of its dw.

    A tile is normalised by itself, lp = log_softmax(z) over its words, and then has the share π of all mass:

        log p_v = lp_v + log π,     H = Σ_tiles π (H_tile - log π)       (the chain rule of entropy)
    """

    @staticmethod
    def forward(ctx, h, w, target, temperature, softcap, logit_scale, entropy, kept_bytes):
        N, V = len(h), len(w)
        dtype = wide(h, w)
        ctx.tokens, ctx.words = tile(N, V, dtype, h.device)
        ctx.how = temperature, softcap, logit_scale
        stat = h.new_empty(3, len(ctx.words), N, dtype=dtype)  # max z, max lp, -H of each tile
        z_t, kept = h.new_full((N,), float("nan"), dtype=dtype), []
        left = kept_bytes if softcap is None else 0  # tanh' needs the logits beside the log-probs
        ctx.dw = room_in_dw(w, dtype, ctx.tokens, 1, left) if ctx.needs_input_grad[1] else None
        ctx.first_waits = ctx.dw is not None
        room = _room(2, ctx, h, dtype)
        for j, v in enumerate(ctx.words):
            w_v = w[v] if h.is_cuda else w[v].to(dtype)
            for i, n in enumerate(ctx.tokens):
                lp, p = room[:, : n.stop - n.start, : v.stop - v.start]
                if i == 0 and ctx.first_waits:
                    lp = waiting(ctx.dw, v, *lp.shape)
                elif left >= lp.nbytes:
                    left -= lp.nbytes
                    lp = torch.empty_like(lp)
                    kept.append(lp)
                else:
                    left = 0  # a later, smaller tile might fit, but what is kept comes first
                _logits(h[n], w_v, *ctx.how, out=lp)
                _read(lp, p, target[n], v, stat[:, j, n], z_t[n], entropy)
        logp, ent, log_share = _merge(stat, z_t, entropy)
        ctx.save_for_backward(h, w, target, ent, log_share, *kept)
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    @differentiable_once
    def backward(ctx, g, g_H):
        """dh [N, D] is summed over pieces of words, dw [V, D] over pieces of tokens; _slope is what a tile adds."""
        if g is None and g_H is None:
            return (None,) * 8
        h, w, target, ent, log_share, *kept = ctx.saved_tensors
        want_h, want_w = ctx.needs_input_grad[:2]
        dtype, kept = log_share.dtype, iter(kept)
        dh = torch.empty_like(h, dtype=dtype) if want_h else None  # summed in fp32, rounded once
        dw, there = ctx.dw, ctx.dw is not None
        if want_w:
            ctx.dw = None  # it is given away: a second walk finds nothing there
            dw = dw if there else torch.empty_like(w) if len(h) else torch.zeros_like(w)
        room = _room(3, ctx, h, dtype)
        with float32_products(h):
            for j, v in enumerate(ctx.words):
                w_v = w[v] if h.is_cuda else w[v].to(dtype)
                if want_w:
                    dw_v = dw[v] if dw.dtype == dtype else torch.empty_like(dw[v], dtype=dtype)
                for i, n in enumerate(ctx.tokens):
                    z, a, dx = room[:, : n.stop - n.start, : v.stop - v.start]
                    if i == 0 and ctx.first_waits:
                        lp = waiting(dw, v, *z.shape) if there else None
                    else:
                        lp = next(kept, None)
                    if lp is None:
                        lp = torch.log_softmax(_logits(h[n], w_v, *ctx.how, out=z), 1, out=a)
                    rows = [None if x is None else x[n] for x in (log_share[j], g, g_H, ent)]
                    dx = _slope(z, lp, target[n], v, *rows, *ctx.how, a, dx)
                    dx = dx.to(h.dtype) if h.is_cuda else dx
                    if want_h:
                        mm(dx, w_v, dh[n], add=j > 0)
                    if want_w:
                        mm(dx.T, h[n], dw_v, add=i > 0)
                if want_w and dw_v.dtype != dw.dtype:
                    dw[v] = dw_v
        return None if dh is None else dh.to(h.dtype), dw if want_w else None, *(None,) * 6


def _room(count: int, ctx, h, dtype) -> Tensor:
    """So many tiles of the largest size."""
    sizes = (max((x.stop - x.start for x in side), default=0) for side in (ctx.tokens, ctx.words))
    return h.new_empty(count, *sizes, dtype=dtype)


def _read(z, p, target, v, stat, z_t, entropy: bool) -> None:
    """Turns a tile z [n, v] of logits into its log-probs, in place, and writes what is to be known of it: max z, max lp
    (the mass of a tile is log Σ e^{z - max z} = -max lp) and -H, and the logit of a target that lies in it. p is room.
    """
    torch.amax(z, 1, out=stat[0])
    here, place = _at(target, v)
    z_t.copy_(torch.where(here, z.gather(1, place)[:, 0], z_t))
    lp = torch.log_softmax(z, 1, out=z)
    torch.amax(lp, 1, out=stat[1])
    if entropy:
        torch.linalg.vecdot(torch.softmax(lp, 1, out=p), lp, out=stat[2])


def _merge(stat, z_t, entropy: bool):
    """logp [N], entropy [N] or None, and log π [tiles, N]:  log π = (m_tile - m) + (log s_tile - log s)."""
    m, log_s, log_share = shares(stat[0], -stat[1])
    ent = -(log_share.exp() * (log_share + stat[2])).sum(0) if entropy else None
    return (z_t - m) - log_s, ent, log_share


def _slope(z, lp, target, v, log_share, g, g_H, ent, temperature, softcap, logit_scale, a, b) -> Tensor:
    """dL/d(h wᵀ) [n, v], from dL/dz_v = g (1[v=t] - p_v) - g_H p_v (log p_v + H). a and b are room; b is returned."""
    share, dz = log_share.exp(), torch.softmax(lp, 1, out=b)
    if g_H is None:
        dz.mul_((-g * share)[:, None])
    else:
        slope = -g_H * share
        level = slope * (log_share + ent) - (0 if g is None else g * share)
        dz.mul_(torch.mul(lp, slope[:, None], out=a).add_(level[:, None]))  # addcmul broadcasts slowly
    if g is not None:
        here, place = _at(target, v)
        dz.scatter_add_(1, place, torch.where(here, g, 0)[:, None])
    return _through(dz, z, a, temperature, softcap, logit_scale)


def _at(target, v: slice):
    """Whether each target is one of the words v, and its column [n, 1], any if not."""
    return (target >= v.start) & (target < v.stop), (target - v.start).clamp_(0, v.stop - v.start - 1)[:, None]

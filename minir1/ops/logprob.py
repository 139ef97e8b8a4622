"""Log-probability and entropy from hidden states and the vocabulary matrix: the twin, by tiles of tokens and words."""
import torch
from torch import Tensor

from .choose import use_triton
from .tiles import float32_products, mm, shares, tile, wants_grad, wide

ENGINES = ("auto", "hybrid", "fused")
CHUNK_BYTES = 48 << 20  # of logits that the twin keeps for the backward pass; what does not fit is made again


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
    batch. chunk_bytes: how much of [N, V] is held. The twin keeps that much of the logits for the backward pass (None:
    48 MiB) and makes the others again there; Triton keeps none, and holds that much of their gradients (128 MiB).
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
        kept_bytes = (chunk_bytes or CHUNK_BYTES) if wants_grad(h, w) else 0
        with float32_products(h):
            logp, ent = _LinearLogprob.apply(h, w, target, temperature, softcap, logit_scale, entropy, kept_bytes)
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


class _LinearLogprob(torch.autograd.Function):
    """The twin, with one hand-written derivation whether the log-probs are kept or made again. Autograd on [N, V]
    would be shorter and slower: here a tile stays in a core's cache from the product to what is taken from it, forward
    as backward. Words are the outer loop, so that a piece of w and of dw stays there too.

    A tile is normalised by itself, lp = log_softmax(z) over its words, and then has the share π of all mass:

        log p_v = lp_v + log π,     H = Σ_tiles π (H_tile - log π)       (the chain rule of entropy)
    """

    @staticmethod
    def forward(ctx, h, w, target, temperature, softcap, logit_scale, entropy, chunk_bytes):
        N, V = len(h), len(w)
        dtype = wide(h, w)
        ctx.tokens, ctx.words = tile(N, V, dtype, h.device)
        ctx.how, ctx.alone = (temperature, softcap, logit_scale), len(ctx.words) == 1
        stat = h.new_empty(3, len(ctx.words), N, dtype=dtype)  # max z, max lp, -H of each tile
        z_t, kept = h.new_full((N,), float("nan"), dtype=dtype), []
        left = chunk_bytes if softcap is None else 0  # tanh' needs the logits beside the log-probs
        room = _room(2, ctx, h, dtype)
        for j, v in enumerate(ctx.words):
            w_v = w[v] if h.is_cuda else w[v].to(dtype)
            for n in ctx.tokens:
                lp, p = room[:, : n.stop - n.start, : v.stop - v.start]
                left -= lp.nbytes
                if left >= 0:
                    lp = torch.empty_like(lp)
                    kept.append(lp)
                _logits(h[n], w_v, *ctx.how, out=lp)
                _read(lp, p, target[n], v, stat[:, j, n], z_t[n], entropy, ctx.alone)
        logp, ent, log_share = _merge(stat, z_t, entropy)
        ctx.save_for_backward(h, w, target, ent, log_share, *kept)
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_H):
        if g is None and g_H is None:
            return (None,) * 8
        h, w, target, ent, log_share, *kept = ctx.saved_tensors
        want_h, want_w = ctx.needs_input_grad[:2]
        dtype, kept = log_share.dtype, iter(kept)
        dh = torch.empty_like(h, dtype=dtype) if want_h else None  # summed in fp32, rounded once
        dw = (torch.empty_like(w) if len(h) else torch.zeros_like(w)) if want_w else None
        room = _room(3, ctx, h, dtype)
        with float32_products(h):
            for j, v in enumerate(ctx.words):
                w_v = w[v] if h.is_cuda else w[v].to(dtype)
                dw_v = None if dw is None else dw[v] if dw.dtype == dtype else torch.empty_like(dw[v], dtype=dtype)
                for i, n in enumerate(ctx.tokens):
                    z, a, dx = room[:, : n.stop - n.start, : v.stop - v.start]
                    lp = next(kept, None)
                    if lp is None:
                        lp = torch.log_softmax(_logits(h[n], w_v, *ctx.how, out=z), 1, out=a)
                    rows = [None if x is None else x[n] for x in (log_share[j], g, g_H, ent)]
                    dx = _slope(z, lp, target[n], v, *rows, *ctx.how, a, dx, ctx.alone)
                    dx = dx.to(h.dtype) if h.is_cuda else dx
                    if want_h:
                        mm(dx, w_v, dh[n], add=j > 0)
                    if want_w:
                        mm(dx.T, h[n], dw_v, add=i > 0)
                if want_w and dw_v.dtype != dw.dtype:
                    dw[v] = dw_v
        return None if dh is None else dh.to(h.dtype), dw, *(None,) * 6


def _room(count: int, ctx, h, dtype) -> Tensor:
    """So many tiles of the largest size."""
    sizes = (max((x.stop - x.start for x in side), default=0) for side in (ctx.tokens, ctx.words))
    return h.new_empty(count, *sizes, dtype=dtype)


def _logits(h, w, temperature, softcap, logit_scale, out) -> Tensor:
    """z [n, v] = softcap(logit_scale · h wᵀ) / temperature."""
    z = mm(h, w.T, out)
    if softcap is not None:
        return z.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
    return z if logit_scale == temperature else z.mul_(logit_scale / temperature)


def _read(z, p, target, v, stat, z_t, entropy: bool, alone: bool) -> None:
    """Turns a tile z [n, v] of logits into its log-probs, in place, and writes what is to be known of it: max z, max lp
    (the mass of a tile is log Σ e^{z - max z} = -max lp) and -H, and the logit of a target that lies in it; that of a
    tile alone is its log-prob. p is room.
    """
    if not alone:
        torch.amax(z, 1, out=stat[0])
        here, place = _at(target, v, alone)
        z_t.copy_(torch.where(here, z.gather(1, place)[:, 0], z_t))
    lp = torch.log_softmax(z, 1, out=z)  # a row is read before it is written
    if alone:
        z_t.copy_(lp.gather(1, target[:, None])[:, 0])
    else:
        torch.amax(lp, 1, out=stat[1])
    if entropy:
        torch.linalg.vecdot(torch.softmax(lp, 1, out=p), lp, out=stat[2])  # softmax is faster than exp


def _merge(stat, z_t, entropy: bool):
    """logp [N], entropy [N] or None, and log π [tiles, N]:  log π = (m_tile - m) + (log s_tile - log s)."""
    if stat.shape[1] == 1:
        return z_t, -stat[2, 0] if entropy else None, torch.zeros_like(stat[0])
    m, log_s, log_share = shares(stat[0], -stat[1])
    ent = -(log_share.exp() * (log_share + stat[2])).sum(0) if entropy else None
    return (z_t - m) - log_s, ent, log_share


def _slope(z, lp, target, v, log_share, g, g_H, ent, temperature, softcap, logit_scale, a, b, alone) -> Tensor:
    """dL/d(h wᵀ) [n, v]: dL/dz_v = g (1[v=t] - p_v) - g_H p_v (log p_v + H), then through temperature, softcap, scale:
    dz / temperature · (1 - (softcap(x) / c)²) · logit_scale. a and b are room; b is returned.
    """
    share, dz = log_share.exp(), torch.softmax(lp, 1, out=b)
    if g_H is None:
        dz.mul_((-g * share)[:, None])
    else:
        slope = -g_H * share
        level = slope * (log_share + ent) - (0 if g is None else g * share)
        dz.mul_(torch.mul(lp, slope[:, None], out=a).add_(level[:, None]))  # addcmul broadcasts slowly
    if g is not None:
        here, place = _at(target, v, alone)
        dz.scatter_add_(1, place, (g if here is None else torch.where(here, g, 0))[:, None])
    if softcap is not None:
        dz.mul_(torch.mul(z, temperature / softcap, out=a).square_().neg_().add_(1))
    return dz if logit_scale == temperature else dz.mul_(logit_scale / temperature)


def _at(target, v: slice, alone: bool):
    """Whether each target is one of the words v, and its column [n, 1], any if not; in a tile alone every one is."""
    if alone:
        return None, target[:, None]
    return (target >= v.start) & (target < v.stop), (target - v.start).clamp_(0, v.stop - v.start - 1)[:, None]

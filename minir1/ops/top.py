"""Log-probs of several tokens at each position, without logits for all positions at once."""
import torch
from torch import Tensor

from .checks import check_numbers
from .chunks import factor, mm, no_autocast, refuse_second_derivative, token_chunks, upcast, without_infinities


def linear_top(
    h: Tensor, w: Tensor, ids: Tensor, temperature: float = 1.0, *, chunk_bytes: int | None = None
) -> Tensor:
    """log p_v of k tokens v at each of N positions, p = softmax(h wᵀ / temperature): fp32 [N, k] (fp64 if an input is).

        dz = (onehot(ids) g - p Σ_k g) / temperature

    h [N, D], w [V, D], ids int64 [N, k] in 0 … V - 1. Differentiable in h and w, once. chunk_bytes: of the logits in
    memory at a time (None: 32 MiB, but at least 256 tokens). ValueError for shapes that do not fit.
    """
    if h.dim() != 2 or w.dim() != 2 or h.shape[1] != w.shape[1] or ids.dim() != 2 or len(ids) != len(h):
        raise ValueError(f"h {tuple(h.shape)}, w {tuple(w.shape)}, ids {tuple(ids.shape)}: want [N, D], [V, D], [N, k]")
    check_numbers(temperature=temperature, chunk_bytes=chunk_bytes)
    with no_autocast(h):
        return _LinearTop.apply(h, w, ids, temperature, chunk_bytes)


def log_softmax_into(h: Tensor, w: Tensor, temperature: float, out: Tensor) -> Tensor:
    """log softmax(h wᵀ / temperature), [n, V], in the memory and the dtype of `out`."""
    z = mm(h, w.T, out)
    return torch.log_softmax(z if temperature == 1 else z.div_(temperature), 1, out=z)


class _LinearTop(torch.autograd.Function):
    """Chunk by chunk of positions; the backward pass computes the logits of each chunk again."""

    @staticmethod
    def forward(ctx, h, w, ids, temperature, chunk_bytes):
        dtype = upcast(h, w)
        ctx.chunks, ctx.temperature = token_chunks(len(h), len(w), dtype, chunk_bytes), temperature
        ctx.save_for_backward(h, w, ids)
        lp, matrix = h.new_empty(ids.shape, dtype=dtype), factor(w, dtype)
        buffer = h.new_empty(ctx.chunks[0].stop, len(w), dtype=dtype)
        for n in ctx.chunks:
            torch.gather(log_softmax_into(h[n], matrix, temperature, buffer[: n.stop - n.start]), 1, ids[n], out=lp[n])
        return lp

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivative()
        h, w, ids = ctx.saved_tensors
        dtype, matrix = g.dtype, factor(w, g.dtype)
        dh, dw = (torch.empty_like(x, dtype=dtype) if want else None for x, want in zip((h, w), ctx.needs_input_grad))
        finite = without_infinities(matrix) if dh is not None else None
        buffer = h.new_empty(ctx.chunks[0].stop, len(w), dtype=dtype)
        with no_autocast(h):
            for n in ctx.chunks:
                lp = log_softmax_into(h[n], matrix, ctx.temperature, buffer[: n.stop - n.start])
                slope = g[n] / ctx.temperature
                dz = torch.exp(lp, out=lp).mul_(-slope.sum(1, keepdim=True)).scatter_add_(1, ids[n], slope)
                dz = dz.to(h.dtype) if h.is_cuda else dz
                if dh is not None:
                    mm(dz, finite, out=dh[n])
                if dw is not None:
                    mm(dz.T, h[n], out=dw, add=n is not ctx.chunks[0])
        return None if dh is None else dh.to(h.dtype), None if dw is None else dw.to(w.dtype), None, None, None

"""Tiles of [N, V], and products whose result is never rounded to 16 bits."""
import contextlib
import math

import torch
from torch import Tensor

# tokens, words: of fp32, a tile is as large as the level-2 cache of a core, or most of that of a GPU
TILE = {"cpu": (512, 512), "cuda": (4096, 2048)}


def wide(*tensors: Tensor) -> torch.dtype:
    """What logits, statistics and sums are kept in: fp64 if one tensor is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def wants_grad(*tensors: Tensor) -> bool:
    """Whether a backward pass may come."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def cuts(length: int, step: int) -> list[slice]:
    """Pieces of one size, at most `step`; the last may be smaller."""
    step = -(-length // -(-length // step)) if length else 1
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def tile(
    N: int, V: int, dtype: torch.dtype, device: torch.device, models: int = 1
) -> tuple[list[slice], list[slice]]:
    """Where to cut N tokens and V words; a small vocabulary leaves room for more tokens, a second model for fewer."""
    rows, columns = TILE["cuda" if device.type == "cuda" else "cpu"]
    words = cuts(V, columns)
    width = max(v.stop - v.start for v in words)
    return cuts(N, rows * columns * 4 // (width * dtype.itemsize * models)), words


def room_in_dw(w: Tensor, dtype: torch.dtype, tokens: list[slice], planes: int, kept_bytes: int) -> Tensor | None:
    """dw [V, D], made before its time, if the first tile of each piece of words, of so many planes, fits where its dw
    will stand, and dw is at most twice what may be kept: each graph that waits for its backward pass holds its own.
    """
    fits = tokens and planes * tokens[0].stop <= w.shape[1] and w.nbytes <= 2 * kept_bytes
    return torch.empty(w.shape, dtype=dtype, device=w.device) if fits and w.dtype == dtype else None


def waiting(dw: Tensor, v: slice, *size: int) -> Tensor:
    """A tile of that size in the memory of dw[v], where it may wait until the gradient overwrites it."""
    return dw[v].view(-1)[: math.prod(size)].view(size)


def differentiable_once(backward):
    """For a backward pass without one of its own: RuntimeError under create_graph=True, which would go without it."""
    def run(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: what is made from hidden states has no second derivative here")
        return backward(ctx, *grads)

    return run


def float32_products(x: Tensor):
    """Autocast, which would round logits to 16 bits, is off inside."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def mm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, in the dtype of out: fp32 or fp64."""
    if a.is_cuda and a.dtype == b.dtype != out.dtype:
        product = torch.mm(a, b, out_dtype=out.dtype)
        return out.add_(product) if add else out.copy_(product)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def shares(top: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From each tile's max z and log Σ e^{z - max z} [tiles, N]:  m = max z and log Σ e^{z - m} over all [N], and the
    tile's share of the probability,  log π = (max z - m) + mass - log Σ e^{z - m}  [tiles, N].
    """
    m = top.amax(0)
    log_share = (top - m).add_(mass)
    log_s = log_share.exp().sum(0).log_()
    return m, log_s, log_share.sub_(log_s)

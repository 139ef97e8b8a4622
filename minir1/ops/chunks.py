"""What several operations share: chunks of tokens, and products that are not rounded to 16 bits and do not overflow."""
import contextlib

import torch
from torch import Tensor

CHUNK_BYTES, CHUNK_TOKENS = 32 << 20, 256  # of logits; with fewer tokens, loading w would dominate


def upcast(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits, log-probs and sums: fp64 if one tensor is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def token_chunks(N: int, V: int, dtype: torch.dtype, chunk_bytes: int | None) -> list[slice]:
    """Chunks of N tokens whose logits [n, V] take at most chunk_bytes (None: 32 MiB, but at least 256 tokens), of at
    least one token. For N = 0, one empty chunk."""
    tokens = (chunk_bytes or CHUNK_BYTES) // (V * dtype.itemsize)
    tokens = max(1 if chunk_bytes else CHUNK_TOKENS, tokens)
    return [slice(i, min(i + tokens, N)) for i in range(0, max(N, 1), tokens)]


def within_fp16(scale: float, *queries: Tensor) -> tuple:
    """The scale of q·k, and q; in fp16, whose largest number is 65,504, q is scaled before the product, not after."""
    return (1.0, *(q * scale for q in queries)) if queries[0].dtype == torch.float16 else (scale, *queries)


def factor(w: Tensor, dtype: torch.dtype) -> Tensor:
    """w for `mm`, upcast once instead of once per chunk; on CUDA as it is."""
    return w if w.is_cuda else w.to(dtype)


def without_infinities(w: Tensor) -> Tensor:
    """w with 0 for -∞, for a product with gradients of logits, which are 0 where a logit is -∞: 0·∞ would be NaN."""
    return w.masked_fill(w == -torch.inf, 0.0) if w.amin() == -torch.inf else w


def mm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, in the dtype of out, fp32 or fp64. On CUDA, 16-bit factors are multiplied as they
    are, with fp32 sums; elsewhere they are upcast."""
    if a.is_cuda and a.dtype == b.dtype != out.dtype:
        product = torch.mm(a, b, out_dtype=out.dtype)
        return out.add_(product) if add else out.copy_(product)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def no_autocast(x: Tensor):
    """A context without autocast, which would round logits to 16 bits."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)  # meta has no autocast, and asking is an error
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


def refuse_second_derivative() -> None:
    """Raise in a backward pass under create_graph=True. torch's once_differentiable would not where the upstream
    gradient is a constant, as that of a sum."""
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph=True: what is computed from hidden states has no second derivative here")

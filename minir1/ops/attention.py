"""Attention over packed sequences: by the kernel, or in torch, one sequence after the other."""
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_heads, check_numbers
from .chunks import upcast
from .dispatch import use_triton
from .reference import attention as by_definition
from .reference import visible

LARGEST_HEAD = 256  # of the kernels


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    *,
    impl: str = "auto",
    check: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention within each of B packed sequences.

        z_ij = softcap(scale · q_i·k_j),   softcap(x) = c · tanh(x / c)
        lse_i = log Σ_j exp z_ij,          o_i = Σ_j exp(z_ij - lse_i) v_j

    q [N, H, Dqk], k [M, K, Dqk], v [M, K, Dv] of one floating dtype, K dividing H; cu_q, cu_k int32 [B + 1]: sequence b
    has the queries cu_q[b] … cu_q[b + 1] - 1 and likewise the keys; max_q, max_k: at least the longest. scale: None is
    1/√Dqk. Returns o [N, H, Dv] in q's dtype, and lse [H, N] in fp32 (fp64 for fp64), which has no gradient.

    Query i of n over m keys has position i + m - n, so that the last query is aligned with the last key, as in
    FlashAttention (torch's is_causal aligns the first ones). A causal query sees the keys up to its position; with a
    window w, those less than w away from it. A query without visible keys has o = 0, lse = -inf and gradient 0.
    Sequences may be empty.

    ValueError names an argument that does not fit. Checking the values of cu_q and cu_k synchronises a GPU; check=False
    skips that. The kernel takes heads of up to 256 dimensions. torch computes one sequence after the other: with its
    fused attention on the CPU; on other devices, and with a softcap, with the scores [H, n, m] in memory.
    """
    _check(q, k, v, cu_q, cu_k, max_q, max_k)
    check_numbers(window=window, softcap=softcap)
    if check:
        _check_bounds("cu_q", cu_q, len(q), "max_q", max_q)
        _check_bounds("cu_k", cu_k, len(k), "max_k", max_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_triton(impl, q, k, v, unfit=too_large(q, v)):
        from minir1.kernels import attention as kernel  # lazily: triton may not be installed

        return kernel.attention(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, causal=causal, window=window,
                                softcap=softcap)
    return _packed(q, k, v, cu_q, cu_k, scale, causal, window, softcap)


def too_large(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels do not take these heads."""
    size = max(q.shape[-1], v.shape[-1])
    return f"its heads have up to {LARGEST_HEAD} numbers, not {size}" if size > LARGEST_HEAD else None


def _packed(q, k, v, cu_q, cu_k, scale, causal, window, softcap):
    bounds = zip(*(torch.stack((cu[:-1], cu[1:]), 1).tolist() for cu in (cu_q, cu_k)))
    results = [
        _one_sequence(q[i:j], k[m:n], v[m:n], scale, causal, window, softcap) for (i, j), (m, n) in bounds if j > i
    ]
    if not results:
        o = q.new_zeros(len(q), q.shape[1], v.shape[-1]) + (q.sum() + k[:0].sum() + v[:0].sum())  # gradients are 0
        return o, q.new_zeros(q.shape[1], len(q), dtype=upcast(q))
    return torch.cat([o for o, _ in results]), torch.cat([lse for _, lse in results], dim=1)


def _one_sequence(q, k, v, scale, causal, window, softcap):
    """q [n, H, Dqk], k [m, K, Dqk], v [m, K, Dv] -> o [n, H, Dv], lse [H, n]."""
    n, m = len(q), len(k)
    if m == 0:
        zeros = q[..., :0].sum(-1, keepdim=True)  # computed from q, whose gradient then is 0 and not None
        return zeros.expand(n, q.shape[1], v.shape[-1]), q.new_full((q.shape[1], n), -torch.inf, dtype=upcast(q))
    if q.device.type != "cpu" or softcap is not None:
        return by_definition(q, k, v, visible(n, m, causal, window, q.device), scale, softcap)
    return _fused(q, k, v, scale, causal, window)


def _fused(q, k, v, scale, causal, window):
    """torch's fused attention on the CPU, which needs q and v heads of one size and, without a mask, n = m."""
    n, m = len(q), len(k)
    plain = window is None and (not causal or n == m)
    size = max(q.shape[-1], v.shape[-1])
    q, k, value = (F.pad(x.transpose(0, 1).unsqueeze(0), (0, size - x.shape[-1])) for x in (q, k, v))
    mask = None if plain else visible(n, m, causal, window)
    bias = None if plain else torch.zeros(n, m, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    # The operator behind scaled_dot_product_attention, which does not return lse.
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, value, 0.0, plain and causal, attn_mask=bias, scale=scale
    )
    lse = lse[0].detach()
    return o[0, ..., : v.shape[-1]].transpose(0, 1), lse if plain else lse.masked_fill(~mask.any(1), -torch.inf)


def _check(q, k, v, cu_q, cu_k, max_q, max_k) -> None:
    if q.ndim != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q {tuple(q.shape)}: want [N, H, Dqk]")
    if k.ndim != 3 or k.shape[2] != q.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k {tuple(k.shape)}: want [M, K, {q.shape[2]}] with K dividing {q.shape[1]} heads")
    if v.ndim != 3 or v.shape[:2] != k.shape[:2] or v.shape[2] == 0:
        raise ValueError(f"v {tuple(v.shape)}: want [{k.shape[0]}, {k.shape[1]}, Dv]")
    check_heads(q=q, k=k, v=v)
    for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
        if cu.dtype != torch.int32 or cu.ndim != 1 or len(cu) == 0:
            raise ValueError(f"{name} {cu.dtype} {tuple(cu.shape)}: want int32 [B + 1]")
        if cu.device != q.device:
            raise ValueError(f"{name} is on {cu.device}, q on {q.device}: want one device")
    if len(cu_q) != len(cu_k):
        raise ValueError(f"cu_k has {len(cu_k)} numbers, cu_q {len(cu_q)}: want as many, one more than sequences")
    for name, longest in (("max_q", max_q), ("max_k", max_k)):
        if longest < 0:
            raise ValueError(f"{name}={longest}: must be at least the longest sequence")


def _check_bounds(name: str, cu: Tensor, tokens: int, max_name: str, longest: int) -> None:
    """ValueError unless cu rises from 0 to `tokens` by at most `longest` at a time."""
    bounds = cu.tolist()
    lengths = [b - a for a, b in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"{name} goes from {bounds[0]} to {bounds[-1]}: must go from 0 to {tokens}, the tokens")
    if lengths and min(lengths) < 0:
        raise ValueError(f"{name} falls, a sequence of length {min(lengths)}: {bounds[:16]}")
    if lengths and max(lengths) > longest:
        raise ValueError(f"{max_name}={longest}: the longest sequence of {name} has {max(lengths)}")

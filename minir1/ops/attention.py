"""Attention over packed sequences: the twin, sequence by sequence, and the way to the kernel."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .choose import use_triton

LARGEST_HEAD = 256  # numbers that a head may have for the kernels


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
    """Attention within each of B sequences that lie end to end.

        z_ij = softcap(scale · q_i·k_j),   softcap(x) = c · tanh(x / c)
        lse_i = log Σ_j exp z_ij,          o_i = Σ_j exp(z_ij - lse_i) v_j

    q [N, H, Dqk], k [M, K, Dqk], v [M, K, Dv] of one floating dtype, K dividing H; cu_q, cu_k int32 [B + 1]: sequence b
    holds the queries cu_q[b] … cu_q[b + 1] - 1 and likewise the keys; max_q, max_k: at least the longest. scale: None
    is 1/√Dqk. Returns o [N, H, Dv] in q's dtype, differentiable, and lse [H, N] in fp32 (fp64 for fp64), which is not.

    Query i of n over m keys stands at place i + m - n, so that the last query meets the last key (as in FlashAttention;
    torch's is_causal lets the first meet the first). Causal, it sees the keys up to its place; with a window w, those
    less than w away from it. A query that sees none has o = 0, lse = -inf and no gradient. Sequences may be empty.

    ValueError, naming the argument, for what does not fit. Looking into cu_q and cu_k stalls a GPU: check=False takes
    them as they are. Heads of up to 256 numbers have a kernel. On the CPU the twin is torch's fused attention, one
    sequence after the other; elsewhere, and with a softcap, it holds the scores of one sequence at a time, [H, n, m].
    """
    _check(q, k, v, cu_q, cu_k, max_q, max_k, window, softcap)
    if check:
        check_bounds("cu_q", cu_q, len(q), "max_q", max_q)
        check_bounds("cu_k", cu_k, len(k), "max_k", max_k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_triton(impl, q, k, v, unfit=too_large(q, v)):
        from minir1.kernels import attention as kernel  # lazily: triton may not be there

        return kernel.attention(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, causal=causal, window=window,
                                softcap=softcap)
    return _twin(q, k, v, cu_q, cu_k, scale, causal, window, softcap)


def too_large(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels do not take these heads."""
    size = max(q.shape[-1], v.shape[-1])
    return f"its heads have up to {LARGEST_HEAD} numbers, not {size}" if size > LARGEST_HEAD else None


# ---- the twin ----------------------------------------------------------------------------------


def _twin(q, k, v, cu_q, cu_k, scale, causal, window, softcap):
    bounds = zip(*(torch.stack((cu[:-1], cu[1:]), 1).tolist() for cu in (cu_q, cu_k)))
    found = [
        _one(q[i:j], k[m:n], v[m:n], scale, causal, window, softcap) for (i, j), (m, n) in bounds if j > i
    ]
    if not found:
        o = q.new_zeros(len(q), q.shape[1], v.shape[-1]) + (q.sum() + k[:0].sum() + v[:0].sum())  # gradients are 0
        return o, q.new_zeros(q.shape[1], len(q), dtype=_wide(q))
    return torch.cat([o for o, _ in found]), torch.cat([lse for _, lse in found], dim=1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _one(q, k, v, scale, causal, window, softcap):
    """One sequence: q [n, H, Dqk], k [m, K, Dqk], v [m, K, Dv] -> o [n, H, Dv], lse [H, n]."""
    n, m = len(q), len(k)
    if m == 0:
        zeros = q[..., :0].sum(-1, keepdim=True)  # and not new ones: they hang on q, and give it a gradient of 0
        return zeros.expand(n, q.shape[1], v.shape[-1]), q.new_full((q.shape[1], n), -torch.inf, dtype=_wide(q))
    if q.device.type != "cpu" or softcap is not None:
        return by_definition(q, k, v, visible(n, m, causal, window, q.device), scale, softcap)
    plain = window is None and (not causal or n == m)
    seen = None if plain else visible(n, m, causal, window, q.device)
    size = max(q.shape[-1], v.shape[-1])  # torch fuses heads of one size only
    q, k, value = (F.pad(x.transpose(0, 1).unsqueeze(0), (0, size - x.shape[-1])) for x in (q, k, v))
    bias = None if plain else torch.zeros(n, m, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    # The operator behind scaled_dot_product_attention, which does not give lse away.
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, value, 0.0, plain and causal, attn_mask=bias, scale=scale
    )
    lse = lse[0].detach()
    return o[0, ..., : v.shape[-1]].transpose(0, 1), lse if plain else lse.masked_fill(~seen.any(1), -torch.inf)


def visible(n: int, m: int, causal: bool, window: int | None, device) -> Tensor:
    """bool [n, m]: which of m keys each of n queries sees."""
    ahead = torch.arange(m, device=device) - (torch.arange(n, device=device) + m - n).unsqueeze(1)
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return seen if window is None else seen & (ahead.abs() < window)


def by_definition(q, k, v, seen, scale, softcap=None):
    """The equations of `attention` as they stand. q [n, H, Dqk], k [m, K, Dqk], v [m, K, Dv], seen [n, m] ->
    o [n, H, Dv], lse [H, n]."""
    q = q.unflatten(1, (k.shape[1], -1))  # [n, K, H/K, Dqk]
    z = torch.einsum("ikgd,jkd->kgij", q, k).to(_wide(q)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~seen, -torch.inf)
    p = z.softmax(-1).masked_fill(~seen.any(1, keepdim=True), 0.0).to(v.dtype)
    return torch.einsum("kgij,jkd->ikgd", p, v).flatten(1, 2), z.detach().logsumexp(-1).flatten(0, 1)


# ---- what is wrong with a call -----------------------------------------------------------------


def check_heads(**tensors: Tensor) -> None:
    """q, k and v: floats of one dtype on one device, none of them expanded."""
    (first, q), *_ = tensors.items()
    for name, x in tensors.items():
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, {first} {q.dtype}: want one floating dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, {first} on {q.device}: want one device")
        if x.numel() and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
            raise ValueError(f"{name} has stride 0 (strides {x.stride()} of {tuple(x.shape)}): give it memory with "
                             ".contiguous(), or one key head instead of an expanded one")


def check_numbers(window: int | None, softcap: float | None) -> None:
    """ValueError for a window below 1, and a softcap that is not above 0 and finite."""
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be at least 1, or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}: must be above 0 and finite, or None")


def _check(q, k, v, cu_q, cu_k, max_q, max_k, window, softcap) -> None:
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
    check_numbers(window, softcap)


def check_bounds(name: str, cu: Tensor, tokens: int, max_name: str, longest: int) -> None:
    """cu must rise from 0 to `tokens`, by at most `longest` at a time."""
    places = cu.tolist()
    lengths = [b - a for a, b in zip(places, places[1:])]
    if places[0] != 0 or places[-1] != tokens:
        raise ValueError(f"{name} goes from {places[0]} to {places[-1]}: must go from 0 to {tokens}, the tokens")
    if lengths and min(lengths) < 0:
        raise ValueError(f"{name} falls, a sequence of length {min(lengths)}: {places[:16]}")
    if lengths and max(lengths) > longest:
        raise ValueError(f"{max_name}={longest}: the longest sequence of {name} has {max(lengths)}")

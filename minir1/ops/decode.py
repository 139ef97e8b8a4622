"""Attention of new tokens over a cache: by the kernel or in torch."""
import torch
from torch import Tensor

from .attention import too_large
from .checks import check_heads, check_numbers
from .chunks import within_fp16
from .dispatch import use_triton

LARGEST_LATENT = 512  # of the kernel


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    *,
    impl: str = "auto",
    check: bool = True,
) -> Tensor:
    """Attention of the new tokens of each row over the slots of its cache, which already contain theirs.

        o = Σ_j exp(z_j - lse) v_j,   z_j = softcap(scale · q·k_j),   lse = log Σ_j exp z_j

    q [B, T, H, Dqk], k [B, M, K, Dqk], v [B, M, K, Dv] of one floating dtype, K dividing H; past, an integer [B]: the
    tokens of row b before the new ones, so that new token t is in slot past[b] + t. It sees the slots up to its own,
    with a window w the last w of them. scale: None is 1/√Dqk. Returns o [B, T, H, Dv] in q's dtype.

    ValueError names an argument that does not fit. Checking the values of past synchronises a GPU; check=False skips
    that. The kernel has no backward pass: with impl="auto", calls that need gradients run in torch.
    """
    if q.ndim != 4 or 0 in q.shape[2:]:
        raise ValueError(f"q {tuple(q.shape)}: want [B, T, H, Dqk]")
    if k.ndim != 4 or k.shape[::3] != q.shape[::3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k {tuple(k.shape)}: want [{q.shape[0]}, M, K, {q.shape[3]}] with K dividing {q.shape[2]}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise ValueError(f"v {tuple(v.shape)}: want [{k.shape[0]}, {k.shape[1]}, {k.shape[2]}, Dv]")
    check_heads(q=q, k=k, v=v)
    check_numbers(window=window, softcap=softcap)
    _check_past(past, q, k.shape[1], check)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_triton(impl, q, k, v, unfit=too_large(q, v) or _wants_gradient(q, k, v)):
        from minir1.kernels import decode as kernel  # lazily: triton may not be installed

        return kernel.decode(q, k, v, past, scale=scale, window=window, softcap=softcap)
    return over_slots(q, k, v, slot_bias(past, q.shape[1], k.shape[1], window), scale, softcap)


def decode_latent(
    q_lat: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    past: Tensor,
    scale: float,
    *,
    impl: str = "auto",
    check: bool = True,
) -> Tensor:
    """`decode_attention` over MLA's cache of one latent c and one RoPE key k per token; W^UK is absorbed in the query.

        z_j = scale · (q_lat·c_j + q_rope·k_j),   o = Σ_j exp(z_j - lse) c_j      DeepSeek-V2, arXiv:2405.04434, 2.1

    q_lat [B, T, H, C], q_rope [B, T, H, R], latent [B, M, C + R] (c, then k) of one floating dtype; past as above ->
    o [B, T, H, C]. The kernel takes C a power of two from 16 to 512, and R up to 256.
    """
    if q_lat.ndim != 4 or 0 in q_lat.shape[2:]:
        raise ValueError(f"q_lat {tuple(q_lat.shape)}: want [B, T, H, C]")
    if q_rope.ndim != 4 or q_rope.shape[:3] != q_lat.shape[:3] or q_rope.shape[3] == 0:
        raise ValueError(f"q_rope {tuple(q_rope.shape)}: want {[*q_lat.shape[:3]]} and R")
    C, R = q_lat.shape[3], q_rope.shape[3]
    if latent.ndim != 3 or latent.shape[0] != q_lat.shape[0] or latent.shape[2] != C + R:
        raise ValueError(f"latent {tuple(latent.shape)}: want [{q_lat.shape[0]}, M, {C + R}]")
    check_heads(q_lat=q_lat, q_rope=q_rope, latent=latent)
    _check_past(past, q_lat, latent.shape[1], check)
    unfit = None
    if C & (C - 1) or not 16 <= C <= LARGEST_LATENT or R > 256:
        unfit = f"its latent is a power of two from 16 to {LARGEST_LATENT}, its RoPE key at most 256, not {C} and {R}"
    if use_triton(impl, q_lat, q_rope, latent, unfit=unfit or _wants_gradient(q_lat, q_rope, latent)):
        from minir1.kernels import decode as kernel  # lazily: triton may not be installed

        return kernel.decode_latent(q_lat, q_rope, latent, past, scale=scale)
    k = latent.unsqueeze(2)
    bias = slot_bias(past, q_lat.shape[1], latent.shape[1])
    return over_slots(torch.cat((q_lat, q_rope), -1), k, k[..., :C], bias, scale)


def slot_bias(past: Tensor, new: int, slots: int, window: int | None = None) -> Tensor:
    """fp32 [B, T, M]: 0 where a new token sees a slot, -inf elsewhere."""
    own = (past.unsqueeze(1) + torch.arange(new, device=past.device)).unsqueeze(-1)  # the token's slot, [B, T, 1]
    slot = torch.arange(slots, device=past.device)
    hidden = slot > own
    if window is not None:
        hidden = hidden | (slot <= own - window)
    return torch.zeros(hidden.shape, device=past.device).masked_fill_(hidden, -torch.inf)


def over_slots(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """q [B, T, H, Dqk], k [B, M, K, Dqk], v [B, M, K, Dv], bias [B, T, M] -> o [B, T, H, Dv]; softmax in fp32 (fp64 for
    fp64). All queries that share a key head are the rows of one product."""
    B, T, H, _ = q.shape
    M, K = k.shape[1:3]
    scale, q = within_fp16(scale, q)
    q = q.unflatten(2, (K, H // K)).permute(0, 2, 1, 3, 4).reshape(B * K, T * (H // K), q.shape[-1])
    k, v = (x.transpose(1, 2).flatten(0, 1) if K > 1 else x.squeeze(2) for x in (k, v))  # [B K, M, D]
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, K, T, H // K, M)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if softcap is not None:
        scores, scale = torch.tanh(scores * (scale / softcap)), softcap
    scores = torch.add(bias[:, None, :, None], scores, alpha=scale)
    p = scores.softmax(-1).to(v.dtype).view(B * K, T * (H // K), M)
    out = torch.bmm(p, v).view(B, K, T, H // K, v.shape[-1])
    return out.permute(0, 2, 1, 3, 4).reshape(B, T, H, v.shape[-1])


def _wants_gradient(*tensors: Tensor) -> str | None:
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return "it has no backward: decode under torch.no_grad()" if wanted else None


def _check_past(past: Tensor, q: Tensor, slots: int, check: bool) -> None:
    if past.shape != q.shape[:1] or past.is_floating_point() or past.dtype == torch.bool:
        raise ValueError(f"past {past.dtype} {tuple(past.shape)}: want an integer for each of {q.shape[0]} rows")
    if past.device != q.device:
        raise ValueError(f"past is on {past.device}, q on {q.device}: want one device")
    if check and past.numel():
        low, high = (int(x) for x in past.aminmax())
        if low < 0 or high + q.shape[1] > slots:
            raise ValueError(f"past in [{low}, {high}]: with {q.shape[1]} new tokens it must lie in 0 to "
                             f"{slots - q.shape[1]}, since there are {slots} slots")

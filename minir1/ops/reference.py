"""Reference implementations: each operation by its definition, in plain torch.

They compute in the dtype of their inputs, with all logits and scores in memory, and autograd differentiates them. The
implementations in torch (`minir1.ops`) and in Triton (`minir1.kernels`) must agree with them.
"""
import math

import torch
from torch import Tensor

from .chunks import within_fp16


def linear_logprob(h, w, target, temperature=1.0, softcap=None, logit_scale=1.0) -> tuple[Tensor, Tensor]:
    """h [N, D], w [V, D], target [N] in 0 … V - 1 -> logp [N] of the targets, entropy [N]."""
    z = logit_scale * (h @ w.T)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lp = torch.log_softmax(z / temperature, -1)
    return lp.gather(1, target[:, None])[:, 0], -(lp.exp() * lp.clamp(min=-1e4)).sum(-1)  # 0 log 0 = 0


def linear_kl(h_s, w_s, h_t, w_t, temperature=1.0, kind="forward", beta=0.5) -> Tensor:
    """Student h_s [N, D_s], w_s [V, D_s] and teacher h_t [N, D_t], w_t [V, D_t] -> divergence [N]."""
    s, t = (torch.log_softmax(h @ w.T / temperature, -1) for h, w in ((h_s, w_s), (h_t, w_t)))
    if kind == "forward":
        return (t.exp() * (t - s).masked_fill(t.exp() == 0, 0.0)).sum(-1)
    if kind == "reverse":
        return (s.exp() * (s - t).masked_fill(s.exp() == 0, 0.0)).sum(-1)
    s, t = s.clamp(min=-1e4), t.clamp(min=-1e4)
    m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))  # the mixture of "js"
    return (1 - beta) * (s.exp() * (s - m)).sum(-1) + beta * (t.exp() * (t - m)).sum(-1)


def visible(n: int, m: int, causal: bool, window: int | None, device: torch.device | str = "cpu") -> Tensor:
    """bool [n, m]: which of m keys each of n queries sees; the last query is aligned with the last key."""
    ahead = torch.arange(m, device=device) - (torch.arange(n, device=device) + m - n).unsqueeze(1)
    mask = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    return mask if window is None else mask & (ahead.abs() < window)


def attention(q, k, v, mask, scale, softcap=None) -> tuple[Tensor, Tensor]:
    """One sequence: q [n, H, Dqk], k [m, K, Dqk], v [m, K, Dv], mask [n, m] -> o [n, H, Dv], lse [H, n] (no gradient).

    The softmax is computed in fp32, or in fp64 for fp64.
    """
    scale, q = within_fp16(scale, q.unflatten(1, (k.shape[1], -1)))  # [n, K, H/K, Dqk]
    z = torch.einsum("ikgd,jkd->kgij", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~mask, -torch.inf)
    p = z.softmax(-1).masked_fill(~mask.any(1, keepdim=True), 0.0).to(v.dtype)
    return torch.einsum("kgij,jkd->ikgd", p, v).flatten(1, 2), z.detach().logsumexp(-1).flatten(0, 1)


def decode_attention(q, k, v, past, scale, window=None, softcap=None) -> Tensor:
    """q [B, T, H, Dqk] over a cache k [B, M, K, Dqk], v [B, M, K, Dv] whose row b has past[b] + T tokens ->
    o [B, T, H, Dv]."""
    T, rows = q.shape[1], []
    for b, m in enumerate((past + T).tolist()):
        o, _ = attention(q[b], k[b, :m], v[b, :m], visible(T, m, True, window, q.device), scale, softcap)
        rows.append(o)
    return torch.stack(rows)


def decode_latent(q_lat, q_rope, latent, past, scale) -> Tensor:
    """q_lat [B, T, H, C], q_rope [B, T, H, R], latent [B, M, C + R] -> o [B, T, H, C]: one key head, whose value is the
    first part of its key."""
    k = latent.unsqueeze(2)
    return decode_attention(torch.cat((q_lat, q_rope), -1), k, k[..., : q_lat.shape[-1]], past, scale)

"""Divergence of a student from a teacher over the whole vocabulary, from hidden states, without [N, V].

    z = h wᵀ / temperature,   m = max_v z_v,   s = Σ_v exp(z_v - m),   log p_v = (z_v - m) - log s   of either model
    KL(p_a ‖ p_b) = u / s_a + log s_b - log s_a,   u = Σ_v exp(z_av - m_a) · ((z_av - m_a) - (z_bv - m_b))

    forward   KL(p_t ‖ p_s)                                        dz_s = g (p_s - p_t)
    reverse   KL(p_s ‖ p_t)                                        dz_s = g p_s (log p_s - log p_t - KL)
    js        (1-β) KL(p_s ‖ m) + β KL(p_t ‖ m)                    dz_s = (1-β) g p_s (log p_s - log m - KL(p_s ‖ m))
              with the mixture m = (1-β) p_s + β p_t

As in logprob.py's hybrid engine, torch.mm writes fp32 tiles of logits, here one of each model, which fit the L2 cache
together, and a kernel folds them into five numbers per token, (m_a, s_a, m_b, s_b, u), tile by tile in order: there are
no atomics, and a repeated call gives the same bits. u sums logits shifted by their maxima, since lse_a - lse_b would
lose the digits of large ones; so it changes with either maximum (see _merge). The mixture of js needs both normalisers:
its tiles are computed a second time, and log (p_s / m) = -log (1-β) - log (1 + e^x)
with x = log p_t - log p_s + log β/(1-β).

The backward pass recomputes both tiles and replaces them by dx; two products follow, as for the log-prob. The teacher
is a constant.
"""
import torch
import triton

from . import kl_jit as jit
from .logprob import DX_BYTES, INTERPRET, _cuts, _mm, _two_products
from .once import refuse_second_derivative

FOLD = dict(BLOCK_N=4, BLOCK_V=256, num_warps=4)  # 64 registers: 132 SMs run the 1024 blocks of a tile at once
TILE_N, TILE_V = 4096, 1024  # of fp32 logits, twice: 33 MB, which fit L2
if INTERPRET:  # several of each in a test
    FOLD = dict(BLOCK_N=64, BLOCK_V=64)
    TILE_N, TILE_V = 96, 96


def _pair(models, n: slice, v: slice):
    """h wᵀ [n, v] in fp32 of either model."""
    return [_mm(h[n], w[v].T) for h, w in models]


def _walk(kernel, models, constants: tuple[float, ...], *numbers):
    """Launch a kernel on all tiles, with arguments [*, N] per token and constants."""
    N, V = len(models[0][0]), len(models[0][1])
    for n in _cuts(N, TILE_N):
        for v in _cuts(V, TILE_V):
            x, y = _pair(models, n, v)
            kernel[(triton.cdiv(len(x), FOLD["BLOCK_N"]),)](
                x, y, *(each[:, n] for each in numbers), len(x), N, x.shape[1], x.stride(0), *constants, **FOLD,
            )
            del x, y  # so that the next two reuse their memory, in L2


def _forward(student, teacher, inv_temperature: float, kind: str, beta: float):
    """kl [N] and stat [5, N]: m_s, log s_s, m_t, log s_t and, for the backward pass, KL(p_s ‖ m) of js or else kl."""
    N, device = len(student[0]), student[0].device
    state = torch.empty(5, N, dtype=torch.float32, device=device)
    state[::2], state[1::2], state[4] = jit.LOW.value, 0, 0
    _walk(jit.fold_kernel, (teacher, student) if kind == "forward" else (student, teacher), (inv_temperature,), state)
    m_a, s_a, m_b, s_b, u = state
    log_a, log_b = s_a.log(), s_b.log()
    kl = u / s_a + (log_b - log_a)
    stat = torch.stack((m_b, log_b, m_a, log_a, kl) if kind == "forward" else (m_a, log_a, m_b, log_b, kl))
    if kind == "js":
        to_mixture = torch.zeros(2, N, dtype=torch.float32, device=device)
        _walk(jit.mixture_kernel, (student, teacher), (inv_temperature, beta), stat, to_mixture)
        kl, stat[4] = (1 - beta) * to_mixture[0] + beta * to_mixture[1], to_mixture[0]
    return kl, stat


def _fill_dx(dx, student, teacher, stat, g, inv_temperature: float, kind: str, beta: float):
    """dx [n, v], from rows h [n, D] and columns w [v, D] of either model; stat and g at the same rows."""
    for r in _cuts(dx.shape[0], TILE_N):
        for c in _cuts(dx.shape[1], TILE_V):
            x, y = _pair((student, teacher), r, c)
            grid = (triton.cdiv(len(x), FOLD["BLOCK_N"]) * triton.cdiv(x.shape[1], FOLD["BLOCK_V"]),)
            jit.unfold_kernel[grid](
                x, y, stat[:, r], g[r], dx[r, c], len(x), stat.stride(0), x.shape[1], x.stride(0), dx.stride(0),
                inv_temperature, beta, KIND=kind, **FOLD,
            )
            del x, y


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_s, w_s, h_t, w_t, inv_temperature, kind, beta, dx_bytes):
        kl, stat = _forward((h_s, w_s), (h_t, w_t), inv_temperature, kind, beta)
        ctx.save_for_backward(h_s, w_s, h_t, w_t, stat)
        ctx.how, ctx.dx_bytes = (inv_temperature, kind, beta), dx_bytes
        return kl

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivative()
        h_s, w_s, h_t, w_t, stat = ctx.saved_tensors
        g = g.contiguous()  # a sum's has stride 0

        def fill(dx, n, v):
            _fill_dx(dx, (h_s[n], w_s[v]), (h_t[n], w_t[v]), stat[:, n], g[n], *ctx.how)

        with torch.autocast(h_s.device.type, enabled=False):
            grads = _two_products(h_s, w_s, fill, ctx.dx_bytes, *ctx.needs_input_grad[:2])
        return *grads, *(None,) * 6


def linear_kl(h_s, w_s, h_t, w_t, *, temperature=1.0, kind="forward", beta=0.5, dx_bytes=DX_BYTES):
    """h_s [N, D_s], w_s [V, D_s] of the student, h_t [N, D_t], w_t [V, D_t] of the teacher -> kl [N] fp32.

    h and w of a model share a dtype (fp32, bf16, fp16). Differentiable in h_s and w_s. The backward pass needs about
    dx_bytes for a part of [N, V], as much at most for the rows of dw that belong to it, in fp32 (D_s up to 8,192), and
    dh [N, D_s] in fp32.
    """
    assert w_s.shape[1:] == h_s.shape[1:] and w_t.shape[1:] == h_t.shape[1:]
    assert len(h_s) == len(h_t) and len(w_s) == len(w_t) and kind in ("forward", "reverse", "js")
    assert h_s.dtype == w_s.dtype and h_t.dtype == w_t.dtype
    with torch.autocast(h_s.device.type, enabled=False):  # which would round the logits
        return _LinearKL.apply(h_s, w_s, h_t, w_t, 1.0 / temperature, kind, beta, dx_bytes)

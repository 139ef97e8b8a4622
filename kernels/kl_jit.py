"""The Triton kernels of kl.py, whose docstring has the equations."""
import triton
import triton.language as tl

from .logprob_jit import LOW


@triton.jit
def _row(ptr, plane, which: tl.constexpr, rows, N):
    """Number `which` of each token, from [numbers, plane]."""
    return tl.load(ptr + which * plane + rows, mask=rows < N, other=0.0)


@triton.jit
def _logits(x_ptr, rows, cols, N, width, stride_x, inv_temperature):
    """z [n, v] from a tile of h wᵀ; a padding column must add 0, not exp(0)."""
    real = cols[None, :] < width
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=(rows[:, None] < N) & real, other=0.0)
    return tl.where(real, x * inv_temperature, LOW)


@triton.jit
def _merge(m_a, s_a, m_b, s_b, u, M_a, S_a, M_b, S_b, U):
    """The (m_a, s_a, m_b, s_b, u) of a union from those of its two parts:

    m = max m_i,  s = Σ_i e^{m_i - m} s_i,  u = Σ_i e^{m_ai - m_a} (u_i + ((m_ai - m_a) - (m_bi - m_b)) s_ai)
    where 0·∞ = 0: u is infinite where a has probability and b has none.
    """
    top_a, top_b = tl.maximum(m_a, M_a), tl.maximum(m_b, M_b)
    d_a, D_a, d_b, D_b = m_a - top_a, M_a - top_a, m_b - top_b, M_b - top_b
    e_a, E_a = tl.exp(d_a), tl.exp(D_a)
    u = e_a * tl.where(e_a == 0, 0.0, u + (d_a - d_b) * s_a) + E_a * tl.where(E_a == 0, 0.0, U + (D_a - D_b) * S_a)
    return top_a, e_a * s_a + E_a * S_a, top_b, tl.exp(d_b) * s_b + tl.exp(D_b) * S_b, u


@triton.jit
def _log_probs(x_s_ptr, x_t_ptr, stat_ptr, rows, cols, N, plane, width, stride_x, inv_temperature):
    """log p of student and teacher [n, v], at least LOW, from their tiles and stat: m_s, log s_s, m_t, log s_t."""
    z_s = _logits(x_s_ptr, rows, cols, N, width, stride_x, inv_temperature)
    z_t = _logits(x_t_ptr, rows, cols, N, width, stride_x, inv_temperature)
    lp_s = (z_s - _row(stat_ptr, plane, 0, rows, N)[:, None]) - _row(stat_ptr, plane, 1, rows, N)[:, None]
    lp_t = (z_t - _row(stat_ptr, plane, 2, rows, N)[:, None]) - _row(stat_ptr, plane, 3, rows, N)[:, None]
    lp_s = tl.maximum(lp_s, LOW, propagate_nan=tl.PropagateNan.ALL)
    return lp_s, tl.maximum(lp_t, LOW, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _against_mixture(lp, d, own, other):
    """p and log (p / m), m = own·p + other·q, where log q = lp + d; finite where fp32 has 0 for both."""
    x = d + (tl.log(other) - tl.log(own))
    return tl.exp(lp), -tl.log(own) - (tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x))))


# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["N", "plane", "width"])
def fold_kernel(
    x_a_ptr, x_b_ptr, state_ptr,  # h wᵀ [N, width] fp32 of the two models; [5, plane]: m_a, s_a, m_b, s_b, u
    N, plane, width, stride_x, inv_temperature: tl.float32, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """Update the five numbers of BLOCK_N tokens with a tile. Grid (blocks of tokens)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = tl.cast(plane, tl.int64)
    m_a, s_a = _row(state_ptr, plane, 0, rows, N), _row(state_ptr, plane, 1, rows, N)
    m_b, s_b = _row(state_ptr, plane, 2, rows, N), _row(state_ptr, plane, 3, rows, N)
    u = _row(state_ptr, plane, 4, rows, N)
    for v in range(0, width, BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V).to(tl.int64)
        z_a = _logits(x_a_ptr, rows, cols, N, width, stride_x, inv_temperature)
        z_b = _logits(x_b_ptr, rows, cols, N, width, stride_x, inv_temperature)
        z_a = tl.where(z_a < LOW, LOW, z_a)
        M_a, M_b = tl.max(z_a, 1), tl.maximum(tl.max(z_b, 1), LOW)
        z_a, z_b = z_a - M_a[:, None], z_b - M_b[:, None]
        e_a = tl.exp(z_a)
        U = tl.sum(e_a * tl.where(e_a == 0, 0.0, z_a - z_b), 1)
        m_a, s_a, m_b, s_b, u = _merge(m_a, s_a, m_b, s_b, u, M_a, tl.sum(e_a, 1), M_b, tl.sum(tl.exp(z_b), 1), U)
    state = state_ptr + rows
    tl.store(state, m_a, mask=rows < N)
    tl.store(state + plane, s_a, mask=rows < N)
    tl.store(state + 2 * plane, m_b, mask=rows < N)
    tl.store(state + 3 * plane, s_b, mask=rows < N)
    tl.store(state + 4 * plane, u, mask=rows < N)


@triton.jit(do_not_specialize=["N", "plane", "width"])
def mixture_kernel(
    x_s_ptr, x_t_ptr, stat_ptr, kl_ptr,  # h wᵀ [N, width] fp32; [5, plane]; [2, plane]: KL(p_s ‖ m), KL(p_t ‖ m)
    N, plane, width, stride_x, inv_temperature: tl.float32, beta: tl.float32,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """Add a tile to both divergences of BLOCK_N tokens from the mixture. Grid (blocks of tokens)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = tl.cast(plane, tl.int64)
    kl_s, kl_t = _row(kl_ptr, plane, 0, rows, N), _row(kl_ptr, plane, 1, rows, N)
    for v in range(0, width, BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V).to(tl.int64)
        lp_s, lp_t = _log_probs(x_s_ptr, x_t_ptr, stat_ptr, rows, cols, N, plane, width, stride_x, inv_temperature)
        p_s, r_s = _against_mixture(lp_s, lp_t - lp_s, 1 - beta, beta)
        p_t, r_t = _against_mixture(lp_t, lp_s - lp_t, beta, 1 - beta)
        kl_s += tl.sum(p_s * r_s, 1)
        kl_t += tl.sum(p_t * r_t, 1)
    tl.store(kl_ptr + rows, kl_s, mask=rows < N)
    tl.store(kl_ptr + plane + rows, kl_t, mask=rows < N)


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["N", "plane", "width"])
def unfold_kernel(
    x_s_ptr, x_t_ptr, stat_ptr, g_ptr, dx_ptr,  # h wᵀ [N, width] fp32; [5, plane], [N] -> [N, width]
    N, plane, width, stride_x, stride_dx, inv_temperature: tl.float32, beta: tl.float32,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """dL/d(h_s w_sᵀ) of BLOCK_N tokens and BLOCK_V columns, by stat as `_log_probs` has it and, fifth, the divergence
    that KIND subtracts. Grid (blocks of tokens · blocks of columns), all on axis 0."""
    across = tl.cdiv(width, BLOCK_V)
    rows = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (tl.program_id(0) % across).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    plane = tl.cast(plane, tl.int64)
    lp_s, lp_t = _log_probs(x_s_ptr, x_t_ptr, stat_ptr, rows, cols, N, plane, width, stride_x, inv_temperature)
    own = _row(stat_ptr, plane, 4, rows, N)[:, None]
    if KIND == "forward":
        dz = tl.exp(lp_s) - tl.exp(lp_t)
    elif KIND == "reverse":
        dz = tl.exp(lp_s) * (lp_s - lp_t - own)
    else:
        p_s, r_s = _against_mixture(lp_s, lp_t - lp_s, 1 - beta, beta)
        dz = p_s * (r_s - own) * (1 - beta)
    g = tl.load(g_ptr + rows, mask=rows < N, other=0.0)[:, None]
    tl.store(dx_ptr + rows[:, None] * stride_dx + cols[None, :], dz * (g * inv_temperature),
             mask=(rows[:, None] < N) & (cols[None, :] < width))

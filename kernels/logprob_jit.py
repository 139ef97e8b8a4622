"""The Triton kernels of logprob.py, whose docstring has the equations."""
import triton
import triton.language as tl

from .softcap_jit import softcap

LOW = tl.constexpr(-1e30)  # for no logit: exp(LOW - m) is 0 and, unlike with -inf, so is 0 · (LOW - m) · s for any s


@triton.jit
def _merge(m_a, s_a, u_a, m_b, s_b, u_b):
    """The (m, s, u) of a union from those of its parts:

    m = max(m_a, m_b),  s = Σ_i e^{m_i - m} s_i,  u = Σ_i e^{m_i - m} (u_i + (m_i - m) s_i)
    """
    m = tl.maximum(m_a, m_b)
    d_a, d_b = m_a - m, m_b - m
    e_a, e_b = tl.exp(d_a), tl.exp(d_b)
    return m, e_a * s_a + e_b * s_b, e_a * (u_a + d_a * s_a) + e_b * (u_b + d_b * s_b)


@triton.jit
def _logits(x, scale, cap, inv_temperature, SOFTCAP: tl.constexpr):
    """z [n, v] in fp32 from x = h wᵀ [n, v]: z = softcap(scale · x) / temperature."""
    z = x * scale
    if SOFTCAP:
        z = softcap(z, cap)
    return z * inv_temperature


@triton.jit
def _fold(m, s, u, z_t, z, cols, target, V):
    """Update (m, s, u, z_t), each [n], with the logits z [n, v] of more columns; those from V on are padding."""
    hit = (cols[None, :] == target[:, None]) & (cols[None, :] < V)  # the target may be in the next tile
    z_t += tl.sum(tl.where(hit, z, 0.0), 1)
    z = tl.where((cols[None, :] < V) & ~(z < LOW), z, LOW)  # a padding column must add 0, not exp(0)
    m_tile = tl.max(z, 1)
    shifted = z - m_tile[:, None]
    e = tl.exp(shifted)
    m, s, u = _merge(m, s, u, m_tile, tl.sum(e, 1), tl.sum(e * shifted, 1))
    return m, s, u, z_t


@triton.jit
def _product(h_ptr, w_ptr, rows, cols, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
             INTERPRET: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """h wᵀ [BLOCK_N, BLOCK_V] in fp32 registers, of the rows of h [N, D] and cols of w [V, D]; 0 outside."""
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for d in range(0, D, BLOCK_D):
        dims = d + tl.arange(0, BLOCK_D).to(tl.int64)
        h = tl.load(h_ptr + rows[:, None] * stride_hn + dims[None, :] * stride_hd,
                    mask=(rows[:, None] < N) & (dims[None, :] < D), other=0.0)
        w = tl.load(w_ptr + dims[:, None] * stride_wd + cols[None, :] * stride_wv,
                    mask=(dims[:, None] < D) & (cols[None, :] < V), other=0.0)
        if INTERPRET:  # the interpreter multiplies the raw bits of bf16
            h, w = h.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _store_state(out, plane, m, s, u, z_t, mask):
    """m, s, u, z_t [n] to memory at out [n], `plane` numbers apart, where mask."""
    tl.store(out, m, mask=mask)
    tl.store(out + plane, s, mask=mask)
    tl.store(out + 2 * plane, u, mask=mask)
    tl.store(out + 3 * plane, z_t, mask=mask)


# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["N", "splits"])
def partials_kernel(
    h_ptr, w_ptr, target_ptr, part_ptr,  # [N, D], [V, D], [N], [4, splits, N]
    N, V, D, splits,
    stride_hn, stride_hd, stride_wv, stride_wd,
    scale: tl.float32, cap: tl.float32, inv_temperature: tl.float32,
    SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):
    """(m, s, u, z_t) of BLOCK_N tokens over one split of SPLIT columns. Grid (blocks of tokens, splits)."""
    split = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    m = tl.full([BLOCK_N], LOW, tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    u = tl.zeros([BLOCK_N], tl.float32)
    z_t = tl.zeros([BLOCK_N], tl.float32)
    for start in range(split * SPLIT, tl.minimum(V, split * SPLIT + SPLIT), BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V).to(tl.int64)
        x = _product(h_ptr, w_ptr, rows, cols, N, V, D, stride_hn, stride_hd, stride_wv, stride_wd,
                     INTERPRET, BLOCK_N, BLOCK_V, BLOCK_D)
        z = _logits(x, scale, cap, inv_temperature, SOFTCAP)
        m, s, u, z_t = _fold(m, s, u, z_t, z, cols, target, V)
    _store_state(part_ptr + split.to(tl.int64) * N + rows, tl.cast(splits, tl.int64) * N, m, s, u, z_t, rows < N)


@triton.jit(do_not_specialize=["N", "plane", "start", "width"])
def fold_kernel(
    x_ptr, target_ptr, state_ptr,  # h wᵀ [N, width] fp32, columns start … of the vocabulary; [N]; [4, plane]
    N, plane, start, width, stride_x, scale: tl.float32, cap: tl.float32, inv_temperature: tl.float32,
    SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """Update (m, s, u, z_t) of BLOCK_N tokens with a tile of logits. Grid (blocks of tokens)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    state, plane = state_ptr + rows, tl.cast(plane, tl.int64)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1) - start
    m = tl.load(state, mask=rows < N, other=0.0)
    s = tl.load(state + plane, mask=rows < N, other=0.0)
    u = tl.load(state + 2 * plane, mask=rows < N, other=0.0)
    z_t = tl.load(state + 3 * plane, mask=rows < N, other=0.0)
    for v in range(0, width, BLOCK_V):
        cols = v + tl.arange(0, BLOCK_V).to(tl.int64)
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :],
                    mask=(rows[:, None] < N) & (cols[None, :] < width), other=0.0)
        z = _logits(x, scale, cap, inv_temperature, SOFTCAP)
        m, s, u, z_t = _fold(m, s, u, z_t, z, cols, target, width)
    _store_state(state, plane, m, s, u, z_t, rows < N)


@triton.jit(do_not_specialize=["N", "splits"])
def finish_kernel(
    part_ptr, target_ptr, logp_ptr, stat_ptr,  # [4, splits, N], [N], [N] -> [N], [3, N]: m, log s, H
    N, V, splits, BLOCK_N: tl.constexpr,
):
    """Merge the splits of BLOCK_N tokens in order; NaN for a target outside [0, V). Grid (blocks of tokens)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=0)
    plane = tl.cast(splits, tl.int64) * N
    m = tl.full([BLOCK_N], LOW, tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    u = tl.zeros([BLOCK_N], tl.float32)
    z_t = tl.zeros([BLOCK_N], tl.float32)
    for split in range(0, splits):
        part = part_ptr + tl.cast(split, tl.int64) * N + rows
        m_b = tl.load(part, mask=rows < N, other=0.0)
        s_b = tl.load(part + plane, mask=rows < N, other=1.0)
        u_b = tl.load(part + 2 * plane, mask=rows < N, other=0.0)
        m, s, u = _merge(m, s, u, m_b, s_b, u_b)
        z_t += tl.load(part + 3 * plane, mask=rows < N, other=0.0)  # 0 except in the split with t
    log_s = tl.log(s)
    logp = tl.where((target >= 0) & (target < V), (z_t - m) - log_s, float("nan"))
    tl.store(logp_ptr + rows, logp, mask=rows < N)
    stat, N = stat_ptr + rows, tl.cast(N, tl.int64)
    tl.store(stat, m, mask=rows < N)
    tl.store(stat + N, log_s, mask=rows < N)
    tl.store(stat + 2 * N, log_s - u / s, mask=rows < N)


# ---------------------------------------------------------------- backward


@triton.jit
def _dx(x, rows, cols, target_ptr, stat_ptr, grad_ptr, N, plane, start, width, scale, cap, inv_temperature,
        SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr):
    """dL/dx [n, v] from x = h wᵀ [n, v]: dz, then through temperature, softcap and scale.

    stat [3, plane] is m, log s, H of a token and grad [1 or 2, plane] is g, g_H; the columns start at `start` in
    the vocabulary, and those from `width` on are padding.
    """
    mask = rows < N
    plane = tl.cast(plane, tl.int64)
    target = tl.load(target_ptr + rows, mask=mask, other=-1) - start
    m = tl.load(stat_ptr + rows, mask=mask, other=0.0)[:, None]
    log_s = tl.load(stat_ptr + plane + rows, mask=mask, other=0.0)[:, None]
    g = tl.load(grad_ptr + rows, mask=mask, other=0.0)[:, None]
    z = _logits(x, scale, cap, inv_temperature, SOFTCAP)
    lp = tl.where(cols[None, :] < width, (z - m) - log_s, 0.0)  # in a padding column exp could overflow
    p = tl.exp(lp)
    dz = tl.where(cols[None, :] == target[:, None], g, 0.0) - g * p
    if ENTROPY:
        H = tl.load(stat_ptr + 2 * plane + rows, mask=mask, other=0.0)[:, None]
        g_H = tl.load(grad_ptr + plane + rows, mask=mask, other=0.0)[:, None]
        dz -= g_H * p * (tl.where(p == 0, 0.0, lp) + H)
    if SOFTCAP:
        t = z / (cap * inv_temperature)
        dz *= 1 - t * t
    return dz * (scale * inv_temperature)


@triton.jit(do_not_specialize=["N", "plane", "start", "width"])
def dx_kernel(
    h_ptr, w_ptr, target_ptr, stat_ptr, grad_ptr, dx_ptr,  # [N, D], [width, D], [N], [3, plane], [2, plane]; [N, width]
    N, plane, start, width, D, stride_hn, stride_hd, stride_wv, stride_wd, stride_dx,
    scale: tl.float32, cap: tl.float32, inv_temperature: tl.float32,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    """dx of a tile of BLOCK_N tokens and BLOCK_V columns, including the product. Grid (tiles): GROUP blocks of rows
    are consecutive in each column, so that h and w are read from L2."""
    across = tl.cdiv(width, BLOCK_V)
    group, index = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    tall = tl.minimum(tl.cdiv(N, BLOCK_N) - group * GROUP, GROUP)
    rows = (group * GROUP + index % tall).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (index // tall).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _product(h_ptr, w_ptr, rows, cols, N, width, D, stride_hn, stride_hd, stride_wv, stride_wd,
                 INTERPRET, BLOCK_N, BLOCK_V, BLOCK_D)
    dx = _dx(x, rows, cols, target_ptr, stat_ptr, grad_ptr, N, plane, start, width, scale, cap,
             inv_temperature, SOFTCAP, ENTROPY)
    tl.store(dx_ptr + rows[:, None] * stride_dx + cols[None, :], dx,
             mask=(rows[:, None] < N) & (cols[None, :] < width))


@triton.jit(do_not_specialize=["N", "plane", "start", "width"])
def unfold_kernel(
    x_ptr, target_ptr, stat_ptr, grad_ptr, dx_ptr,  # h wᵀ [N, width] fp32 -> dx [N, width]
    N, plane, start, width, stride_x, stride_dx, scale: tl.float32, cap: tl.float32, inv_temperature: tl.float32,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """dx of a tile of BLOCK_N tokens and BLOCK_V columns, from a product that torch made. Grid (tiles)."""
    across = tl.cdiv(width, BLOCK_V)
    rows = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (tl.program_id(0) % across).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (rows[:, None] < N) & (cols[None, :] < width)
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0)
    dx = _dx(x, rows, cols, target_ptr, stat_ptr, grad_ptr, N, plane, start, width, scale, cap,
             inv_temperature, SOFTCAP, ENTROPY)
    tl.store(dx_ptr + rows[:, None] * stride_dx + cols[None, :], dx, mask=inside)

"""The Triton kernels of attention.py, whose docstring has the equations.

Names throughout: q [N, H, Dqk], k [M, K, Dqk], v [M, K, Dv] and do like o [N, H, Dv], each at a pointer, with its
strides of token and head (stride_qn, stride_qh); cu_q, cu_k [B + 1] int32 bound the sequences; `blocks` per head and
sequence, enough for the longest; `shared` = H / K query heads per key head; left and right are the band, and LEFT and
RIGHT say whether that side is bounded; factor and cap as in `in_log2`; in parts Dqk is D1 + D2 and Dv V1 + V2; MASK:
not all pairs of these queries and keys are visible.
"""
import triton
import triton.language as tl

from .attention_core_jit import LN2, LOG2E, LOW, add_dot, bounds, dot_t, in_log2, load, online, sequence, store, visible

# ---------------------------------------------------------------- forward


@triton.jit
def _forward_over(acc1, acc2, m, s, q1, q2, k_ptr, v_ptr, stride_k, stride_v, row, begin, end, keys, left, right,
                  factor, cap, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
                  D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr,
                  V2: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr):
    """acc, m and s of `online` for a block of queries q in parts, at the shifted positions row [BLOCK_M], with the keys
    begin … end - 1 of one head, whose first k and v are at the pointers."""
    for j in range(begin, end, BLOCK_N):
        k1, k2 = load(k_ptr, j, keys, stride_k, D1, D2, D, BLOCK_N, WIDEN)
        z = in_log2(dot_t(q1, q2, k1, k2, D2 > 0), factor, cap, SOFTCAP)
        if MASK:
            col = j + tl.arange(0, BLOCK_N)[None, :]
            z = tl.where(visible(col < keys, row[:, None], col, left, right, LEFT, RIGHT), z, float("-inf"))
        v1, v2 = load(v_ptr, j, keys, stride_v, V1, V2, DV, BLOCK_N, WIDEN)
        acc1, acc2, m, s = online(acc1, acc2, m, s, z, v1, v2, V2 > 0, WIDEN)
    return acc1, acc2, m, s


@triton.jit(do_not_specialize=["blocks", "N", "left", "right"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, o_ptr, lse_ptr,
    blocks, N, H, shared,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    left, right, factor: tl.float32, cap: tl.float32,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """o and lse [H, N] fp32 of one block of BLOCK_M queries of one head, over the keys it sees.

    Grid (blocks · H · B): all on axis 0, since the others end at 65535; the heads of a group are neighbours and find
    its keys in L2, and under a causal mask the blocks with the most keys start first.
    """
    at = tl.program_id(0)
    first = (blocks - 1 - at % blocks) * BLOCK_M
    h, b = at // blocks % H, at // blocks // H
    q_start, queries = sequence(cu_q_ptr, b)
    if first >= queries:
        return
    k_start, keys = sequence(cu_k_ptr, b)
    kv, h = tl.cast(h // shared, tl.int64), tl.cast(h, tl.int64)
    k_ptr += k_start * stride_kn + kv * stride_kh
    v_ptr += k_start * stride_vn + kv * stride_vh
    shift = keys - queries
    row = first + shift + tl.arange(0, BLOCK_M)
    q1, q2 = load(q_ptr + q_start * stride_qn + h * stride_qh, first, queries, stride_qn, D1, D2, D, BLOCK_M, WIDEN)
    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    acc2 = acc1
    if V2 > 0:
        acc2 = tl.zeros([BLOCK_M, V2], tl.float32)
    m = tl.full([BLOCK_M], LOW, tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    begin, whole_begin, whole_end, end = bounds(first + shift, last + shift, left, right, keys, LEFT, RIGHT, BLOCK_N)
    if LEFT:
        acc1, acc2, m, s = _forward_over(
            acc1, acc2, m, s, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, row, begin, whole_begin, keys,
            left, right, factor, cap, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N, MASK=True)
    acc1, acc2, m, s = _forward_over(
        acc1, acc2, m, s, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, row, whole_begin, whole_end, keys,
        left, right, factor, cap, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N, MASK=False)
    acc1, acc2, m, s = _forward_over(
        acc1, acc2, m, s, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, row, whole_end, end, keys,
        left, right, factor, cap, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N, MASK=True)
    some = s != 0  # NaN too, which must propagate
    s = tl.where(some, s, 1.0)
    inverse = 1 / s[:, None]
    store(o_ptr + q_start * stride_on + h * stride_oh, acc1 * inverse, acc2 * inverse, first, queries, stride_on,
          V1, V2, DV, BLOCK_M)
    lse = tl.where(some, (m + tl.log2(s)) * LN2, float("-inf"))
    index = first + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + h * N + q_start + index, lse, mask=index < queries)


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["N"])
def stat_kernel(
    o_ptr, do_ptr, lse_ptr, stat_ptr,  # [N, H, Dv] twice, [H, N] -> [2, H, N]
    N, H, stride_on, stride_oh, stride_gn, stride_gh, WIDEN: tl.constexpr,
    DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """lse in log 2 of BLOCK_M queries of one head, or inf if a query sees no key, so that p = exp2(z - inf) is 0; and
    Δ = Σ_d o_d · do_d. Grid (blocks · H)."""
    h, first = tl.cast(tl.program_id(0) % H, tl.int64), tl.program_id(0) // H * BLOCK_M
    o1, o2 = load(o_ptr + h * stride_oh, first, N, stride_on, V1, V2, DV, BLOCK_M, WIDEN)
    g1, g2 = load(do_ptr + h * stride_gh, first, N, stride_gn, V1, V2, DV, BLOCK_M, WIDEN)
    delta = tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    if V2 > 0:
        delta += tl.sum(o2.to(tl.float32) * g2.to(tl.float32), 1)
    index = first + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + h * N + index, mask=index < N, other=0.0) * LOG2E
    tl.store(stat_ptr + h * N + index, tl.where(lse == float("-inf"), float("inf"), lse), mask=index < N)
    tl.store(stat_ptr + (H + h) * N + index, delta, mask=index < N)


@triton.jit
def _through_softcap(dz, z, cap, SOFTCAP: tl.constexpr):
    """The gradient of the score before its softcap, from that after it: dz (1 - (z / c)²); z and c in log 2."""
    if SOFTCAP:
        t = z * (1 / cap)
        dz *= 1 - t * t
    return dz


@triton.jit
def _dq_over(dq1, dq2, q1, q2, g1, g2, lse, delta, k_ptr, v_ptr, stride_k, stride_v, row, begin, end, keys, left,
             right, factor, cap, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
             D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr,
             V2: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr):
    """dq / scale [BLOCK_M, Dqk] in parts, plus the contribution of the keys begin … end - 1 of one head. Of the
    queries: q and do = g in parts, lse in log 2 and Δ [BLOCK_M], and the shifted positions row."""
    for j in range(begin, end, BLOCK_N):
        k1, k2 = load(k_ptr, j, keys, stride_k, D1, D2, D, BLOCK_N, WIDEN)
        z = in_log2(dot_t(q1, q2, k1, k2, D2 > 0), factor, cap, SOFTCAP)
        p = tl.exp2(z - lse[:, None])
        if MASK:
            col = j + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where(visible(col < keys, row[:, None], col, left, right, LEFT, RIGHT), p, 0.0)
        v1, v2 = load(v_ptr, j, keys, stride_v, V1, V2, DV, BLOCK_N, WIDEN)
        dz = p * (dot_t(g1, g2, v1, v2, V2 > 0) - delta[:, None])
        dz = _through_softcap(dz, z, cap, SOFTCAP)
        dq1, dq2 = add_dot(dq1, dq2, dz, k1, k2, D2 > 0, WIDEN)
    return dq1, dq2


@triton.jit(do_not_specialize=["blocks", "N", "left", "right"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stat_ptr, cu_q_ptr, cu_k_ptr, dq_ptr,
    blocks, N, H, shared,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh, stride_dn, stride_dh,
    left, right, factor: tl.float32, cap: tl.float32, scale: tl.float32,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dq of one block of BLOCK_M queries of one head, over the keys it sees; stat [2, H, N] from `stat_kernel`. Grid as
    in the forward."""
    at = tl.program_id(0)
    first = (blocks - 1 - at % blocks) * BLOCK_M
    h, b = at // blocks % H, at // blocks // H
    q_start, queries = sequence(cu_q_ptr, b)
    if first >= queries:
        return
    k_start, keys = sequence(cu_k_ptr, b)
    kv, h = tl.cast(h // shared, tl.int64), tl.cast(h, tl.int64)
    k_ptr += k_start * stride_kn + kv * stride_kh
    v_ptr += k_start * stride_vn + kv * stride_vh
    shift = keys - queries
    row = first + shift + tl.arange(0, BLOCK_M)
    q1, q2 = load(q_ptr + q_start * stride_qn + h * stride_qh, first, queries, stride_qn, D1, D2, D, BLOCK_M, WIDEN)
    g1, g2 = load(do_ptr + q_start * stride_gn + h * stride_gh, first, queries, stride_gn, V1, V2, DV, BLOCK_M, WIDEN)
    index = first + tl.arange(0, BLOCK_M)
    stat_ptr += h * N + q_start
    lse = tl.load(stat_ptr + index, mask=index < queries, other=float("inf"))
    delta = tl.load(stat_ptr + tl.cast(H, tl.int64) * N + index, mask=index < queries, other=0.0)
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = dq1
    if D2 > 0:
        dq2 = tl.zeros([BLOCK_M, D2], tl.float32)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    begin, whole_begin, whole_end, end = bounds(first + shift, last + shift, left, right, keys, LEFT, RIGHT, BLOCK_N)
    if LEFT:
        dq1, dq2 = _dq_over(
            dq1, dq2, q1, q2, g1, g2, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, row, begin, whole_begin, keys,
            left, right, factor, cap, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N, MASK=True)
    dq1, dq2 = _dq_over(
        dq1, dq2, q1, q2, g1, g2, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, row, whole_begin, whole_end, keys,
        left, right, factor, cap, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N, MASK=False)
    dq1, dq2 = _dq_over(
        dq1, dq2, q1, q2, g1, g2, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, row, whole_end, end, keys,
        left, right, factor, cap, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N, MASK=True)
    store(dq_ptr + q_start * stride_dn + h * stride_dh, dq1 * scale, dq2 * scale, first, queries, stride_dn,
          D1, D2, D, BLOCK_M)


@triton.jit
def _dkv_over(dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_ptr, do_ptr, stat_ptr, plane, stride_q, stride_g, col, shift,
              begin, end, queries, left, right, factor, cap, LEFT: tl.constexpr, RIGHT: tl.constexpr,
              SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
              DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK_M: tl.constexpr, MASK: tl.constexpr):
    """dk / scale and dv of BLOCK_N keys, at the positions col, in parts, plus the contribution of the queries
    begin … end - 1 of one head, whose first q, do and lse are at the pointers; Δ lies `plane` behind lse.

    Everything transposed, [keys, queries], so that pᵀ and dzᵀ come as the products want them.
    """
    for i in range(begin, end, BLOCK_M):
        q1, q2 = load(q_ptr, i, queries, stride_q, D1, D2, D, BLOCK_M, WIDEN)
        index = i + tl.arange(0, BLOCK_M)
        lse = tl.load(stat_ptr + index, mask=index < queries, other=float("inf"))
        z = in_log2(dot_t(k1, k2, q1, q2, D2 > 0), factor, cap, SOFTCAP)
        p = tl.exp2(z - lse[None, :])
        if MASK:
            row = index[None, :]
            p = tl.where(visible(row < queries, row + shift, col[:, None], left, right, LEFT, RIGHT), p, 0.0)
        g1, g2 = load(do_ptr, i, queries, stride_g, V1, V2, DV, BLOCK_M, WIDEN)
        dv1, dv2 = add_dot(dv1, dv2, p, g1, g2, V2 > 0, WIDEN)
        delta = tl.load(stat_ptr + plane + index, mask=index < queries, other=0.0)
        dz = p * (dot_t(v1, v2, g1, g2, V2 > 0) - delta[None, :])
        dz = _through_softcap(dz, z, cap, SOFTCAP)
        dk1, dk2 = add_dot(dk1, dk2, dz, q1, q2, D2 > 0, WIDEN)
    return dk1, dk2, dv1, dv2


@triton.jit(do_not_specialize=["blocks", "N", "left", "right"])
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, stat_ptr, cu_q_ptr, cu_k_ptr, dk_ptr, dv_ptr,
    blocks, N, K, shared,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    stride_dkn, stride_dkh, stride_dvn, stride_dvh,
    left, right, factor: tl.float32, cap: tl.float32, scale: tl.float32,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dk [M, K, Dqk] and dv [M, K, Dv] of one block of BLOCK_N keys of one key head, over its query heads, one after
    the other, and the queries that see it: one program writes each, so nothing is added by atomics. Grid (blocks · K ·
    B)."""
    at = tl.program_id(0)
    first = at % blocks * BLOCK_N  # under a causal mask the first keys have the most queries
    kv, b = tl.cast(at // blocks % K, tl.int64), at // blocks // K
    k_start, keys = sequence(cu_k_ptr, b)
    if first >= keys:
        return
    q_start, queries = sequence(cu_q_ptr, b)
    shift = keys - queries
    col = first + tl.arange(0, BLOCK_N)
    k1, k2 = load(k_ptr + k_start * stride_kn + kv * stride_kh, first, keys, stride_kn, D1, D2, D, BLOCK_N, WIDEN)
    v1, v2 = load(v_ptr + k_start * stride_vn + kv * stride_vh, first, keys, stride_vn, V1, V2, DV, BLOCK_N, WIDEN)
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, V1], tl.float32)
    dk2, dv2 = dk1, dv1
    if D2 > 0:
        dk2 = tl.zeros([BLOCK_N, D2], tl.float32)
    if V2 > 0:
        dv2 = tl.zeros([BLOCK_N, V2], tl.float32)
    last = tl.minimum(first + BLOCK_N, keys) - 1
    # Rows past the last query need no mask: their p is 0. With a window all is masked: a third loop would spill.
    begin, whole, _, end = bounds(first - shift, last - shift, right, left, queries, RIGHT, LEFT, BLOCK_M)
    if LEFT:
        whole = end
    plane = tl.cast(K * shared, tl.int64) * N
    for g in range(0, shared):
        h = kv * shared + g
        q_head = q_ptr + q_start * stride_qn + h * stride_qh
        do_head = do_ptr + q_start * stride_gn + h * stride_gh
        stat_head = stat_ptr + h * N + q_start
        if RIGHT:
            dk1, dk2, dv1, dv2 = _dkv_over(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_head, do_head, stat_head, plane, stride_qn, stride_gn,
                col, shift, begin, whole, queries,
                left, right, factor, cap, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_M, MASK=True)
        if not LEFT:
            dk1, dk2, dv1, dv2 = _dkv_over(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_head, do_head, stat_head, plane, stride_qn, stride_gn,
                col, shift, whole, end, queries,
                left, right, factor, cap, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_M, MASK=False)
    store(dk_ptr + k_start * stride_dkn + kv * stride_dkh, dk1 * scale, dk2 * scale, first, keys, stride_dkn,
          D1, D2, D, BLOCK_N)
    store(dv_ptr + k_start * stride_dvn + kv * stride_dvh, dv1, dv2, first, keys, stride_dvn, V1, V2, DV, BLOCK_N)

"""The Triton programs of attention.py, which says what they compute and in which order they run.

Offsets: the place of a tile is a 64-bit scalar, and only offsets inside a tile are 32-bit tensors.
"""
import triton
import triton.language as tl

LOW = tl.constexpr(-1e38)  # a maximum before any key: exp2(LOW - m) is 0, and LOW - LOW is 0 and not NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _part(ptr, first, length, stride, AT: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
          WIDEN: tl.constexpr):
    """x[first : first + BLOCK, AT : AT + WIDTH], with zeros from row `length` and column D on."""
    rows = tl.arange(0, BLOCK)[:, None]
    dims = AT + tl.arange(0, WIDTH)[None, :]
    mask = rows < length - first
    if AT + WIDTH > D:
        mask = mask & (dims < D)
    x = tl.load(ptr + tl.cast(first, tl.int64) * stride + (rows * stride + dims), mask=mask, other=0.0)
    if WIDEN:  # the interpreter multiplies the raw bits of bf16
        x = x.to(tl.float32)
    return x


@triton.jit
def load(ptr, first, length, stride, D1: tl.constexpr, D2: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
         WIDEN: tl.constexpr):
    """BLOCK rows of a head of D numbers in two parts, [BLOCK, D1] and [BLOCK, D2]; without a second, the first twice.

    A tile's sides are powers of two: 192 = 128 + 64, 96 = 64 + 32 and 80 = 64 + 16 cost what they hold.
    """
    x1 = _part(ptr, first, length, stride, 0, D1, D, BLOCK, WIDEN)
    x2 = x1
    if D2 > 0:
        x2 = _part(ptr, first, length, stride, D1, D2, D, BLOCK, WIDEN)
    return x1, x2


@triton.jit
def store(ptr, x1, x2, first, length, stride, D1: tl.constexpr, D2: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The opposite of `load`: rows from `length` on are not touched."""
    rows = tl.arange(0, BLOCK)[:, None]
    place = ptr + tl.cast(first, tl.int64) * stride + rows * stride
    inside = rows < length - first
    dims = tl.arange(0, D1)[None, :]
    tl.store(place + dims, x1, mask=inside & (dims < D))
    if D2 > 0:
        dims = D1 + tl.arange(0, D2)[None, :]
        tl.store(place + dims, x2, mask=inside & (dims < D))


@triton.jit
def dot_t(a1, a2, b1, b2, SECOND: tl.constexpr):
    """a bᵀ in fp32, over both parts."""
    out = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if SECOND:
        out = tl.dot(a2, tl.trans(b2), out, input_precision="ieee")
    return out


@triton.jit
def add_dot(acc1, acc2, p, x1, x2, SECOND: tl.constexpr, WIDEN: tl.constexpr):
    """acc + p x, part by part; p is rounded to the dtype of x."""
    if not WIDEN:
        p = p.to(x1.dtype)
    acc1 = tl.dot(p, x1, acc1, input_precision="ieee")
    if SECOND:
        acc2 = tl.dot(p, x2, acc2, input_precision="ieee")
    return acc1, acc2


@triton.jit
def tanh(x):
    """2 σ(2x) - 1 loses the digits of a small x, which its Taylor series keeps (to 1e-8 below 1/4)."""
    y = x * x
    small = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 0.0625, small, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def in_log2(x, factor, cap, SOFTCAP: tl.constexpr):
    """The score z = softcap(scale · x) in units of log 2, from x = q·k; factor is scale · log₂e, or with a softcap
    scale / cap."""
    if SOFTCAP:
        return tanh(x * factor) * (cap * LOG2E)
    return x * factor


@triton.jit
def online(acc1, acc2, m, s, z, v1, v2, SECOND: tl.constexpr, WIDEN: tl.constexpr):
    """Scores z [rows, keys], in log 2, taken into the running maximum m, sum s and output acc."""
    m_new = tl.maximum(m, tl.max(z, 1))
    p = tl.exp2(z - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    s = s * shrink + tl.sum(p, 1)
    acc1 = acc1 * shrink[:, None]
    if SECOND:
        acc2 = acc2 * shrink[:, None]
    acc1, acc2 = add_dot(acc1, acc2, p, v1, v2, SECOND, WIDEN)
    return acc1, acc2, m_new, s


# ---------------------------------------------------------------- which query sees which key
# Query i of a sequence sees key j if  i + shift - left <= j <= i + shift + right,  shift = keys - queries.


@triton.jit
def _sequence(cu_ptr, b):
    """First token and number of tokens of sequence b."""
    start = tl.load(cu_ptr + b)
    return start.to(tl.int64), tl.load(cu_ptr + b + 1) - start


@triton.jit
def _visible(inside, i, j, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which of the pairs that are inside the sequence are in the band; i is already shifted."""
    if LEFT:
        inside = inside & (j >= i - left)
    if RIGHT:
        inside = inside & (j <= i + right)
    return inside


@triton.jit
def _bounds(first, last, low, high, length, LOW_SIDE: tl.constexpr, HIGH_SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """What rows first … last of one side meet of the other, when row x meets x - low … x + high of `length`:
    begin and end, and the part between them, in whole blocks, that all of them meet: there no mask is needed.

    Without a side (LOW_SIDE, HIGH_SIDE) everything there is met.
    """
    begin, end, whole_begin, whole_end = 0, length, 0, length
    if LOW_SIDE:
        begin = tl.minimum(tl.maximum(first - low, 0), length) // BLOCK * BLOCK
        whole_begin = tl.minimum(tl.maximum(last - low, 0), length)
    if HIGH_SIDE:
        end = tl.minimum(tl.maximum(last + high + 1, 0), length)
        whole_end = tl.minimum(tl.maximum(first + high + 1, 0), length)
    whole_begin = tl.maximum(begin, tl.cdiv(whole_begin, BLOCK) * BLOCK)
    whole_end = tl.maximum(whole_begin, whole_end // BLOCK * BLOCK)
    return begin, whole_begin, whole_end, end


# ---------------------------------------------------------------- forward


@triton.jit
def _forward_over(acc1, acc2, m, s, q1, q2, k_ptr, v_ptr, stride_k, stride_v, row, begin, end, keys, left, right,
                  factor, cap, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
                  WIDEN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
                  V1: tl.constexpr, V2: tl.constexpr, BLOCK_N: tl.constexpr):
    for j in range(begin, end, BLOCK_N):
        k1, k2 = load(k_ptr, j, keys, stride_k, D1, D2, D, BLOCK_N, WIDEN)
        z = in_log2(dot_t(q1, q2, k1, k2, D2 > 0), factor, cap, SOFTCAP)
        if MASK:
            col = j + tl.arange(0, BLOCK_N)[None, :]
            z = tl.where(_visible(col < keys, row[:, None], col, left, right, LEFT, RIGHT), z, float("-inf"))
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
    # All on axis 0, since the others end at 65535; the heads of a group are neighbours and find its keys in L2, and
    # under a causal mask the blocks with the most keys start first.
    at = tl.program_id(0)
    first = (blocks - 1 - at % blocks) * BLOCK_M
    h, b = at // blocks % H, at // blocks // H
    q_start, queries = _sequence(cu_q_ptr, b)
    if first >= queries:
        return
    k_start, keys = _sequence(cu_k_ptr, b)
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
    begin, whole_begin, whole_end, end = _bounds(first + shift, last + shift, left, right, keys, LEFT, RIGHT, BLOCK_N)
    if LEFT:
        acc1, acc2, m, s = _forward_over(
            acc1, acc2, m, s, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, row, begin, whole_begin, keys, left, right,
            factor, cap, True, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N)
    acc1, acc2, m, s = _forward_over(
        acc1, acc2, m, s, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, row, whole_begin, whole_end, keys, left, right,
        factor, cap, False, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N)
    acc1, acc2, m, s = _forward_over(
        acc1, acc2, m, s, q1, q2, k_ptr, v_ptr, stride_kn, stride_vn, row, whole_end, end, keys, left, right,
        factor, cap, True, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N)
    some = s != 0  # NaN counts: it must come out
    s = tl.where(some, s, 1.0)
    inverse = 1 / s[:, None]
    store(o_ptr + q_start * stride_on + h * stride_oh, acc1 * inverse, acc2 * inverse, first, queries, stride_on,
          V1, V2, DV, BLOCK_M)
    lse = tl.where(some, (m + tl.log2(s)) * LN2, float("-inf"))
    place = first + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + h * N + q_start + place, lse, mask=place < queries)


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["N"])
def stat_kernel(
    o_ptr, do_ptr, lse_ptr, stat_ptr,  # [N, H, Dv] twice, [H, N] -> [2, H, N]
    N, H, stride_on, stride_oh, stride_gn, stride_gh, WIDEN: tl.constexpr,
    DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """Of every query lse in log 2, or inf if it sees no key, so that p = exp2(z - inf) is 0; and Δ = Σ_d o_d · do_d."""
    h, first = tl.cast(tl.program_id(0) % H, tl.int64), tl.program_id(0) // H * BLOCK_M
    o1, o2 = load(o_ptr + h * stride_oh, first, N, stride_on, V1, V2, DV, BLOCK_M, WIDEN)
    g1, g2 = load(do_ptr + h * stride_gh, first, N, stride_gn, V1, V2, DV, BLOCK_M, WIDEN)
    delta = tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    if V2 > 0:
        delta += tl.sum(o2.to(tl.float32) * g2.to(tl.float32), 1)
    place = first + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + h * N + place, mask=place < N, other=0.0) * LOG2E
    tl.store(stat_ptr + h * N + place, tl.where(lse == float("-inf"), float("inf"), lse), mask=place < N)
    tl.store(stat_ptr + (H + h) * N + place, delta, mask=place < N)


@triton.jit
def _through_softcap(dz, z, cap, SOFTCAP: tl.constexpr):
    """The gradient of the score before its softcap: dz (1 - (z / c)²); z in log 2."""
    if SOFTCAP:
        t = z / (cap * LOG2E)
        dz *= 1 - t * t
    return dz


@triton.jit
def _dq_over(dq1, dq2, q1, q2, g1, g2, lse, delta, k_ptr, v_ptr, stride_k, stride_v, row, begin, end, keys, left,
             right, factor, cap, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
             WIDEN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
             V1: tl.constexpr, V2: tl.constexpr, BLOCK_N: tl.constexpr):
    for j in range(begin, end, BLOCK_N):
        k1, k2 = load(k_ptr, j, keys, stride_k, D1, D2, D, BLOCK_N, WIDEN)
        z = in_log2(dot_t(q1, q2, k1, k2, D2 > 0), factor, cap, SOFTCAP)
        p = tl.exp2(z - lse[:, None])
        if MASK:
            col = j + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where(_visible(col < keys, row[:, None], col, left, right, LEFT, RIGHT), p, 0.0)
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
    """dq of one block of queries of one head, over the keys it sees, as in the forward."""
    at = tl.program_id(0)
    first = (blocks - 1 - at % blocks) * BLOCK_M
    h, b = at // blocks % H, at // blocks // H
    q_start, queries = _sequence(cu_q_ptr, b)
    if first >= queries:
        return
    k_start, keys = _sequence(cu_k_ptr, b)
    kv, h = tl.cast(h // shared, tl.int64), tl.cast(h, tl.int64)
    k_ptr += k_start * stride_kn + kv * stride_kh
    v_ptr += k_start * stride_vn + kv * stride_vh
    shift = keys - queries
    row = first + shift + tl.arange(0, BLOCK_M)
    q1, q2 = load(q_ptr + q_start * stride_qn + h * stride_qh, first, queries, stride_qn, D1, D2, D, BLOCK_M, WIDEN)
    g1, g2 = load(do_ptr + q_start * stride_gn + h * stride_gh, first, queries, stride_gn, V1, V2, DV, BLOCK_M, WIDEN)
    place = first + tl.arange(0, BLOCK_M)
    stat_ptr += h * N + q_start
    lse = tl.load(stat_ptr + place, mask=place < queries, other=float("inf"))
    delta = tl.load(stat_ptr + tl.cast(H, tl.int64) * N + place, mask=place < queries, other=0.0)
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = dq1
    if D2 > 0:
        dq2 = tl.zeros([BLOCK_M, D2], tl.float32)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    begin, whole_begin, whole_end, end = _bounds(first + shift, last + shift, left, right, keys, LEFT, RIGHT, BLOCK_N)
    if LEFT:
        dq1, dq2 = _dq_over(
            dq1, dq2, q1, q2, g1, g2, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, row, begin, whole_begin, keys,
            left, right, factor, cap, True, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N)
    dq1, dq2 = _dq_over(
        dq1, dq2, q1, q2, g1, g2, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, row, whole_begin, whole_end, keys,
        left, right, factor, cap, False, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N)
    dq1, dq2 = _dq_over(
        dq1, dq2, q1, q2, g1, g2, lse, delta, k_ptr, v_ptr, stride_kn, stride_vn, row, whole_end, end, keys,
        left, right, factor, cap, True, LEFT, RIGHT, SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_N)
    store(dq_ptr + q_start * stride_dn + h * stride_dh, dq1 * scale, dq2 * scale, first, queries, stride_dn,
          D1, D2, D, BLOCK_M)


@triton.jit
def _dkv_over(dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_ptr, do_ptr, stat_ptr, plane, stride_q, stride_g, col, shift,
              begin, end, queries, left, right, factor, cap, MASK: tl.constexpr, LEFT: tl.constexpr,
              RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
              D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK_M: tl.constexpr):
    """Everything transposed, [keys, queries], so that pᵀ and dzᵀ come as the products want them."""
    for i in range(begin, end, BLOCK_M):
        q1, q2 = load(q_ptr, i, queries, stride_q, D1, D2, D, BLOCK_M, WIDEN)
        place = i + tl.arange(0, BLOCK_M)
        lse = tl.load(stat_ptr + place, mask=place < queries, other=float("inf"))
        z = in_log2(dot_t(k1, k2, q1, q2, D2 > 0), factor, cap, SOFTCAP)
        p = tl.exp2(z - lse[None, :])
        if MASK:
            row = place[None, :]
            p = tl.where(_visible(row < queries, row + shift, col[:, None], left, right, LEFT, RIGHT), p, 0.0)
        g1, g2 = load(do_ptr, i, queries, stride_g, V1, V2, DV, BLOCK_M, WIDEN)
        dv1, dv2 = add_dot(dv1, dv2, p, g1, g2, V2 > 0, WIDEN)
        delta = tl.load(stat_ptr + plane + place, mask=place < queries, other=0.0)
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
    """dk and dv of one block of keys of one key head, over its query heads, one after the other, and the queries that
    see it: one program writes each, so nothing is added by atomics."""
    at = tl.program_id(0)
    first = at % blocks * BLOCK_N  # under a causal mask the first keys have the most queries
    kv, b = tl.cast(at // blocks % K, tl.int64), at // blocks // K
    k_start, keys = _sequence(cu_k_ptr, b)
    if first >= keys:
        return
    q_start, queries = _sequence(cu_q_ptr, b)
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
    begin, whole_begin, whole_end, end = _bounds(
        first - shift, last - shift, right, left, queries, RIGHT, LEFT, BLOCK_M)
    if not LEFT:
        whole_end = tl.maximum(whole_begin, end)  # rows past the last query need no mask: their p is 0
    plane = tl.cast(K * shared, tl.int64) * N
    for g in range(0, shared):
        h = kv * shared + g
        q_head = q_ptr + q_start * stride_qn + h * stride_qh
        do_head = do_ptr + q_start * stride_gn + h * stride_gh
        stat_head = stat_ptr + h * N + q_start
        if RIGHT:
            dk1, dk2, dv1, dv2 = _dkv_over(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_head, do_head, stat_head, plane, stride_qn, stride_gn,
                col, shift, begin, whole_begin, queries, left, right, factor, cap, True, LEFT, RIGHT,
                SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_M)
        dk1, dk2, dv1, dv2 = _dkv_over(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_head, do_head, stat_head, plane, stride_qn, stride_gn,
            col, shift, whole_begin, whole_end, queries, left, right, factor, cap, False, LEFT, RIGHT,
            SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_M)
        if LEFT:
            dk1, dk2, dv1, dv2 = _dkv_over(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_head, do_head, stat_head, plane, stride_qn, stride_gn,
                col, shift, whole_end, end, queries, left, right, factor, cap, True, LEFT, RIGHT,
                SOFTCAP, WIDEN, D, D1, D2, DV, V1, V2, BLOCK_M)
    store(dk_ptr + k_start * stride_dkn + kv * stride_dkh, dk1 * scale, dk2 * scale, first, keys, stride_dkn,
          D1, D2, D, BLOCK_N)
    store(dv_ptr + k_start * stride_dvn + kv * stride_dvh, dv1, dv2, first, keys, stride_dvn, V1, V2, DV, BLOCK_N)

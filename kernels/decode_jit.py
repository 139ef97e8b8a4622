"""The Triton kernels of decode.py, whose docstring has the equations."""
import triton
import triton.language as tl

from .attention_core_jit import LOW, dot_t, in_log2, load, online, store


@triton.jit
def _reach(past, new, slots, window, WINDOW: tl.constexpr):
    """The slots that some of the `new` tokens of a row see, as begin and end; the first of them is in slot `past`."""
    begin, end = 0, tl.minimum(past + new, slots)
    if WINDOW:
        begin = tl.maximum(past + 1 - window, 0)
    return begin, end


@triton.jit(do_not_specialize=["slots", "splits", "window"])
def split_kernel(
    q1_ptr, q2_ptr, k_ptr, v_ptr, past_ptr, part_ptr, lse_ptr,  # … -> [B, K, rows, splits, Dv], [B, K, rows, splits]
    new, K, shared, slots, splits,
    stride_q1b, stride_q1t, stride_q1h, stride_q2b, stride_q2t, stride_q2h,
    stride_kb, stride_km, stride_kh, stride_vb, stride_vm, stride_vh, stride_past,
    window, factor: tl.float32, cap: tl.float32,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LATENT: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):
    """Normalised output and log-sum-exp, in log 2, of BLOCK_R of the new · shared queries of one key head over one
    split of SPLIT slots of one row.

    q1, q2 [B, new, H, D1 and D2] are the parts of a query, k [B, M, K, Dqk] and v [B, M, K, Dv] the cache, past [B]
    integer; LATENT: the first part of a key is its value. Grid (blocks of BLOCK_R · K · B, splits); beyond the end of a
    row nothing is written.
    """
    split = tl.program_id(1)
    rows = new * shared
    across = tl.cdiv(rows, BLOCK_R)
    at = tl.program_id(0)
    first = at % across * BLOCK_R
    kv, b = tl.cast(at // across % K, tl.int64), tl.cast(at // across // K, tl.int64)
    past = tl.load(past_ptr + b * stride_past).to(tl.int32)
    begin, end = _reach(past, new, slots, window, WINDOW)
    begin = tl.maximum(begin // BLOCK_N * BLOCK_N, split * SPLIT)
    end = tl.minimum(end, split * SPLIT + SPLIT)
    if begin >= end:
        return
    row = first + tl.arange(0, BLOCK_R)
    t = row // shared
    h = kv * shared + row % shared  # in 64 bits, as kv
    inside = (row < rows)[:, None]
    dims1 = tl.arange(0, D1)[None, :]
    q1 = tl.load(q1_ptr + b * stride_q1b + (t.to(tl.int64) * stride_q1t + h * stride_q1h)[:, None] + dims1,
                 mask=inside & (dims1 < D), other=0.0)
    q2 = q1
    if D2 > 0:
        dims2 = tl.arange(0, D2)[None, :]
        q2 = tl.load(q2_ptr + b * stride_q2b + (t.to(tl.int64) * stride_q2t + h * stride_q2h)[:, None] + dims2,
                     mask=inside & (dims2 < D - D1), other=0.0)
    if WIDEN:
        q1, q2 = q1.to(tl.float32), q2.to(tl.float32)
    k_ptr += b * stride_kb + kv * stride_kh
    v_ptr += b * stride_vb + kv * stride_vh
    acc1 = tl.zeros([BLOCK_R, V1], tl.float32)
    acc2 = acc1
    if V2 > 0:
        acc2 = tl.zeros([BLOCK_R, V2], tl.float32)
    m = tl.full([BLOCK_R], LOW, tl.float32)
    s = tl.zeros([BLOCK_R], tl.float32)
    own = (past + t)[:, None]  # the slot of the query's token
    for j in range(begin, end, BLOCK_N):
        k1, k2 = load(k_ptr, j, end, stride_km, D1, D2, D, BLOCK_N, WIDEN)
        z = in_log2(dot_t(q1, q2, k1, k2, D2 > 0), factor, cap, SOFTCAP)
        slot = j + tl.arange(0, BLOCK_N)[None, :]
        mask = (slot < end) & (slot <= own)
        if WINDOW:
            mask = mask & (slot > own - window)
        z = tl.where(mask, z, float("-inf"))
        v1, v2 = k1, k1
        if not LATENT:
            v1, v2 = load(v_ptr, j, end, stride_vm, V1, V2, DV, BLOCK_N, WIDEN)
        acc1, acc2, m, s = online(acc1, acc2, m, s, z, v1, v2, V2 > 0, WIDEN)
    some = s != 0  # NaN too, which must propagate
    s = tl.where(some, s, 1.0)
    inverse = 1 / s[:, None]
    out = (b * K + kv) * rows * splits + split
    store(part_ptr + out * DV, acc1 * inverse, acc2 * inverse, first, rows, splits * DV, V1, V2, DV, BLOCK_R)
    lse = tl.where(some, m + tl.log2(s), float("-inf"))
    tl.store(lse_ptr + out + tl.cast(row, tl.int64) * splits, lse, mask=row < rows)


@triton.jit(do_not_specialize=["slots", "splits", "window"])
def merge_kernel(
    part_ptr, lse_ptr, past_ptr, o_ptr,  # [B, K, rows, splits, Dv], [B, K, rows, splits], [B] -> [B, T, H, Dv]
    new, K, shared, slots, splits, stride_past, window,
    WINDOW: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, SPLIT: tl.constexpr,
):
    """One query: o = Σ_i 2^(lse_i - m) o_i / Σ_i 2^(lse_i - m) over the splits its row reached, in order.
    Grid (B · K · new · shared)."""
    at = tl.cast(tl.program_id(0), tl.int64)
    rows = new * shared
    row, kv, b = at % rows, at // rows % K, at // rows // K
    past = tl.load(past_ptr + b * stride_past).to(tl.int32)
    begin, end = _reach(past, new, slots, window, WINDOW)
    dims = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    m, s = tl.cast(LOW, tl.float32), tl.cast(0.0, tl.float32)
    for i in range(begin // SPLIT, tl.cdiv(end, SPLIT)):
        lse = tl.load(lse_ptr + at * splits + i)
        part = tl.load(part_ptr + (at * splits + i) * DV + dims, mask=dims < DV, other=0.0)
        m_new = tl.maximum(m, lse)
        shrink, weight = tl.exp2(m - m_new), tl.exp2(lse - m_new)
        acc, s, m = acc * shrink + part * weight, s * shrink + weight, m_new
    o = acc / tl.where(s == 0, 1.0, s)
    head = (b * new + row // shared) * K * shared + kv * shared + row % shared
    tl.store(o_ptr + head * DV + dims, o, mask=dims < DV)

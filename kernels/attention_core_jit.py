"""Functions that the Triton kernels of attention and decoding share: heads in two parts, scores, the running softmax.

A head of D dimensions is split into two parts whose widths D1 and D2 are powers of two, as the sides of a tile must be:
192 = 128 + 64, 96 = 64 + 32 and 80 = 64 + 16 need no padding. D2 = 0 means no second part; its variables then repeat
the first. The offset of a tile is a 64-bit scalar; only offsets inside a tile are 32-bit tensors.
"""
import triton
import triton.language as tl

from .softcap_jit import softcap

LOW = tl.constexpr(-1e38)  # a maximum before any key: exp2(LOW - m) is 0, and LOW - LOW is 0 and not NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _part(ptr, first, length, stride, AT: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
          WIDEN: tl.constexpr):
    """x[first : first + BLOCK, AT : AT + WIDTH], with zeros from row `length` and column D on; ptr: x[0, 0]."""
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
    """Rows first … first + BLOCK - 1 of x [length, D], at ptr and `stride` apart -> [BLOCK, D1] and [BLOCK, D2]."""
    x1 = _part(ptr, first, length, stride, 0, D1, D, BLOCK, WIDEN)
    x2 = x1
    if D2 > 0:
        x2 = _part(ptr, first, length, stride, D1, D2, D, BLOCK, WIDEN)
    return x1, x2


@triton.jit
def store(ptr, x1, x2, first, length, stride, D1: tl.constexpr, D2: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load`: store x1 [BLOCK, D1] and x2 [BLOCK, D2], except rows from `length` on."""
    rows = tl.arange(0, BLOCK)[:, None]
    at = ptr + tl.cast(first, tl.int64) * stride + rows * stride
    inside = rows < length - first
    dims = tl.arange(0, D1)[None, :]
    tl.store(at + dims, x1, mask=inside & (dims < D))
    if D2 > 0:
        dims = D1 + tl.arange(0, D2)[None, :]
        tl.store(at + dims, x2, mask=inside & (dims < D))


@triton.jit
def dot_t(a1, a2, b1, b2, SECOND: tl.constexpr):
    """a [n, D] and b [m, D] in parts -> a bᵀ [n, m] in fp32; SECOND: there is a second part."""
    out = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if SECOND:
        out = tl.dot(a2, tl.trans(b2), out, input_precision="ieee")
    return out


@triton.jit
def add_dot(acc1, acc2, p, x1, x2, SECOND: tl.constexpr, WIDEN: tl.constexpr):
    """acc [n, D] fp32 and x [m, D] in parts, p [n, m] -> acc + p x in parts; p is rounded to the dtype of x."""
    if not WIDEN:
        p = p.to(x1.dtype)
    acc1 = tl.dot(p, x1, acc1, input_precision="ieee")
    if SECOND:
        acc2 = tl.dot(p, x2, acc2, input_precision="ieee")
    return acc1, acc2


@triton.jit
def in_log2(x, factor, cap, SOFTCAP: tl.constexpr):
    """The score z = softcap(scale · x) in units of log 2, of the shape of x = q·k; factor is scale · log₂e, and cap
    that of softcap times log₂e."""
    z = x * factor
    if SOFTCAP:
        z = softcap(z, cap)
    return z


@triton.jit
def online(acc1, acc2, m, s, z, v1, v2, SECOND: tl.constexpr, WIDEN: tl.constexpr):
    """Update the running output acc [rows, Dv] in parts, maximum m and sum s [rows] with more keys: their scores
    z [rows, keys] in log 2, and values v [keys, Dv] in parts -> acc1, acc2, m, s."""
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
def sequence(cu_ptr, b):
    """cu [B + 1] int32 -> first token of sequence b, in 64 bits, and its number of tokens."""
    start = tl.load(cu_ptr + b)
    return start.to(tl.int64), tl.load(cu_ptr + b + 1) - start


@triton.jit
def visible(inside, i, j, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which pairs, of those `inside` the sequence (bool), are in the band; i [n, 1] or [1, n] is already shifted, j is
    its transpose in shape; LEFT, RIGHT: whether that side is bounded."""
    if LEFT:
        inside = inside & (j >= i - left)
    if RIGHT:
        inside = inside & (j <= i + right)
    return inside


@triton.jit
def bounds(first, last, low, high, length, LOW_SIDE: tl.constexpr, HIGH_SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The columns, of `length`, that rows first … last see, where row x sees the columns x - low … x + high.

    Returns begin, whole_begin, whole_end, end. Some row sees a column from begin to end; all rows see those from
    whole_begin to whole_end, in whole blocks, which need no mask. LOW_SIDE, HIGH_SIDE: whether that side is bounded.
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

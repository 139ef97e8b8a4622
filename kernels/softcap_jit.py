"""The softcap of attention's scores and of a head's logits."""
import triton
import triton.language as tl


@triton.jit
def softcap(z, cap):
    """c · tanh(z / c) in fp32, of z of any shape and a scalar c > 0.

    With y = (z / c)² and e = exp(-2|z| / c): z + z y p(y) where y < 1, beyond it ±(c - c · 2e / (1 + e)). In
    both, rounding affects a correction of at most a third of the result, whose error is thus at most two units of its
    last place; c (1 - e) / (1 + e) and c (2 σ(2z / c) - 1) lose the digits of a small z.

    p, of degree 6, is the best approximation of (tanh(r) / r - 1) / r² on |r| <= 1 for the relative error of tanh(r),
    5e-9 at most, found by exchanging (Remez) in fp64.
    """
    r = z * (1 / cap)
    y = r * r
    p = -0.000358452015 * y + 0.00230136463
    p = p * y - 0.00794610647
    p = p * y + 0.0214866576
    p = p * y - 0.0538798027
    p = p * y + 0.133323446
    p = p * y - 0.333332954
    e = tl.exp2(tl.abs(z) * (-2.8853900817779268 / cap))  # -2 log₂e
    far = cap - cap * (2 * e / (1 + e))
    return tl.where(y < 1, z + z * (y * p), tl.where(z < 0, -far, far))

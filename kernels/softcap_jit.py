"""tanh, as the scores of attention and the logits of a head take it."""
import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh x, of fp32 of any shape.

    2 σ(2x) - 1 loses the digits of a small x, which its Taylor series keeps (to 1e-8 below 1/4).
    """
    y = x * x
    small = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 0.0625, small, 2 * tl.sigmoid(2 * x) - 1)

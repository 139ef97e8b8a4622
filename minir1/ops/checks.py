"""Checks of arguments that several operations share."""
import math

from torch import Tensor


def check_numbers(
    *, window: int | None = None, softcap: float | None = None, temperature: float = 1.0, chunk_bytes: int | None = None
) -> None:
    """ValueError unless window >= 1, 0 < softcap < inf, temperature > 0 and chunk_bytes > 0."""
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be at least 1, or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}: must be above 0 and finite, or None")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes={chunk_bytes}: must be above 0, or None")


def check_heads(**tensors: Tensor) -> None:
    """ValueError unless all are floats of one dtype on one device, and none is expanded."""
    (first, q), *_ = tensors.items()
    for name, x in tensors.items():
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, {first} {q.dtype}: want one floating dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, {first} on {q.device}: want one device")
        if x.numel() and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
            raise ValueError(f"{name} has stride 0 (strides {x.stride()} of {tuple(x.shape)}): give it memory with "
                             ".contiguous(), or one key head instead of an expanded one")

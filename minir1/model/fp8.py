"""fp8 weights with one scale per block, as DeepSeek-V3 is published (arXiv:2412.19437, section 3.3.2)."""

from __future__ import annotations

from torch import Tensor

from minir1.model.typed import is_a, shown

SCALE = "_scale_inv"  # the scales of X.weight are the tensor X.weight_scale_inv


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """How many scales a matrix [rows, columns] has: one per block; the last blocks may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize(q: Tensor, scale: Tensor, out: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """w = q · s in fp32, written into `out` and returned. The workspace is one row of blocks.

    q: float8_e4m3fn [rows, columns]; scale: fp32, one number per block; out: any float [rows, columns]. ValueError if
    the shapes do not match.
    """
    if scale.shape != scale_shape(q.shape, block) or out.shape != q.shape:
        raise ValueError(
            f"weights {tuple(q.shape)} in blocks of {block} need scales {scale_shape(q.shape, block)} and an output "
            f"of their shape, got scales {tuple(scale.shape)} and an output {tuple(out.shape)}"
        )
    columns = scale.float().repeat_interleave(block[1], dim=1)[:, : q.shape[1]]
    for rows, factor, part in zip(q.split(block[0]), columns, out.split(block[0])):
        part.copy_(rows.float() * factor)
    return out


def block_of(config: dict) -> tuple[int, int] | None:
    """The block size in the `quantization_config` of a config.json, or None where nothing is quantised.

    ValueError unless quant_method is fp8, fmt is e4m3 and there is a weight_block_size.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return None
    stated = {"fmt": "e4m3"} | stated
    also = ", and 'bitsandbytes' in 4 bits"
    for name, only, more in (("quant_method", "fp8", also), ("fmt", "e4m3", "")):
        if stated.get(name) != only:
            value = shown(stated.get(name))
            raise ValueError(f"quantization_config: {name} = {value} is not supported, only {only!r}{more}")
    block = stated.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(is_a(n, "int") and n > 0 for n in block)):
        raise ValueError(f"quantization_config: weight_block_size = {shown(block)}: two positive numbers as [128, 128]")
    return tuple(block)

"""Weights in the 4-bit layouts of bitsandbytes, NF4 and FP4 (QLoRA, arXiv:2305.14314, section 3).

A matrix W [rows, columns] of n numbers is cut, row after row, into blocks of 64. A block has one scale s, its largest
|w|, and each number in it is an index q into a code book c of 16 entries in [-1, 1]:

    w_i = c[q_i] · s_{i // 64}                      in fp32, then rounded once to the dtype that W had

Two indices are one byte, the first in its high half. Nested ("double") quantisation keeps the scales in 8 bits too, as
indices p into a code book d of 256 entries, in blocks of 256 with scales t, after their mean was subtracted:

    s_j = d[p_j] · t_{j // 256} + mean

So a number takes 4 + 32/64 = 4.5 bits, nested 4 + 8/64 + 32/(64 · 256) = 4.13. Beside X.weight, which holds the bytes,
a file has X.weight.absmax (s, or p), .quant_map (c), .nested_absmax (t), .nested_quant_map (d), and the rest as JSON.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minir1.files import parse_json
from minir1.model.typed import is_a, shown

BOOKS = {
    # Quantiles of the normal distribution, eight up to zero and nine from zero on (QLoRA, appendix E).
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # A sign, two bits of exponent e, one of mantissa m: (1 + m/2)·2^(4 - e)/12, and m/192 where e = 0.
    "fp4": tuple(sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip
STATE = ".quant_state.bitsandbytes__"  # X.weight.quant_state.bitsandbytes__nf4 is JSON
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FIELDS = {  # of that JSON, and their types
    "quant_type": "str", "blocksize": "int", "dtype": "str", "shape": "list",
    "nested_blocksize": "int | None", "nested_dtype": "str | None", "nested_offset": "float | None",
}  # fmt: skip
STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # dtypes that the bytes may be stored as; bytes
CHUNK = 2**20  # numbers that are dequantised at a time on the CPU, where the workspace should stay in the cache
LARGE_CHUNK = 2**24  # on other devices


class Layout(NamedTuple):
    """How one matrix is stored."""

    kind: str  # nf4 | fp4
    shape: tuple[int, int]
    dtype: torch.dtype  # that the matrix had
    block: int  # numbers with one scale
    nested_block: int | None  # scales with one scale; None: not nested
    offset: float  # mean of the scales, 0 where they are not nested


class Packed(NamedTuple):
    """A matrix of n numbers in b blocks."""

    data: Tensor  # uint8 [⌈n/2⌉, 1], two indices q each
    absmax: Tensor  # s, fp32 [b]; nested p, uint8 [b]
    book: Tensor  # c, fp32 [16]
    nested_absmax: Tensor | None  # t, fp32 [⌈b/256⌉]
    nested_book: Tensor | None  # d, fp32 [256]

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        return Packed(*(None if part is None else part.to(device) for part in self))


PARTS = Packed("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")  # what their names end in


def scales(packed: Packed, layout: Layout) -> Tensor:
    """s of every block, fp32 [b]; s_j = d[p_j] · t_{j // 256} + mean where they are nested."""
    if layout.nested_block is None:
        return packed.absmax
    d = packed.nested_book.index_select(0, packed.absmax.int())
    return _times(d, packed.nested_absmax, layout.nested_block).add_(layout.offset)


def dequantize(packed: Packed, layout: Layout, out: Tensor) -> Tensor:
    """w = c[q] · s in fp32, rounded to the dtype that W had, written into `out` and returned.

    out: [rows, columns], contiguous, of any float dtype. The workspace is one chunk, of 8 bytes per number.
    """
    assert out.shape == layout.shape and out.is_contiguous()
    s, flat, block = scales(packed, layout), out.view(-1), layout.block
    # c of both halves of each byte, [256, 2]; as 64-bit integers they are gathered four times as fast as in pairs.
    pairs = torch.cartesian_prod(packed.book, packed.book).view(torch.int64).flatten()
    step = max(1, (CHUNK if out.device.type == "cpu" else LARGE_CHUNK) // (2 * block)) * 2 * block
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        index = packed.data[start // 2 : (start + step) // 2].flatten().int()
        codes = pairs.index_select(0, index).view(torch.float32)[: len(part)]
        each = s[start // block : (start + step) // block]
        w = _times(codes, each, block)
        part.copy_(w if out.dtype == layout.dtype else w.to(layout.dtype))
    return out


def _times(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """Each block of codes times its scale, in place; the last block may be shorter. codes: [n]; scale: [⌈n/block⌉]."""
    whole = len(codes) // block
    codes[: whole * block].view(whole, block).mul_(scale[:whole].unsqueeze(1))
    codes[whole * block :].mul_(scale[whole:])
    return codes


def code_book(kind: str) -> Tensor:
    """c, fp32 [16]."""
    return torch.tensor(BOOKS[kind])


# ---- what files state --------------------------------------------------------------------------


def is_four_bit(config: dict) -> bool:
    """Whether the `quantization_config` of a config.json is that of bitsandbytes' 4 bits.

    ValueError for its 8 bits. False where nothing is quantised, or by another method.
    """
    stated = config.get("quantization_config") or {}
    bits = {field: stated.get(field) for field in ("load_in_4bit", "load_in_8bit")}
    if stated.get("quant_method") != "bitsandbytes" and not ("quant_method" not in stated and any(bits.values())):
        return False
    if bits["load_in_4bit"] is not True or bits["load_in_8bit"]:
        raise ValueError(
            f"quantization_config: bitsandbytes with load_in_4bit = {shown(bits['load_in_4bit'])} and load_in_8bit = "
            f"{shown(bits['load_in_8bit'])} is not supported, only its 4 bits"
        )
    return True


def layout_of(name: str, state: Tensor) -> Layout:
    """The layout that the bytes of the tensor `name`, X.weight.quant_state.bitsandbytes__nf4, describe as JSON.

    ValueError for a field that is absent, unknown, of another type or not supported.
    """
    try:
        stated = parse_json(bytes(state.flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if not (isinstance(stated, dict) and _is_supported(stated)):
        raise ValueError(
            f"{name} = {shown(stated)} is not supported: need quant_type {' or '.join(BOOKS)}, an even blocksize, the "
            f"shape of a matrix, dtype {', '.join(DTYPES)}, and the three nested fields, in float32, or none of them"
        )
    kind, shape, dtype = stated["quant_type"], tuple(stated["shape"]), DTYPES[stated["dtype"]]
    nested = stated.get("nested_blocksize"), stated.get("nested_offset") or 0.0
    return Layout(kind, shape, dtype, stated["blocksize"], *nested)


def _is_supported(stated: dict) -> bool:
    if not (stated.keys() <= FIELDS.keys() and all(is_a(stated.get(name), kind) for name, kind in FIELDS.items())):
        return False
    sizes = [stated["blocksize"], *stated["shape"]]
    nested = [stated.get(name) for name in ("nested_blocksize", "nested_dtype", "nested_offset")]
    return (
        all(is_a(n, "int") and n > 0 for n in sizes)
        and (len(sizes), sizes[0] % 2) == (3, 0)
        and stated["quant_type"] in BOOKS
        and stated["dtype"] in DTYPES
        and (nested == [None] * 3 or None not in nested and nested[0] > 0 and nested[1] == "float32")
    )


def stored_as(name: str, layout: Layout, storage: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors of the matrix `name` in a file -> shape and safetensors' dtype; without the JSON.

    storage: the dtype of the bytes, one of STORAGE; for another, U8 is what is expected.
    """
    n, nested = layout.shape[0] * layout.shape[1], layout.nested_block
    blocks = -(-n // layout.block)
    storage = storage if storage in STORAGE else "U8"
    entries = [
        ((-(-n // (2 * STORAGE[storage])), 1), storage),
        ((blocks,), "U8" if nested else "F32"),
        ((16,), "F32"),
        *([((-(-blocks // nested),), "F32"), ((256,), "F32")] if nested else []),
    ]
    return {name + part: entry for part, entry in zip(PARTS, entries)}


def packed_of(tensors: dict[str, Tensor], name: str, layout: Layout) -> Packed:
    """The tensors of `stored_as` as a matrix. ValueError for another code book than that of the layout's kind."""
    packed = Packed(*(tensors.get(name + part) for part in PARTS))
    book = code_book(layout.kind)
    if not torch.allclose(packed.book, book, rtol=0, atol=1e-3):  # bitsandbytes uses its own, whatever is stored
        raise ValueError(f"{name}{PARTS.book} = {shown(packed.book.tolist())}: not the code book of {layout.kind}")
    size = -(-layout.shape[0] * layout.shape[1] // 2)
    return packed._replace(data=packed.data.flatten().view(torch.uint8)[:size].unsqueeze(1), book=book)

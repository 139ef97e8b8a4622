"""Layers whose matrix stays in 4 bits and is dequantised for each product, as QLoRA trains on (arXiv:2305.14314).

They stand in for nn.Linear in the blocks of dense models with grouped-query attention (Llama, Qwen, Granite). What
needs the matrix itself takes `weight`, which dequantises it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minir1.model.four_bit import Layout, Packed, dequantize, stored_as
from minir1.ops.chunks import refuse_second_derivative


class PackedLinear(nn.Module):
    """y = W x + b with W in 4 bits. x: [..., in] -> [..., out].

    W is dequantised for the product, and once more in the backward pass for the gradient of x, so that between the two
    there is no copy of it in 16 bits. It is not trained, and no part of state_dict.
    """

    def __init__(self, base: nn.Linear, layout: Layout):
        super().__init__()
        self.in_features, self.out_features, self.layout = base.in_features, base.out_features, layout
        self.bias = base.bias
        self.register_buffer("like", base.weight.new_empty(0), persistent=False)  # device and dtype of `weight`
        for name, (shape, stored) in zip(Packed._fields, stored_as("", layout, "U8").values()):
            dtype = torch.uint8 if stored == "U8" else torch.float32
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=self.like.device), persistent=False)

    def _apply(self, fn, recurse=True):
        before = self.packed
        super()._apply(fn, recurse)
        for name, tensor in zip(Packed._fields, before):
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:  # no `.to(bfloat16)` rounds the scales
                setattr(self, name, tensor.to(self.like.device))
        return self

    @property
    def packed(self) -> Packed:
        """The matrix as it is kept."""
        return Packed(*(getattr(self, name, None) for name in Packed._fields))

    @property
    def weight(self) -> Tensor:
        """W, dequantised: [out, in]."""
        return dequantize(self.packed, self.layout, self.like.new_empty(self.layout.shape))

    @torch.no_grad()
    def fill(self, packed: Packed) -> None:
        """Copy the parts of a matrix in."""
        for ours, tensor in zip(self.packed, packed):
            if ours is not None:
                ours.copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b"""
        return _Product.apply(x, self.bias, self)


class _Product(torch.autograd.Function):
    """F.linear, which would keep the dequantised matrix for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.weight.to(x.dtype), bias)  # on several ranks it is dequantised to fp32

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivative()
        of_x, of_bias, _ = ctx.needs_input_grad
        w = ctx.layer.weight.to(grad.dtype) if of_x else None  # under autocast they differ
        return (grad @ w).to(ctx.dtype) if of_x else None, grad.flatten(0, -2).sum(0) if of_bias else None, None


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Name in the model -> layer in 4 bits."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@torch.no_grad()
def unpack(model: nn.Module) -> nn.Module:
    """Dequantise every layer in 4 bits, one after the other, in place: the result has nn.Linear layers only."""
    for name in list(packed_layers(model)):
        layer = model.get_submodule(name)
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight, linear.bias = nn.Parameter(layer.weight), layer.bias
        model.set_submodule(name, linear)
        del layer
    return model

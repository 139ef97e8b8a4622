"""One layer: attention, then a feed-forward, each after a norm and added to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minir1.model.cache import Cache
from minir1.model.config import ModelConfig
from minir1.model.gqa import GQA
from minir1.model.mla import MLA
from minir1.model.moe import MoE, Routing, SwiGLU
from minir1.model.packed_linear import PackedLinear
from minir1.model.packing import Packing

SMALL = 2**18  # numbers in the largest matrix that decoding copies or multiplies into another


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); Granite scales both outputs by residual_scale."""

    recompute = False  # see Transformer.recompute

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.scale = config.residual_scale
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = MLA(config) if config.attention == "mla" else GQA(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = MoE(config) if config.is_moe(layer) else SwiGLU(config.dim, config.ffn)

    def feed_forward(self, x: Tensor, record: list[Routing] | None, routes: Tensor | None = None, fused=None) -> Tensor:
        """x: [..., D] -> [..., D]; record, routes and fused as for `MoE.forward`."""
        x_norm = self.ffn_norm(x)
        choices = (record, routes) if isinstance(self.ffn, MoE) else ()
        return self.add(x, self.ffn(x_norm, *choices, fused=fused))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """The residual stream x with a sublayer's output, both [..., D]."""
        return x + out if self.scale == 1.0 else x + self.scale * out

    def forward(self, x: Tensor, freqs_cis: Tensor, packing: Packing, record=None, past=None, routes=None):
        """Rows without a cache, or a chunk after the slots `past` [B, S, ...]. x: [N, D] -> [N, D], cache entries.

        The routing is appended to `record`, if any, and once more in the backward pass where it is recomputed.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return self._forward(x, freqs_cis, packing, record, past, routes)
        arguments = x, freqs_cis, packing, record, past, routes
        return checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    def _forward(self, x: Tensor, freqs_cis: Tensor, packing: Packing, record, past, routes):
        out, entry = self.attention(self.attention_norm(x), freqs_cis, packing, past)
        return self.feed_forward(self.add(x, out), record, routes), entry

    def decode(self, x: Tensor, freqs_cis: Tensor, cache: Cache, positions: Tensor, bias: Tensor, record=None):
        """New tokens after those in the cache. x: [B, T, D] -> [B, T, D]; the others as for `MLA.decode`."""
        attention, ffn = self.fused_matrices(cache)
        out = self.attention.decode(self.attention_norm(x), freqs_cis, cache, self.layer, positions, bias, attention)
        return self.feed_forward(self.add(x, out), record, fused=ffn)

    def fused_matrices(self, cache: Cache) -> list[tuple[Tensor, ...] | None]:
        """`fuse()` of attention and feed-forward, made at the first token that is decoded over this cache.

        In a small model calling operators costs more than their arithmetic. None for large matrices, in 4 bits, with
        adapters, for experts on several ranks, and under autograd; in 16 bits and under autocast too, where products
        and sums of matrices are rounded and the sampler would not be the policy of the loss.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled(cache.length.device.type):
            return [None, None]
        if self.layer not in cache.fused:
            cache.fused[self.layer] = [m.fuse() if _may_fuse(m) else None for m in (self.attention, self.ffn)]
        return cache.fused[self.layer]


def _may_fuse(module: nn.Module) -> bool:
    """Whether all matrices of a module are small, on this rank, neither in 16 nor in 4 bits, and no adapters."""
    if any(isinstance(part, PackedLinear) for part in module.modules()):
        return False
    if isinstance(module, MoE) and module.experts.mesh is not None:
        return False
    parts = module.named_parameters()
    return all(p.numel() <= SMALL and p.dtype.itemsize >= 4 and not name.endswith((".A", ".B")) for name, p in parts)

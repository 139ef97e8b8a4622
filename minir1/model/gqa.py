"""Grouped-query attention (arXiv:2305.13245): H query heads share K key and value heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minir1.model.attention import KEY_BLOCK, cached_attention, chunk_attention, packed_attention
from minir1.model.cache import Cache
from minir1.model.config import ModelConfig
from minir1.model.packing import Packing
from minir1.model.rope import rotate


class GQA(nn.Module):
    """o = W^O [softmax(q_i·k_{i·K/H} / √d) v_{i·K/H}]_i with RoPE on q and k (halves, as in Llama and Qwen)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, size = config.heads, config.kv_heads, config.head_size
        self.scale = config.attention_scale or size**-0.5
        self.wq = nn.Linear(config.dim, config.heads * size, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, config.kv_heads * size, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, config.kv_heads * size, bias=config.qkv_bias)
        self.wo = nn.Linear(config.heads * size, config.dim, bias=config.o_bias)
        self.q_head_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_head_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [..., D] -> q [..., H, d], k [..., K, d], v [..., K, d]."""
        q = self.q_head_norm(self.wq(x).unflatten(-1, (self.heads, -1)))
        k = self.k_head_norm(self.wk(x).unflatten(-1, (self.kv_heads, -1)))
        q, k = rotate(q, cos, sin, interleaved=False), rotate(k, cos, sin, interleaved=False)
        return q, k, self.wv(x).unflatten(-1, (self.kv_heads, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing, past: Tensor | None = None):
        """Rows without a cache, or the next chunk of rows whose earlier tokens are in the cache.

        x: [N, D]; past: [B, S, 2, K, d]. Returns the output [N, D] and the cache's entries, [N, 2, K, d].
        """
        q, k, v = self.project(x, cos, sin)
        if past is None:
            o = packed_attention(q, k, v, packing, self.scale)
        else:
            qkv = packing.pad(q), packing.pad(k), packing.pad(v)
            blocks = (block.unbind(2) for block in past.split(KEY_BLOCK, dim=1))
            o = packing.pack(chunk_attention(*qkv, blocks, self.scale))
        return self.wo(o.flatten(1)), torch.stack((k, v), dim=1)

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, layer: int, positions: Tensor, bias: Tensor):
        """New tokens after those in the cache. x: [B, T, D]; positions: [B, T]; bias: [B, T, M] -> [B, T, D]."""
        q, k, v = self.project(x, cos, sin)
        past = cache.write(layer, positions, torch.stack((k, v), dim=2))
        o = cached_attention(q, past[:, :, 0], past[:, :, 1], positions, bias, self.scale)
        return self.wo(o.flatten(2))

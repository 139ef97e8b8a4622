"""Grouped-query attention (arXiv:2305.13245): H query heads share K key and value heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        size = self.size = config.head_size
        self.widths = (config.heads * size, config.kv_heads * size, config.kv_heads * size)  # of q, k and v
        self.scale = config.attention_scale or size**-0.5
        self.wq, self.wk, self.wv = (nn.Linear(config.dim, width, bias=config.qkv_bias) for width in self.widths)
        self.wo = nn.Linear(config.heads * size, config.dim, bias=config.o_bias)
        self.q_head_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_head_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, freqs_cis: Tensor, fused=None) -> tuple[Tensor, Tensor, Tensor]:
        """x: [..., D] -> q [..., H, d], k [..., K, d], v [..., K, d]. fused: `fuse()`, or None."""
        qkv = F.linear(x, *fused).split(self.widths, dim=-1) if fused else (self.wq(x), self.wk(x), self.wv(x))
        q, k, v = (part.unflatten(-1, (-1, self.size)) for part in qkv)
        qk = rotate(torch.cat((self.q_head_norm(q), self.k_head_norm(k)), dim=-2), freqs_cis, interleaved=False)
        return *qk.split((q.shape[-2], k.shape[-2]), dim=-2), v

    def forward(self, x: Tensor, freqs_cis: Tensor, packing: Packing, past: Tensor | None = None):
        """Rows without a cache, or the next chunk of rows whose earlier tokens are in the cache.

        x: [N, D]; past: [B, S, 2, K, d]. Returns the output [N, D] and the cache's entries, [N, 2, K, d].
        """
        q, k, v = self.project(x, freqs_cis)
        if past is None:
            o = packed_attention(q, k, v, packing, self.scale)
        else:
            qkv = packing.pad(q), packing.pad(k), packing.pad(v)
            blocks = (block.unbind(2) for block in past.split(KEY_BLOCK, dim=1))
            o = packing.pack(chunk_attention(*qkv, blocks, self.scale))
        return self.wo(o.flatten(1)), torch.stack((k, v), dim=1)

    def fuse(self) -> tuple[Tensor, Tensor | None]:
        """W^Q, W^K and W^V as one matrix, [(H + 2K)·d, D], and their biases."""
        parts = self.wq, self.wk, self.wv
        bias = None if self.wq.bias is None else torch.cat([part.bias for part in parts])
        return torch.cat([part.weight for part in parts]), bias

    def decode(self, x, freqs_cis, cache: Cache, layer: int, positions: Tensor, bias: Tensor, fused=None) -> Tensor:
        """New tokens after the cache's. fused: `fuse()`, or None. The others, and the result, as for `MLA.decode`."""
        q, k, v = self.project(x, freqs_cis, fused)
        past = cache.write(layer, positions, torch.stack((k, v), dim=2))
        o = cached_attention(q, past[:, :, 0], past[:, :, 1], positions, bias, self.scale)
        return self.wo(o.flatten(2))

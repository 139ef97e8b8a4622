"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1; V3, arXiv:2412.19437, section 2.1.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minir1.model.attention import KEY_BLOCK, cached_latent_attention, chunk_attention, packed_attention
from minir1.model.cache import Cache
from minir1.model.config import ModelConfig
from minir1.model.packing import Packing
from minir1.model.rope import rotate
from minir1.ops.chunks import within_fp16


class MLA(nn.Module):
    """Keys and values of all heads come from one latent c of kv_lora numbers; position has a key of its own, k_rope.

        c      = RMSNorm(W^DKV x)                       k_rope = RoPE(W^KR x), one for all heads
        k_i    = [W^UK_i c ; k_rope]                    v_i    = W^UV_i c
        q_i    = [W^UQ_i x ; RoPE(W^QR_i x)]            o      = W^O [softmax(q_i·k_i / √(nope + rope)) v_i]_i

    W^UK and W^UV are `wkv_b`, W^DKV and W^KR are `wkv_a`; queries have a latent too when q_lora is set. Over a cache
    the products are absorbed, q_i·k_i = (W^UKᵀ_i q_nope)·c + q_rope·k_rope, so that the cache holds only c and k_rope:
    kv_lora + rope numbers per token and layer.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.nope, self.rope = config.heads, config.nope, config.rope
        self.kv_lora, self.v_dim = config.kv_lora, config.v_dim
        scale = config.attention_scale or (config.nope + config.rope) ** -0.5
        self.scale = scale * config.rope_scaling.logit_factor
        q_out = config.heads * (config.nope + config.rope)
        if config.q_lora is None:
            self.wq = nn.Linear(config.dim, q_out, bias=False)
        else:
            self.wq_a = nn.Linear(config.dim, config.q_lora, bias=False)
            self.q_norm = nn.RMSNorm(config.q_lora, eps=1e-6)  # 1e-6 in V2 and V3 whatever norm_eps is
            self.wq_b = nn.Linear(config.q_lora, q_out, bias=False)
        self.wkv_a = nn.Linear(config.dim, config.kv_lora + config.rope, bias=False)
        self.kv_norm = nn.RMSNorm(config.kv_lora, eps=1e-6)
        self.wkv_b = nn.Linear(config.kv_lora, config.heads * (config.nope + config.v_dim), bias=False)
        self.wo = nn.Linear(config.heads * config.v_dim, config.dim, bias=False)

    def project(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: [..., D] -> q_nope [..., H, nope], q_rope [..., H, rope], c [..., kv_lora], k_rope [..., rope]."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if hasattr(self, "wq_a") else self.wq(x)
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split((self.nope, self.rope), dim=-1)
        c, k_rope = self.wkv_a(x).split((self.kv_lora, self.rope), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(-2), freqs_cis, interleaved=True).squeeze(-2)
        return q_nope, rotate(q_rope, freqs_cis, interleaved=True), self.kv_norm(c), k_rope

    def expand(self, c: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """c: [..., kv_lora], k_rope: [..., rope] -> keys [..., H, nope + rope], values [..., H, v_dim]."""
        k_nope, v = self.wkv_b(c).unflatten(-1, (self.heads, -1)).split((self.nope, self.v_dim), dim=-1)
        return torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1), v

    def forward(self, x: Tensor, freqs_cis: Tensor, packing: Packing, past: Tensor | None = None):
        """Rows without a cache, or the next chunk of rows whose earlier tokens are in the cache; not absorbed.

        x: [N, D]; freqs_cis: [N, rope/2]; past: [B, S, kv_lora + rope]. Returns the output [N, D] and the cache's
        entries, [N, kv_lora + rope].
        """
        q_nope, q_rope, c, k_rope = self.project(x, freqs_cis)
        k, v = self.expand(c, k_rope)
        q = torch.cat((q_nope, q_rope), dim=-1)
        if past is None:
            o = packed_attention(q, k, v, packing, self.scale)
        else:
            # Every chunk expands the past again, block by block. Absorbed as in decode, a pair of query and key would
            # cost 2·kv_lora + rope products per head, expanded nope + rope + v_dim (V3: 1,088 and 320). Expanding a key
            # costs kv_lora·(nope + v_dim) per head once for all queries of the chunk: it pays from 171 queries on.
            qkv = packing.pad(q), packing.pad(k), packing.pad(v)
            blocks = (block.split((self.kv_lora, self.rope), dim=-1) for block in past.split(KEY_BLOCK, dim=1))
            o = packing.pack(chunk_attention(*qkv, (self.expand(*block) for block in blocks), self.scale))
        return self.wo(o.flatten(1)), torch.cat((c, k_rope), dim=-1)

    def fuse(self) -> tuple[Tensor, Tensor] | None:
        """The matrices of the absorbed products, for many steps with the same weights; None with a q_lora, and where
        they have more than twice the numbers of what they replace.

        W_in [(H + 1)·(kv_lora + rope), D] gives every head's [W^UKᵀ_i W^UQ_i x ; W^QR_i x] and, last, the new key
        [W^DKV x ; W^KR x]; W_out [D, H·kv_lora] is [W^O_i W^UV_i]_i.
        """
        numbers = ((self.heads + 1) * (self.kv_lora + self.rope) + self.heads * self.kv_lora) * self.wkv_a.in_features
        if hasattr(self, "wq_a") or numbers > 2 * sum(p.numel() for p in self.parameters()):
            return None
        w_q, w_qr = self.wq.weight.unflatten(0, (self.heads, -1)).split((self.nope, self.rope), dim=1)
        w_uk, w_uv = self.expansion()
        query = torch.cat((torch.einsum("hnc,hnd->hcd", w_uk, w_q), w_qr), dim=1).flatten(0, 1)
        w_out = torch.einsum("dhv,hvc->dhc", self.wo.weight.unflatten(1, (self.heads, -1)), w_uv)
        return torch.cat((query, self.wkv_a.weight)), w_out.flatten(1)

    def expansion(self) -> tuple[Tensor, Tensor]:
        """W^UK [H, nope, kv_lora] and W^UV [H, v_dim, kv_lora]."""
        return self.wkv_b.weight.unflatten(0, (self.heads, -1)).split((self.nope, self.v_dim), dim=1)

    def decode(self, x, freqs_cis, cache: Cache, layer: int, positions: Tensor, bias: Tensor, fused=None) -> Tensor:
        """New tokens after the cache's, absorbed. fused: `fuse()`, or None. Returns [B, T, D].

        x: [B, T, D]; freqs_cis: complex64 [B, T, rope/2]; positions: int64 [B, T]; bias: [B, T, M].
        """
        if fused is None:
            w_uk, w_uv = self.expansion()
            q_nope, q_rope, c, k_rope = self.project(x, freqs_cis)
            scale, q_nope, q_rope = within_fp16(self.scale, q_nope, q_rope)
            q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, w_uk), q_rope), dim=-1)
            entry = torch.cat((c, k_rope), dim=-1)
        else:
            scale, y = self.scale, F.linear(x, fused[0]).unflatten(-1, (self.heads + 1, -1))
            y[..., self.kv_lora :] = rotate(y[..., self.kv_lora :], freqs_cis, interleaved=True)
            q, entry = y[..., :-1, :], y[..., -1, :]
            entry[..., : self.kv_lora] = self.kv_norm(entry[..., : self.kv_lora])
        latent = cache.write(layer, positions, entry)
        o = cached_latent_attention(q, latent, positions, bias, scale, self.kv_lora)
        if fused is None:
            return self.wo(torch.einsum("bthc,hvc->bthv", o, w_uv).flatten(2))
        return F.linear(o.flatten(2), fused[1])

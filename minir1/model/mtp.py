"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): modules that look one token further ahead each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minir1.model.block import Block
from minir1.model.config import ModelConfig
from minir1.model.packing import Packing


class MTP(nn.Module):
    """The k-th module: from h^{k-1}_i, which has seen t_1 … t_{i+k-1}, and the token t_{i+k}, to a state for t_{i+k+1}.

        h'_i = W_eh [RMSNorm(emb(t_{i+k})) ; RMSNorm(h^{k-1}_i)]        h^k_i = RMSNorm(Block(h'_i))

    Published weights have the embedding in front, where the paper's equation 21 has the state in front. h^0 is what the
    model returns from `hidden`, after its last norm; embedding and head are the model's own.
    """

    def __init__(self, config: ModelConfig, depth: int):
        super().__init__()
        self.enorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.hnorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.block = Block(config, config.layers + depth)
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def combine(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """h'. embedded: emb(t_{i+k}), hidden: h^{k-1}_i, both [..., D] -> [..., D]."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))

    def forward(self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, packing: Packing, record=None):
        """Fresh rows. embedded, hidden: [N, D] -> h^k [N, D], and what a cache keeps of them."""
        out, entry = self.block(self.combine(embedded, hidden), cos, sin, packing, record)
        return self.norm(out), entry

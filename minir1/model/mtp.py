"""Multi-token prediction (MTP; DeepSeek-V3, arXiv:2412.19437, section 2.2): each module predicts one token further."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from minir1.model.block import Block
from minir1.model.cache import Cache
from minir1.model.config import ModelConfig
from minir1.model.packing import Packing, packing


class MTP(nn.Module):
    """The k-th module: from h^{k-1}_i, a function of t_1 … t_{i+k-1}, and the token t_{i+k}, to a state for t_{i+k+1}.

        h'_i = W_eh [RMSNorm(emb(t_{i+k})) ; RMSNorm(h^{k-1}_i)]        h^k_i = RMSNorm(Block(h'_i))

    Published weights put the embedding first, the paper's equation 21 the state. h^0 is the result of the model's
    `hidden`, after its last norm; embedding and head are the model's own.
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

    def forward(self, embedded: Tensor, hidden: Tensor, freqs_cis: Tensor, packing: Packing, record=None):
        """Rows without a cache. embedded, hidden: [N, D] -> h^k [N, D], and the cache's entries."""
        out, entry = self.block(self.combine(embedded, hidden), freqs_cis, packing, record)
        return self.norm(out), entry

    def decode(self, embedded: Tensor, hidden: Tensor, freqs_cis, cache: Cache, positions: Tensor, bias: Tensor):
        """States at `positions`, int64 [B, T], over the cache. embedded, hidden: [B, T, D] -> h^k [B, T, D]."""
        return self.norm(self.block.decode(self.combine(embedded, hidden), freqs_cis, cache, positions, bias))


def look_ahead(
    modules: Iterable[MTP],
    embedded: Tensor,
    hidden: Tensor,
    freqs_cis: Tensor,
    layout: Packing,
    cache: Cache | None = None,
    record: list | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One module after the other, each on the states of the previous one: yields (indices i, h^k_i) for k = 1 … D.

    embedded: emb(t) [N, D]; hidden: h^0 [N, D]; freqs_cis: complex64 [N, R/2]. Module k needs t_{i+k}, so
    it has lengths - k states per row: indices int64 [N_k] into the packed tokens, h^k [N_k, D]. A cache (see
    `Transformer.cache`), which starts with these tokens, gets the entries of the modules.
    """
    left = torch.repeat_interleave(layout.lengths, layout.lengths) - layout.positions()  # this token included
    index = torch.arange(len(hidden), device=hidden.device)
    for k, module in enumerate(modules, start=1):
        inside = (left[index] > k).nonzero().squeeze(1)
        index, hidden = index[inside], hidden.index_select(0, inside)
        rows = packing(layout.rows, layout.columns, (layout.lengths - k).clamp(min=0), hidden.device)
        routings = None if record is None else []  # as in Transformer._prefill
        hidden, entry = module(embedded.index_select(0, index + k), hidden, freqs_cis[index], rows, routings)
        if record is not None:
            record.extend(routings)
        if cache is not None:
            cache.layers[module.block.layer][:, : layout.columns] = rows.pad(entry)
        yield index, hidden

"""The decoder-only transformer of DeepSeek-V3 and its dense relatives."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minir1.model.block import Block
from minir1.model.cache import Cache
from minir1.model.config import ModelConfig
from minir1.model.moe import Routing, routes_of
from minir1.model.mtp import MTP, look_ahead
from minir1.model.packing import Packing, from_cu_seqlens, packing
from minir1.model.rope import rope_freqs_cis
from minir1.ops import linear_logprob
from minir1.ops.chunks import no_autocast

LARGE_HEAD = 2**22  # numbers of a head that is worth a tensor of oneDNN on the CPU


class Transformer(nn.Module):
    """tokens -> hidden states -> logits or log-probs.

    >>> model = Transformer(ModelConfig(vocab=64))
    >>> model(torch.randint(0, 64, (2, 10))).shape
    torch.Size([2, 10, 64])
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = _Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.mtp = nn.ModuleList(MTP(config, depth) for depth in range(config.mtp_depth))
        if config.tied:
            self.head.weight = self.embedding.weight
        if not self.embedding.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every matrix from N(0, init_std²), as V3 (section 4.2); norm weights one, biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=self.config.init_std)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.config.tied and self.head is not None:  # some devices replace parameters, which would untie them
            self.head.weight = self.embedding.weight
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def recompute(self, on: bool = True) -> None:
        """Keep only the input of each block in training, and compute the block again in the backward pass.

        Gradients have the same bits where operators are deterministic; a step costs one more forward pass.
        """
        for block in (*self.blocks, *(module.block for module in self.mtp)):
            block.recompute = on

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [...] -> [..., D]"""
        x = self.embedding(tokens)
        return x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale

    def freqs_cis(self, positions: Tensor) -> Tensor:
        """RoPE's complex factors of these positions: int64 [...] -> complex64 [..., R/2]."""
        size = self.config.rope if self.config.attention == "mla" else self.config.head_size  # R
        return rope_freqs_cis(size, positions, self.config.rope_theta, self.config.rope_scaling)

    def cache(self, rows: int, slots: int, *, mtp: bool = False) -> Cache:
        """An empty cache for `rows` rows of up to `slots` tokens, on the model's device, in its dtype.

        With `mtp` it also has layers for the MTP modules, after those of the blocks. It is valid as long as the weights
        stay as they are: decoding keeps products of them in it.
        """
        layers = self.config.layers + (len(self.mtp) if mtp else 0)
        return Cache(replace(self.config, layers=layers), rows, slots, self.device, self.embedding.weight.dtype)

    def hidden(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        record: list[Routing] | None = None,
    ) -> Tensor:
        """The states after the last norm, from which the next tokens are predicted: [B, T, D] or [N, D].

        tokens: int64 [B, T], right-padded if `lengths` (int64 [B]) is given, or [N] packed if `cu_seqlens` (int32
        [B+1]) is. positions: int64 of the tokens' shape, by default counted from each row's start. Tokens are appended
        to the cache, if there is one. `record` gets one Routing per MoE layer. Padding enters no layer and its states
        are zero; after a cache with tokens in it they are undefined.
        """
        if positions is not None and positions.shape != tokens.shape:
            raise ValueError(f"positions {tuple(positions.shape)}: expected the tokens' shape, {tuple(tokens.shape)}")
        if cu_seqlens is not None:
            if tokens.ndim != 1 or lengths is not None or cache is not None:
                raise ValueError("cu_seqlens goes with packed tokens [N], without lengths or cache")
            layout = from_cu_seqlens(cu_seqlens, len(tokens))
            return self._prefill(tokens, positions, layout, None, record)
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected [B, T], or [N] with cu_seqlens")
        if cache is not None and cache.used > 0:
            return self._decode(tokens, positions, lengths, cache, record)
        layout = packing(*tokens.shape, lengths, tokens.device)
        positions = None if positions is None else layout.pack(positions)
        return layout.pad(self._prefill(layout.pack(tokens), positions, layout, cache, record))

    def _prefill(self, tokens, positions, layout: Packing, cache, record, routes=None) -> Tensor:
        """Packed rows without a cache, or the next chunk of the rows in a cache. tokens, positions: [N] -> [N, D].

        routes: for each layer the experts to use, or None.
        """
        start = 0 if cache is None else cache.used
        if cache is not None and start + layout.columns > cache.slots:
            raise ValueError(f"{start + layout.columns} tokens do not fit into a cache of {cache.slots} slots")
        x = self.embed(tokens)
        positions = start + layout.positions() if positions is None else positions
        freqs_cis = self.freqs_cis(positions)
        for layer, (block, experts) in enumerate(zip(self.blocks, routes or repeat(None))):
            past = cache.layers[layer][:, :start] if start else None
            # A list of its own: a recomputed layer appends once more, and FSDP2 would copy one with gradients in it.
            routings = None if record is None else []
            x, entry = block(x, freqs_cis, layout, routings, past, experts)
            if record is not None:
                record.extend(routings)
            if cache is not None:
                cache.layers[layer][:, start : start + layout.columns] = layout.pad(entry)
        if cache is not None:
            cache.advance(layout.lengths, layout.columns)
        return self.norm(x)

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        cache: Cache,
        chunk: int = 512,
        routes_to: Tensor | None = None,
    ) -> Tensor:
        """Fill an empty cache with prompts, `chunk` columns at a time, so activations do not grow with T; no gradients.

        tokens: int64 [B, T], right-padded if `lengths` (int64 [B], at least 1) is given. Returns the hidden state of
        each row's last token, [B, D], and leaves the cache as one call of `hidden` does. A row that has ended still
        costs attention until the longest row ends. routes_to: int16 [B, T, L_moe, K_r], filled with the experts of
        each token, -1 at padding.
        """
        if tokens.ndim != 2 or chunk < 1:
            raise ValueError(f"tokens {tuple(tokens.shape)}, chunk = {chunk}: expected [B, T] and at least 1")
        if cache.used:
            raise ValueError(f"the cache already holds {cache.used} columns: prefill starts an empty one")
        rows, columns = tokens.shape
        whole = torch.full((rows,), columns, device=tokens.device) if lengths is None else lengths.to(tokens.device)
        if whole.shape != (rows,) or (lengths is not None and ((whole < 1) | (whole > columns)).any()):
            raise ValueError(f"lengths must be {rows} numbers in 1 to {columns}, got {whole.tolist()[:16]}")
        last = self.embedding.weight.new_zeros(rows, self.config.dim)
        for part in tokens.split(chunk, dim=1):
            start, record = cache.used, None if routes_to is None else []
            left = whole - start
            here = None if lengths is None else left.clamp(0, part.shape[1])
            layout = packing(*part.shape, here, tokens.device)
            hidden = self._prefill(layout.pack(part), None, layout, cache, record)
            if record is not None:
                routes_to[:, start : cache.used] = layout.pad(routes_of(record) + 1) - 1  # padding gives 0, here -1
            ending = (left > 0) & (left <= part.shape[1])
            last[ending] = hidden[(layout.lengths.cumsum(0) - 1)[ending]]
        return last

    def _decode(self, tokens, positions, lengths, cache: Cache, record) -> Tensor:
        """New tokens after those in the cache. tokens: [B, T] -> [B, T, D]."""
        new = tokens.shape[1]
        if cache.used + new > cache.slots:
            raise ValueError(f"{cache.used} + {new} tokens do not fit into a cache of {cache.slots} slots")
        slots = cache.positions(new)
        bias = cache.bias(slots)
        x = self.embed(tokens)
        freqs_cis = self.freqs_cis(slots if positions is None else positions)
        for block in self.blocks:
            x = block.decode(x, freqs_cis, cache, slots, bias, record)
        cache.advance(new if lengths is None else lengths, new)
        return self.norm(x)

    def head_matrix(self) -> Tensor:
        """w of `logits`, [V, D], made once for many calls: upcast to fp32, except on CUDA, where 16-bit products have
        fp32 results. On the CPU a head above LARGE_HEAD numbers is copied into a tensor of oneDNN, which multiplies few
        rows about twice as fast, without gradients; a smaller fp32 head is not copied."""
        w = self.head.weight.detach()
        if w.is_cuda:
            return w
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        large = w.numel() > LARGE_HEAD and w.dtype == torch.float32 and w.device.type == "cpu"
        return w.to_mkldnn() if large and torch.backends.mkldnn.is_available() else w

    def logits(self, hidden: Tensor, matrix: Tensor | None = None) -> Tensor:
        """z = softcap(logit_scale · h·wᵀ), fp32 (fp64 of fp64). hidden: [..., D] -> [..., V].

        matrix: `head_matrix()`, or None to make it here. Autocast has no effect.
        """
        # With 16-bit logits the sampler would round where logprob does not: the two policies would differ.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        w = self.head.weight if matrix is None else matrix
        with no_autocast(hidden):
            if w.is_mkldnn:
                z = F.linear(hidden.to(dtype).to_mkldnn(), w).to_dense()
            elif w.is_cuda and w.dtype == hidden.dtype != dtype and not torch.is_grad_enabled():
                z = torch.mm(hidden.flatten(0, -2), w.T, out_dtype=dtype).unflatten(0, hidden.shape[:-1])
            else:
                z = F.linear(hidden.to(dtype), w.to(dtype))
        if self.config.logit_scale != 1.0:
            z = z * self.config.logit_scale
        if self.config.softcap is not None:
            z = self.config.softcap * torch.tanh(z / self.config.softcap)
        return z

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """tokens: int64 [B, T] -> logits fp32 [B, T, V]. Train on `logprob` instead, which needs less memory."""
        return self.logits(self.hidden(tokens, lengths=lengths))

    def logprob(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        record: list[Routing] | None = None,
        routes: Tensor | None = None,
        value: nn.Module | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """logp[b, t] = log π(x_t | x_<t) under the softmax of z / temperature, without the logits of all tokens.

        tokens: int64 [B, T], right-padded; lengths: int64 [B] (None: full rows); mask: bool [B, T], the tokens wanted
        (None: every token but the first of its row). Returns fp32 [B, T], zero where not wanted, in column 0 and at
        padding; with entropy=True also the entropy in nats of the distribution of x_t, [B, T]; with value, a
        `heads.ValueHead`, last of all V of the state before x_t, [B, T], from the same pass.

        cu_seqlens: int32 [B+1], for packed rows: tokens, mask and all results are then [N], without lengths and routes.

        routes: int [B, T, L_moe, K_r], the experts that each MoE layer must use for each token, -1 where it chooses:
        the replay of `Rollout.routes` (R3, arXiv:2510.11370). Gates come from the current router. ValueError for a
        model without MoE layers, another shape, or an expert that does not exist.
        """
        if cu_seqlens is not None and (lengths is not None or routes is not None):
            raise ValueError("cu_seqlens goes with packed tokens [N], without lengths or routes")
        layout, flat, wanted = _wanted(tokens, lengths, mask, cu_seqlens)
        experts = None if routes is None else self._each_layer(routes, layout)
        hidden = self._prefill(flat, layout.positions(), layout, None, record, experts)
        states = hidden.index_select(0, wanted - 1)
        scores = self._score(states, flat, wanted, layout, temperature, entropy)
        if value is not None:
            scores.append(_grid(value(states), wanted, layout))
        if cu_seqlens is not None:
            scores = [layout.pack(x) for x in scores]
        return tuple(scores) if len(scores) > 1 else scores[0]

    def states(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        record: list[Routing] | None = None,
    ) -> Tensor:
        """The states h that predict the wanted tokens, [M, D] in the order of the rows: z = h·head.weightᵀ.

        Arguments as for `logprob`; logit_scale is in h. For whole distributions without the logits of all tokens
        (`minir1.model.divergence`). ValueError for a model with a softcap, whose logits are no such product.
        """
        if self.config.softcap is not None:
            raise ValueError(f"softcap = {self.config.softcap}: logits are no product of states and head.weight")
        layout, flat, wanted = _wanted(tokens, lengths, mask, cu_seqlens)
        states = self._prefill(flat, layout.positions(), layout, None, record).index_select(0, wanted - 1)
        return states if self.config.logit_scale == 1.0 else states * self.config.logit_scale

    def _each_layer(self, routes: Tensor, layout: Packing) -> list[Tensor | None]:
        """The experts to use in each block, int [N, K_r], or None for a dense one. routes: int [B, T, L_moe, K_r]."""
        config = self.config
        shape = (layout.rows, layout.columns, config.moe_layers, config.experts_per_token)
        if config.moe_layers == 0:
            raise ValueError("routes: a dense model has none")
        if routes.shape != shape:
            raise ValueError(f"routes {tuple(routes.shape)}: expected {shape}, [B, T, L_moe, K_r]")
        packed = layout.pack(routes)  # [N, L_moe, K_r]
        if ((packed < -1) | (packed >= config.experts) | ((packed < 0) != (packed[..., :1] < 0))).any():
            raise ValueError(f"routes: expected {shape[-1]} of the experts 0 to {config.experts - 1}, or -1 alone")
        return [None] * (config.layers - config.moe_layers) + list(packed.unbind(1))

    def _score(self, hidden, flat, wanted, layout: Packing, temperature=1.0, entropy=False) -> list[Tensor]:
        """Log-probs, and entropies if asked for, of the packed tokens `wanted` [M] from states [M, D]; each [B, T]."""
        scale = {"temperature": temperature, "softcap": self.config.softcap, "logit_scale": self.config.logit_scale}
        scores = linear_logprob(hidden, self.head.weight, flat[wanted], entropy=entropy, **scale)
        return [_grid(x, wanted, layout) for x in scores if x is not None]

    def mtp_logprob(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        record: list[Routing] | None = None,
    ) -> list[Tensor]:
        """[logp_0, logp_1, … logp_D]: each token predicted 1, 2, … D + 1 ahead, from one pass through the blocks.

        logp_0 is the result of `logprob`. logp_k[b, t] is the log-prob of x_t by MTP module k, whose state h^k_{t-k-1}
        is a function of x_<t; 0 where t <= k. Arguments as for `logprob`; each fp32 [B, T]. After those of the blocks,
        `record` gets one Routing per module, over the first lengths - k tokens of each row.
        """
        layout, flat, wanted = _wanted(tokens, lengths, mask)
        hidden = self._prefill(flat, layout.positions(), layout, None, record)
        scores = self._score(hidden.index_select(0, wanted - 1), flat, wanted, layout)
        # After the last token of a row comes the first of another, which is never wanted, or the end: one more entry.
        is_wanted = torch.zeros(len(flat) + 1, dtype=torch.bool, device=flat.device).index_fill(0, wanted, True)
        for k, (index, state) in enumerate(self.look_ahead(flat, hidden, layout, record=record), start=1):
            inside = is_wanted[index + k + 1].nonzero().squeeze(1)
            scores += self._score(state.index_select(0, inside), flat, index[inside] + k + 1, layout)
        return scores

    def look_ahead(self, flat: Tensor, hidden: Tensor, layout: Packing, cache: Cache | None = None, record=None):
        """`mtp.look_ahead` over packed rows, with this model's modules, embedding and RoPE."""
        return look_ahead(self.mtp, self.embed(flat), hidden, self.freqs_cis(layout.positions()), layout, cache, record)


def _wanted(
    tokens: Tensor, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Packing, Tensor, Tensor]:
    """The packing, the packed tokens [N], and the indices of those whose log-prob is wanted, int64 [M]."""
    packed = cu_seqlens is not None
    if tokens.ndim != 2 - packed or (mask is not None and mask.shape != tokens.shape):
        shape = None if mask is None else tuple(mask.shape)
        expected = "[N] both with cu_seqlens" if packed else "[B, T] both"
        raise ValueError(f"tokens {tuple(tokens.shape)}, mask {shape}: expected {expected}")
    layout = from_cu_seqlens(cu_seqlens, len(tokens)) if packed else packing(*tokens.shape, lengths, tokens.device)
    flat, inside = (tokens, mask) if packed else (layout.pack(tokens), None if mask is None else layout.pack(mask))
    wanted = layout.positions() > 0
    if mask is not None:
        wanted = wanted & inside.bool()
    return layout, flat, wanted.nonzero().squeeze(1)


def _grid(x: Tensor, wanted: Tensor, layout: Packing) -> Tensor:
    """Numbers [M] of the packed tokens `wanted` at their positions in a grid of zeros, [B, T]."""
    index = wanted if layout.index is None else layout.index[wanted]
    return x.new_zeros(layout.rows * layout.columns).index_copy(0, index, x).view(layout.rows, layout.columns)


def on_meta(config: ModelConfig) -> Transformer:
    """The model without memory for its weights: to count them, or to allocate them on a device."""
    with torch.device("meta"):
        return Transformer(config)


class _Embedding(nn.Embedding):
    """Draws nothing on the meta device, where the first `normal_` would import 900 modules of torch (1 s, 150 MiB)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

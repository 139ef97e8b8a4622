"""The floor of a decode step, an update and a pre-training step: the seconds that the matrix products alone would need.

The products follow from the model's shape, with the counts of minir1/model/count.py, and not from the code: each matrix
once per token, scores and weighted sums of attention (causal ones by half), two products in the backward pass for each
one of the forward pass, Newton-Schulz for Muon. Each product is timed by itself, with operands of its shape, dtype and
device, on all threads. A step that merges several small products may be faster than its floor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from experiments.benchmarks.bench_timing import timed
from minir1.model.transformer import Transformer
from minir1.optim import POLAR, split_parameters


class Product(NamedTuple):
    """`count` times `batch` products [m, k] · [k, n]."""

    count: float
    batch: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> float:
        """A multiplication and an addition counted as two."""
        return 2.0 * self.count * self.batch * self.m * self.k * self.n


def matrices(model: Transformer, tokens: int, scored: int) -> list[Product]:
    """Every matrix with `tokens` tokens; the head with `scored`, routed experts with K_r for each token."""
    config, products = model.config, [Product(1, 1, scored, *model.head.weight.shape[::-1])]
    for name, w in model.blocks.named_parameters():
        if w.ndim == 3:
            chosen = tokens * config.experts_per_token
            used = min(config.experts, chosen)
            products.append(
                Product(chosen / used / -(-chosen // used), used, -(-chosen // used), w.shape[2], w.shape[1])
            )
        elif w.ndim == 2:
            products.append(Product(1, 1, tokens, *w.shape[::-1]))
    return products


def attention(model: Transformer, rows: int, queries: int, keys: int, count: float, latent: bool) -> list[Product]:
    """Scores and weighted sums, `count` times in every layer; with `latent` MLA's over its cache."""
    config = model.config
    if config.attention == "gqa":
        batch, each, d_qk, d_v = rows * config.kv_heads, config.heads // config.kv_heads, *[config.head_size] * 2
    elif latent:
        batch, each, d_qk, d_v = rows, config.heads, config.kv_lora + config.rope, config.kv_lora
    else:
        batch, each, d_qk, d_v = rows * config.heads, 1, config.nope + config.rope, config.v_dim
    sizes = (d_qk, keys), (keys, d_v)
    return [Product(count * config.layers, batch, each * queries, k, n) for k, n in sizes]


def forward(model: Transformer, rows: int, length: int, scored: int) -> list[Product]:
    """Rows of `length` tokens without a cache; log-probs of `scored` tokens in all."""
    share = (length + 1) / (2 * length)  # causal
    return matrices(model, rows * length, scored) + attention(model, rows, length, length, share, latent=False)


def backward(products: list[Product]) -> list[Product]:
    """Gradients of both factors of every product."""
    left = [Product(p.count, p.batch, p.m, p.n, p.k) for p in products]
    return left + [Product(p.count, p.batch, p.k, p.m, p.n) for p in products]


def newton_schulz(model: Transformer, steps: int = len(POLAR)) -> list[Product]:
    """XXᵀ, (XXᵀ)² and the product with X, for each matrix that Muon updates (minir1/optim.py)."""
    products = []
    for w in split_parameters(model)[0]:
        batch, (m, n) = w.numel() // (w.shape[-1] * w.shape[-2]), sorted(w.shape[-2:])
        products += [Product(steps, batch, m, n, m), Product(steps, batch, m, m, m), Product(steps, batch, m, m, n)]
    return products


def seconds(products: list[Product], model: Transformer) -> float:
    """What the products take, each as fast as when it runs alone, in the model's dtype on its device."""
    like = model.embedding.weight
    return sum(p.count * _one(*p[1:], like.dtype, like.device) for p in products)


def decode_step(model: Transformer, rows: int, length: int) -> float:
    """Seconds of one token in each row with `length` tokens in the cache: the products, or reading the weights once
    (of the experts those in use) if that takes longer."""
    config = model.config
    products = matrices(model, rows, rows) + attention(model, rows, 1, length + 1, 1, latent=True)
    used = min(1.0, rows * config.experts_per_token / max(1, config.experts))
    weights = model.head.weight.numel() + sum(
        w.numel() * (used if w.ndim == 3 else 1) for w in model.blocks.parameters()
    )
    like = model.embedding.weight
    return max(seconds(products, model), _reading(int(weights), like.dtype, like.device))


@cache
def _one(batch: int, m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one product; the right factor is stored as weights are, [n, k]."""
    several = () if batch == 1 else (batch,)
    a, b = (torch.randn(*several, *size, dtype=dtype, device=device) for size in ((m, k), (n, k)))
    return _shortest(lambda: a @ b.mT, device)


@cache
def _reading(numbers: int, dtype: torch.dtype, device: torch.device) -> float:
    x = torch.ones(numbers, dtype=dtype, device=device)
    return _shortest(x.sum, device)


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the shortest of ten means: nothing else on the machine may raise a floor."""
    once = min(timed(work, device)[1] for _ in range(3))
    calls = max(1, int(0.002 / once))
    return min(timed(lambda: [work() for _ in range(calls)], device)[1] for _ in range(10)) / calls

"""Size and cost of a model: parameters by part, cache per token, floating-point operations per token.

The counts are taken from the model itself, built on the meta device, where tensors have no memory.
`python -m experiments.count` prints them.

Active parameters are those that a token is multiplied with: all but the experts that it is not routed to, the input
embedding, of which it reads one row, and the modules for multi-token prediction (MTP), which plain decoding does not
run. A tied embedding is active as the head.

FLOPs per token, a multiplication and an addition counted as two. F = 2N, where N are the active matrices, without norm
weights and biases; M are the tokens attended to:

    forward   F + 2·L·H·(d_qk + d_v)·M                M = (T + 1)/2, the mean over a row of T tokens
    training  3 × forward: the backward pass has two products for each one, and nothing is recomputed. The MTP
              modules are counted separately, each with its own pass through the head
    decoding  F + 2·L·H·(d_qk + d_v)·M                M = T; over a latent cache (MLA, absorbed)
                                                      d_qk = kv_lora + rope and d_v = kv_lora

Elementwise operations (norms, RoPE, SiLU, softmax, the experts' gates) are left out.
"""

from __future__ import annotations

from minir1.model.cache import Cache
from minir1.model.config import ModelConfig
from minir1.model.transformer import Transformer, on_meta

PARTS = {  # part -> its label, and what the names of its parameters contain; of several parts the last one counts
    "embedding": ("embedding", "embedding."),
    "attention": ("attention", ".attention."),
    "dense": ("dense feed-forward", ".ffn."),
    "shared": ("shared experts", ".shared."),
    "routed": ("routed experts", ".experts."),
    "router": ("router", ".router."),
    "norms": ("norms", "norm."),
    "head": ("head", "head."),
    "mtp": ("multi-token prediction", "mtp."),
}


def part_of(name: str) -> str:
    """The part that the parameter of this name belongs to; ValueError if there is none."""
    for part, (_, mark) in reversed(PARTS.items()):
        if mark in name:
            return part
    raise ValueError(f"parameter {name!r} belongs to no part; known are {', '.join(PARTS)}")


def total_parameters(model: Transformer) -> dict[str, int]:
    """Parameters by part; the sum is that of the whole model. A tied matrix counts once, as the embedding."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def active_parameters(model: Transformer, matrices: bool = False) -> dict[str, int]:
    """Parameters that a token is multiplied with, by part; with `matrices` without norm weights and biases.

    `mtp` is what its modules add when they run; plain decoding does not run them.
    """
    chosen, experts = model.config.experts_per_token, model.config.experts
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 or not matrices:
            n = parameter.numel()
            counts[part_of(name)] += n * chosen // experts if ".experts." in name else n
    return counts | {"embedding": 0, "head": model.head.weight.numel()}


def cache_values(config: ModelConfig) -> int:
    """Numbers in the cache for one token, all layers together."""
    return sum(layer.numel() for layer in Cache(config, 1, 1, "meta").layers)


def attention_flops(config: ModelConfig, layers: int, keys: float, absorbed: bool = False) -> float:
    """FLOPs of scores and weighted sums for one token that attends to M = `keys`: 2·L·H·(d_qk + d_v)·M."""
    if config.attention == "gqa":
        sizes = 2 * config.head_size
    else:
        sizes = config.rope + (2 * config.kv_lora if absorbed else config.nope + config.v_dim)
    return 2 * layers * config.heads * sizes * keys


def matrix_flops(model: Transformer, mtp: bool = False) -> int:
    """F of the equations above, the FLOPs of one token outside the attention scores and sums.

    With `mtp` those of the MTP modules alone, each of which goes through the head once more.
    """
    active = active_parameters(model, matrices=True)
    modules = active.pop("mtp") + model.config.mtp_depth * active["head"]
    return 2 * (modules if mtp else sum(active.values()))


def forward_flops(model: Transformer, keys: float, mtp: bool = False) -> float:
    """FLOPs of one token that attends to `keys` tokens, itself included, without a cache; or of its MTP modules."""
    layers = model.config.mtp_depth if mtp else model.config.layers
    return matrix_flops(model, mtp) + attention_flops(model.config, layers, keys)


def train_flops(model: Transformer, length: int, mtp: bool = False) -> float:
    """FLOPs per token, forward and backward, in rows of `length` tokens; or those that the MTP modules add."""
    return 3 * forward_flops(model, (length + 1) / 2, mtp)


def decode_flops(model: Transformer, length: int) -> float:
    """FLOPs of decoding the token at position `length`."""
    return matrix_flops(model) + attention_flops(model.config, model.config.layers, length, absorbed=True)


def count(config: ModelConfig, length: int = 4096, cache_bytes: float = 2) -> dict:
    """All counts, as a flat JSON object. length: tokens of a row; cache_bytes: bytes of a number in the cache.

    total: parameters without MTP; active: without the input embedding; active_with_embedding: with the whole of it, as
    DeepSeek's "37B" counts; total/PART and active/PART; cache/token_layer in numbers; cache/token in bytes; per token
    flops/train, flops/train_mtp (in addition) and flops/decode. ValueError for a length below 1.
    """
    if length < 1:
        raise ValueError(f"length = {length}: at least 1 token")
    model = on_meta(config)
    total, active = total_parameters(model), active_parameters(model)
    sums = {
        "total": sum(total.values()) - total["mtp"],
        "active": sum(active.values()) - active["mtp"],
        "active_with_embedding": sum(active.values()) - active["mtp"] + (0 if config.tied else total["embedding"]),
    }
    costs = {
        "length": length,
        "cache/token_layer": cache_values(config) // config.layers,
        "cache/token": cache_values(config) * cache_bytes,
        "flops/train": train_flops(model, length),
        "flops/train_mtp": train_flops(model, length, mtp=True),
        "flops/decode": decode_flops(model, length),
    }
    parts = {f"{kind}/{part}": n for kind, ns in (("total", total), ("active", active)) for part, n in ns.items()}
    return sums | parts | costs

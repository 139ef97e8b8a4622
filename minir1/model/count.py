"""How large a model is, and what a token costs: parameters by part, cache, floating-point operations.

The model itself is built, on the meta device, where tensors have shapes and no memory; so what is counted is what would
be trained. `python -m experiments.count` prints it.

Active are the parameters that a token is multiplied with: all but the experts that it is not routed to, the input
embedding, of which it reads one row, and the modules for multi-token prediction (MTP), which plain decoding leaves out.
A tied embedding is active as the head.

FLOPs a token, a multiplication and an addition counted as two. N are the active matrices, without norm weights and
biases, F = 2N + 2·K_r·D·(MoE layers), the second term being the weighted sum of the experts' outputs, and M the tokens
attended to:

    forward   F + 2·L·H·(d_qk + d_v)·M                M = (T + 1)/2, the mean over a row of T tokens
    training  3 × forward, since the backward pass takes two products for each one; nothing recomputed. The MTP
              modules come on top, each with a pass of its own through the head
    decoding  F + 2·L·H·(d_qk + d_v)·M                M = T; over a latent cache (MLA, absorbed)
                                                      d_qk = kv_lora + rope and d_v = kv_lora

What is done elementwise (norms, RoPE, SiLU, softmax) is left out.
"""

from __future__ import annotations

from minir1.model.cache import Cache
from minir1.model.config import ModelConfig
from minir1.model.transformer import Transformer, on_meta

MARKS = {  # part -> what the names of its parameters contain; the first that fits
    "mtp": "mtp.",
    "norms": "norm.",
    "embedding": "embedding.",
    "attention": ".attention.",
    "router": ".router.",
    "routed": ".experts.",
    "shared": ".shared.",
    "dense": ".ffn.",
    "head": "head.",
}
PARTS = {  # in the order of the table, with their names in it
    "embedding": "embedding",
    "attention": "attention",
    "dense": "dense feed-forward",
    "shared": "shared experts",
    "routed": "routed experts",
    "router": "router",
    "norms": "norms",
    "head": "head",
    "mtp": "multi-token prediction",
}


# ---- parameters --------------------------------------------------------------------------------


def part_of(name: str) -> str:
    """The part that the parameter of this name belongs to; ValueError if it fits none."""
    for part, mark in MARKS.items():
        if mark in name:
            return part
    raise ValueError(f"parameter {name!r} belongs to no part; known are {', '.join(MARKS)}")


def total_parameters(model: Transformer) -> dict[str, int]:
    """Parameters by part. Their sum is that of the model; a tied matrix counts once, as the embedding."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def active_parameters(model: Transformer, matrices: bool = False) -> dict[str, int]:
    """Parameters that a token is multiplied with, by part; with `matrices` without norm weights and biases.

    `mtp` is what its modules add when they run; it is not part of plain decoding.
    """
    config = model.config
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 or not matrices:
            of = config.experts if ".experts." in name else 1
            chosen = config.experts_per_token if ".experts." in name else 1
            counts[part_of(name)] += parameter.numel() * chosen // of
    counts["embedding"] = 0
    counts["head"] = model.head.weight.numel()
    return counts


# ---- cache and operations ----------------------------------------------------------------------


def cache_values(config: ModelConfig) -> int:
    """Numbers that the cache keeps of one token in all layers."""
    return sum(layer.numel() for layer in Cache(config, 1, 1, "meta").layers)


def attention_flops(config: ModelConfig, layers: int, keys: float, absorbed: bool = False) -> float:
    """FLOPs of scores and weighted sums for one token in so many layers, 2·L·H·(d_qk + d_v)·M."""
    if config.attention == "gqa":
        sizes = 2 * config.head_size
    elif absorbed:
        sizes = config.kv_lora + config.rope + config.kv_lora
    else:
        sizes = config.nope + config.rope + config.v_dim
    return 2 * layers * config.heads * sizes * keys


def matrix_flops(model: Transformer, mtp: bool = False) -> int:
    """FLOPs of one token in everything but attention proper: F of the head of this file.

    With `mtp` those of the modules for multi-token prediction alone, each of which goes through the head once more.
    """
    config, active = model.config, active_parameters(model, matrices=True)
    mixed = 2 * config.experts_per_token * config.dim  # a MoE layer
    if mtp:
        modules = range(config.layers, config.layers + config.mtp_depth)
        return 2 * (active["mtp"] + len(modules) * active["head"]) + mixed * sum(map(config.is_moe, modules))
    return 2 * (sum(active.values()) - active["mtp"]) + mixed * sum(map(config.is_moe, range(config.layers)))


def forward_flops(model: Transformer, keys: float, mtp: bool = False) -> float:
    """FLOPs of one token that attends to so many, itself included, without a cache; with `mtp` of its modules alone."""
    layers = model.config.mtp_depth if mtp else model.config.layers
    return matrix_flops(model, mtp) + attention_flops(model.config, layers, keys)


def train_flops(model: Transformer, length: int, mtp: bool = False) -> float:
    """FLOPs a token, forward and backward, in rows of `length` tokens; with `mtp` what those modules come to on top."""
    return 3 * forward_flops(model, (length + 1) / 2, mtp)


def decode_flops(model: Transformer, length: int) -> float:
    """FLOPs of the token at position `length`, over a cache that holds it and those before it."""
    return matrix_flops(model) + attention_flops(model.config, model.config.layers, length, absorbed=True)


def count(config: ModelConfig, length: int = 4096, cache_bytes: float = 2) -> dict:
    """Everything, as JSON takes it. `length`: tokens of a row; `cache_bytes`: of a number in the cache.

    total: parameters without MTP; active: without the input embedding; active_with_embedding: with the whole of it, as
    DeepSeek's "37B" counts; total/PART and active/PART; cache/token_layer in numbers; cache/token in bytes;
    flops/train, flops/train_mtp (on top) and flops/decode of a token. ValueError for a length below 1.
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

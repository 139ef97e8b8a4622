"""Memory of a training step on one rank, predicted from shapes before it starts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minir1.device import free_memory_gib
from minir1.distributed import computed_in, world
from minir1.model.config import ModelConfig
from minir1.model.count import cache_values
from minir1.model.packed_linear import packed_layers
from minir1.model.transformer import Transformer
from minir1.optim import split_parameters

SAMPLED = ("cache", "sampling", "copy")  # in memory only while answers are sampled
LEARNED = ("gradients", "activations", "logits", "gathered")  # only while the policy is trained
ROLLOUT_BYTES = 8 + 1 + 4 + 4 + 4  # of a token: itself, its mask, log-prob and entropy, and the reference's log-prob
LOGIT_BYTES, LOGIT_TOKENS = 2**25, 256  # size of a chunk of linear_logprob, whichever is more


def step_memory(
    model: Transformer,
    *,
    microbatch: int,
    rows: int = 0,
    length: int = 0,
    muon: bool = False,
    reference: bool = False,
    critic: bool = False,
    recompute: bool = False,
    ranks: int | None = None,
) -> dict[str, int]:
    """Bytes of each part of a step on one rank. The model may be on the meta device; the trained parameters require
    gradients.

    microbatch: tokens of a forward and backward pass; rows, length: shape of the rollout, of whose rows each rank
    samples an equal share; muon: Muon for the matrices of `optim.split_parameters`, else AdamW for all; reference: a
    second copy of the model, not needed with adapters; critic: a `heads.ScalarModel` of the model's shape, all of it
    trained; ranks: W, by default as many as run.

    On several ranks (model/shards.py) weights are fp32 and their own masters; they, moments, gradients, reference and
    critic are divided (`in_shard`). Two parts are added, with b bytes for a number that computes: copy, b·N, and as
    much again for a critic, in every pass without gradient, of which sampling needs most; gathered, while the policy is
    trained (`gathered_bytes`). Buffers and the rollout are whole on every rank.

    Weights, masters, moments, gradients, reference, critic, copy and cache are exact, of several ranks for the first;
    dequantised is the largest matrix that is kept in 4 bits, as its product needs it. Activations are those that
    autograd keeps on the CPU, within 5 %; fused kernels on a GPU keep less. Gradients count in fp32, as the masters
    need them.
    """
    config, dtype, W = model.config, computed_in(model.embedding.weight), ranks or world()
    rows_here = -(-rows // W)
    tokens = max(length, min(microbatch, rows_here * length)) if rows else microbatch  # a longer row is its own batch
    every = dict(model.named_parameters())
    numbers = sum(in_shard(p, W) for p in every.values() if p.requires_grad)
    by_muon = sum(in_shard(p, W) for p in split_parameters(model)[0] if p.requires_grad) if muon else 0
    buffers = sum(t.nbytes for t in model.buffers())
    weights = sum(4 * in_shard(p, W) if W > 1 else p.nbytes for p in every.values()) + buffers
    outside = ("head.", "mtp.")  # not in a critic, which has a head of D numbers
    trunk = [p for name, p in every.items() if not name.startswith(outside)]
    of_critic = sum(in_shard(p, W) for p in trunk) + config.dim
    copied = dtype.itemsize * sum(p.numel() for p in (*every.values(), *(trunk if critic else ())))
    copied += 4 * config.dim if critic else 0  # its head computes in fp32
    matrices = [layer.in_features * layer.out_features for layer in packed_layers(model).values()]
    half = dtype.itemsize < 4
    masters = half and W == 1  # in addition to the weights
    return {
        "weights": weights,
        "dequantised": dtype.itemsize * max(matrices, default=0),
        "masters": 4 * numbers if masters else 0,
        "moments": 4 * (2 * numbers - by_muon),
        "reference": weights if reference else 0,
        "critic": of_critic * ((dtype.itemsize if W == 1 else 4) + 4 * masters + 8 + 4) if critic else 0,
        "rollout": rows * length * ROLLOUT_BYTES,
        "cache": rows_here * length * cache_values(config) * dtype.itemsize,
        "sampling": 4 * config.vocab * (5 * rows_here + (config.dim if half else 0)) if rows else 0,  # and upcast head
        "copy": copied if W > 1 else 0,
        "gradients": 4 * numbers,
        "activations": activation_bytes(config, tokens, dtype, recompute),
        "logits": 3 * min(4 * tokens * config.vocab, max(LOGIT_BYTES, 4 * LOGIT_TOKENS * config.vocab)),
        "gathered": gathered_bytes(model, dtype.itemsize, W, recompute),
    }


def in_shard(p: Tensor, ranks: int) -> int:
    """Numbers of a parameter on the first rank, which has most: its first dimension is divided."""
    return -(-p.shape[0] // ranks) * math.prod(p.shape[1:])


def divides_experts(config: ModelConfig, ranks: int) -> bool:
    """Whether each rank keeps experts of its own: where the ranks divide their number (`shards.shard`)."""
    return ranks > 1 and config.experts > 0 and config.experts % ranks == 0


def numbers_of_units(model: Transformer, divided: bool) -> tuple[int, int, list[int]]:
    """Parameters outside the blocks, those of the largest block, and the routed experts of each block.

    divided: the routed experts count apart only, as they are not gathered; else both in their block and apart.
    """
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("blocks.", "mtp.")))
    units = [dict(unit.named_parameters()) for unit in (*model.blocks, *model.mtp)]
    routed = [sum(p.numel() for name, p in unit.items() if ".experts." in name) for unit in units]
    wholes = [sum(p.numel() for p in unit.values()) for unit in units]
    return outside, max(n - part * divided for n, part in zip(wholes, routed)), routed


def gathered_bytes(model: Transformer, itemsize: int, ranks: int, recompute: bool) -> int:
    """Bytes of weights and gradients that are whole while the policy is trained, at most: an estimate.

    b·(2·N_block + N_outside)    weights of the block that computes and of the next; embedding, last norm and head
    (b + 4)·N_block              the gradients of a block, and once more in fp32, in which they are summed
    b·N_outside                  the gradients of embedding and head, until the backward pass ends
    b·N_experts/W                copies of divided experts in the dtype that computes: all layers, with recompute one
    (b + 4)·N_layer/W            the gradients of one layer's divided experts, before they are added to those in fp32

    Without gradients of the weights, as with adapters, only weights count. When the backward pass ends, blocks are
    gone and (2b + 4)·N_outside are there: the larger of both is taken.
    """
    if ranks == 1:
        return 0
    b, divided = itemsize, divides_experts(model.config, ranks)
    outside, block, routed = numbers_of_units(model, divided)
    cast = b * (max(routed) if recompute else sum(routed)) // ranks if divided else 0
    if not model.embedding.weight.requires_grad:
        return b * (2 * block + outside) + cast
    cast += (b + 4) * max(routed) // ranks if divided else 0
    return max(b * (2 * block + 2 * outside) + (b + 4) * block + cast, (2 * b + 4) * outside)


def peak(parts: dict[str, int]) -> int:
    """Bytes of the larger of a step's two phases, sampling and training."""
    sampled, learned = (sum(parts[name] for name in phase) for phase in (SAMPLED, LEARNED))
    return sum(parts.values()) - min(sampled, learned)


def line(parts: dict[str, int], free_gib: float | None) -> str:
    """The peak, its parts in order of size, and the device's free memory, in GiB."""
    sizes = sorted(((n, name) for name, n in parts.items() if n), reverse=True)
    of_one = f" of each of {world()} ranks" if world() > 1 else ""
    text = f"predicted memory{of_one}: {peak(parts) / 2**30:.3g} GiB at the peak ("
    text += ", ".join(f"{name} {n / 2**30:.2g}" for n, name in sizes) + ")"
    return text if free_gib is None else f"{text}; {free_gib:.3g} GiB are free"


def show(parts: dict[str, int], device: torch.device) -> None:
    """Print the prediction and the device's free memory; weights and reference may be loaded already."""
    print(line(parts, free_memory_gib(device)))


def activation_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, recompute: bool = False) -> int:
    """Bytes kept for the backward pass of `tokens` tokens through all blocks and the last norm.

    With recompute: the input of every block, and all activations of the one that is being recomputed.
    """
    blocks = [_block_bytes(config, config.is_moe(layer), dtype.itemsize) for layer in range(config.layers)]
    each = config.layers * config.dim * dtype.itemsize + max(blocks) if recompute else sum(blocks)
    return tokens * (each + _norm_bytes(config.dim, dtype.itemsize))


def _norm_bytes(size: int, itemsize: int) -> int:
    """x and x / rms(x), in fp32, and the norm's output."""
    return size * (4 + 4 + itemsize)


def _block_bytes(config: ModelConfig, moe: bool, itemsize: int) -> int:
    """Bytes per token. SwiGLU keeps gate, up, SiLU(gate) and their product; an expert also its input and output."""
    D, H, F = config.dim, config.heads, config.expert_ffn
    norms = 2 * _norm_bytes(D, itemsize)
    if config.attention == "gqa":
        heads = config.head_size * (H + config.kv_heads)
        numbers = 2 * heads  # q, k, v and the output
        norms += 8 * heads if config.qk_norm else 0
    else:
        size = max(config.nope + config.rope, config.v_dim)  # heads are padded to one size
        numbers = 4 * H * size + H * config.v_dim
        norms += _norm_bytes(config.kv_lora, itemsize) + _norm_bytes(config.q_lora or 0, itemsize)
    if not moe:
        return norms + itemsize * (numbers + 4 * config.ffn)
    numbers += config.experts_per_token * (2 * D + 4 * F) + 4 * config.shared_experts * F
    return norms + itemsize * numbers + 4 * (config.experts + (D if itemsize < 4 else 0))  # router, in fp32

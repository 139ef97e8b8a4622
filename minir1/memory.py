"""Memory of a training step, predicted from shapes before it starts."""

from __future__ import annotations

import torch

from minir1.device import free_memory_gib
from minir1.model.config import ModelConfig
from minir1.model.count import cache_values
from minir1.model.packed_linear import packed_layers
from minir1.model.transformer import Transformer
from minir1.optim import split_parameters

SAMPLED = ("cache", "sampling")  # in memory only while answers are sampled
LEARNED = ("gradients", "activations", "logits")  # only while the policy is trained
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
) -> dict[str, int]:
    """Bytes of each part of a step. The model may be on the meta device; the trained parameters require gradients.

    microbatch: tokens of a forward and backward pass; rows, length: shape of the rollout in the cache; muon: Muon for
    the matrices of `optim.split_parameters`, else AdamW for all; reference: a second copy of the model, not needed with
    adapters; critic: a `heads.ScalarModel` of the model's shape, all of it trained.

    Weights, masters, moments, gradients, reference, critic and cache are exact; dequantised is the largest matrix that
    is kept in 4 bits, as its product needs it. Activations are those that autograd keeps on the CPU, within 5 %; fused
    kernels on a GPU keep less. Gradients count in fp32, as the masters need them.
    """
    config, dtype = model.config, model.embedding.weight.dtype
    tokens = max(length, min(microbatch, rows * length)) if rows else microbatch  # a longer row is a batch of its own
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    by_muon = sum(p.numel() for p in split_parameters(model)[0] if p.requires_grad) if muon else 0
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    outside = ("head.", "mtp.")  # not in a critic, which has a head of D numbers
    of_critic = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(outside)) + config.dim
    matrices = [layer.in_features * layer.out_features for layer in packed_layers(model).values()]
    half = dtype.itemsize < 4
    return {
        "weights": weights,
        "dequantised": dtype.itemsize * max(matrices, default=0),
        "masters": 4 * numbers if half else 0,
        "moments": 4 * (2 * numbers - by_muon),
        "reference": weights if reference else 0,
        "critic": of_critic * (dtype.itemsize + 4 * half + 8 + 4) if critic else 0,
        "cache": rows * length * cache_values(config) * dtype.itemsize,
        "sampling": 4 * config.vocab * (5 * rows + (config.dim if half else 0)) if rows else 0,  # logits, upcast head
        "gradients": 4 * numbers,
        "activations": activation_bytes(config, tokens, dtype, recompute),
        "logits": 3 * min(4 * tokens * config.vocab, max(LOGIT_BYTES, 4 * LOGIT_TOKENS * config.vocab)),
    }


def peak(parts: dict[str, int]) -> int:
    """Bytes of the larger of a step's two phases, sampling and training."""
    sampled, learned = (sum(parts[name] for name in phase) for phase in (SAMPLED, LEARNED))
    return sum(parts.values()) - min(sampled, learned)


def line(parts: dict[str, int], free_gib: float | None) -> str:
    """The peak, its parts in order of size, and the device's free memory, in GiB."""
    sizes = sorted(((n, name) for name, n in parts.items() if n), reverse=True)
    text = f"predicted memory: {peak(parts) / 2**30:.3g} GiB at the peak ("
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

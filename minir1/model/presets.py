"""Configurations of published models and of the demonstration's two, without weights.

Sources are the config.json of each release and, for DeepSeek, arXiv:2412.19437 (section 4.2) and arXiv:2405.04434
(appendix B).
"""

from __future__ import annotations

from dataclasses import replace

from minir1.model.config import ModelConfig, dense
from minir1.model.rope import RopeScaling

DEEPSEEK_V3 = ModelConfig(
    vocab=129_280, dim=7168, layers=61, heads=128, ffn=18_432,
    q_lora=1536, kv_lora=512, nope=128, rope=64, v_dim=128,
    experts=256, experts_per_token=8, shared_experts=1, expert_ffn=2048, dense_layers=3,
    groups=8, groups_kept=4, route_scale=2.5, mtp_depth=1, init_std=0.006,
    rope_scaling=RopeScaling("yarn", factor=40, original=4096, mscale=1.0, mscale_all=1.0),
    max_positions=163_840, bos=0, eos=1,
)

DEEPSEEK_16B = ModelConfig(  # V3's small sibling
    vocab=102_400, dim=2048, layers=27, heads=16, ffn=10_944,
    kv_lora=512, nope=128, rope=64, v_dim=128,
    experts=64, experts_per_token=6, shared_experts=2, expert_ffn=1408, dense_layers=1, init_std=0.006,
    rope_scaling=RopeScaling("yarn", factor=40, original=4096, mscale=0.707, mscale_all=0.707),
    max_positions=163_840, bos=100_000, eos=100_001,
)

def qwen2(vocab: int, dim: int, layers: int, heads: int, kv_heads: int, ffn: int, **others) -> ModelConfig:
    """A Qwen2.5, or a model distilled from R1 with its shape; the distilled 1.5B is untied, Qwen2.5's is tied."""
    shape = {"dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn}
    return dense(vocab=vocab, **shape, **others, max_positions=131_072, init_std=0.02)


def llama3(dim: int, layers: int, heads: int, ffn: int) -> ModelConfig:
    """A model distilled from R1 with the shape of a Llama 3."""
    return dense(
        vocab=128_256, dim=dim, layers=layers, heads=heads, kv_heads=8, ffn=ffn, qkv_bias=False, norm_eps=1e-5,
        rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", factor=8, original=8192, slow=1, fast=4),
        max_positions=131_072, init_std=0.02,
    )


def qwen25(*shape: int, max_positions: int, **others) -> ModelConfig:
    """A Qwen2.5, before or after it was tuned to instructions."""
    return replace(qwen2(*shape, rope_theta=1_000_000.0, **others), max_positions=max_positions)


LLAMA_8B = llama3(4096, 32, 32, 14_336)

QWEN3 = {  # shared by the two presets
    "attention": "gqa", "vocab": 151_936, "head_dim": 128, "qk_norm": True, "rope_theta": 1_000_000.0,
    "max_positions": 40_960, "init_std": 0.02,
}

PRESETS = {
    "deepseek-r1": DEEPSEEK_V3,  # the same network as V3
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3-16b": DEEPSEEK_16B,
    "deepseek-v2-lite": replace(DEEPSEEK_16B, score="softmax", norm_topk=False),
    "qwen2.5-0.5b": qwen25(151_936, 896, 24, 14, 2, 4864, max_positions=32_768, tied=True),
    "qwen2.5-1.5b": qwen25(151_936, 1536, 28, 12, 2, 8960, max_positions=131_072, tied=True),
    "qwen2.5-7b": qwen25(152_064, 3584, 28, 28, 4, 18_944, max_positions=131_072),
    "llama-3.1-8b": LLAMA_8B,
    "r1-distill-qwen-1.5b": qwen2(151_936, 1536, 28, 12, 2, 8960),
    "r1-distill-qwen-7b": qwen2(152_064, 3584, 28, 28, 4, 18_944),
    "r1-distill-qwen-14b": qwen2(152_064, 5120, 48, 40, 8, 13_824, rope_theta=1_000_000.0, norm_eps=1e-5),
    "r1-distill-qwen-32b": qwen2(152_064, 5120, 64, 40, 8, 27_648, rope_theta=1_000_000.0, norm_eps=1e-5),
    "r1-distill-llama-8b": LLAMA_8B,
    "r1-distill-llama-70b": llama3(8192, 80, 64, 28_672),
    "qwen3-0.6b": ModelConfig(**QWEN3, dim=1024, layers=28, heads=16, kv_heads=8, ffn=3072, experts=0, tied=True),
    "qwen3-30b-a3b": ModelConfig(
        **QWEN3, dim=2048, layers=48, heads=32, kv_heads=4, ffn=6144,
        experts=128, experts_per_token=8, shared_experts=0, expert_ffn=768, dense_layers=0, score="softmax",
    ),
    "granite-8b": dense(  # granite-3.1-8b
        vocab=49_155, dim=4096, layers=40, heads=32, kv_heads=8, ffn=12_800, qkv_bias=False, tied=True, norm_eps=1e-5,
        rope_theta=10_000_000.0, attention_scale=1 / 128, embedding_scale=12.0, residual_scale=0.22,
        logit_scale=1 / 16, max_positions=131_072, init_std=0.02,
    ),
    "minir1": ModelConfig(vocab=128),  # the demonstration's
    "minir1-dense": dense(vocab=128),
}

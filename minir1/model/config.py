"""ModelConfig: the architecture of a model. Field names follow DeepSeek-V3 (arXiv:2412.19437, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minir1.model.rope import RopeScaling
from minir1.model.typed import check_types


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer. The defaults are the tiny MLA + MoE model of the CPU demonstration.

    Raises ValueError when a value is out of range or two fields do not fit together, naming the field.
    """

    vocab: int = 192  # V
    dim: int = 128  # D
    layers: int = 4  # L
    heads: int = 4  # H
    attention: str = "mla"  # "mla" | "gqa"

    # Multi-head latent attention (arXiv:2405.04434, section 2.1)
    q_lora: int | None = None  # d_c', rank of the queries; None: full rank
    kv_lora: int = 64  # d_c, rank of keys and values: size of the latent in the cache
    nope: int = 16  # d_h, head size without position
    rope: int = 16  # d_h^R, size of the decoupled RoPE key
    v_dim: int = 32  # head size of the values

    # Grouped-query attention (arXiv:2305.13245)
    kv_heads: int = 2  # K
    head_dim: int | None = None  # None: D / H
    qkv_bias: bool = False  # as in Qwen2
    o_bias: bool = False  # bias of the output projection; Llama's attention_bias is qkv_bias and o_bias
    qk_norm: bool = False  # RMSNorm of each head's query and key before RoPE, as in Qwen3

    # Feed-forward: SwiGLU, dense or a mixture of experts (DeepSeekMoE, arXiv:2401.06066)
    ffn: int = 256  # inner width of a dense layer
    experts: int = 8  # E, routed experts; 0: every layer is dense
    experts_per_token: int = 2  # K_r
    shared_experts: int = 1  # N_s
    expert_ffn: int = 64  # inner width of one expert
    dense_layers: int = 1  # the first k layers are dense
    score: str = "sigmoid"  # s_{i,t}: "sigmoid" (V3) | "softmax" (V2)
    norm_topk: bool = True  # gates of the chosen experts sum to one
    route_scale: float = 1.0  # factor on the gates, 2.5 in V3
    groups: int = 1  # expert groups of group-limited routing
    groups_kept: int = 1  # groups a token may use

    rope_theta: float = 10_000.0  # θ
    rope_scaling: RopeScaling = RopeScaling()  # extension of the window
    norm_eps: float = 1e-6
    attention_scale: float | None = None  # factor on q·k; None: 1/√(head size). This and the next two as in Granite
    embedding_scale: float = 1.0  # factor on the embedding
    residual_scale: float = 1.0  # factor on the output of each sublayer
    logit_scale: float = 1.0  # z = softcap(logit_scale · h·wᵀ) / temperature
    softcap: float | None = None
    mtp_depth: int = 0  # multi-token prediction modules (V3, section 2.2)
    tied: bool = False  # head.weight is embedding.weight
    max_positions: int = 4096  # written to config.json; longer rows are not refused
    init_std: float = 0.045  # V3 has 0.006 at D = 7168; 0.006·√(7168/128) gives activations of the same scale
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def __post_init__(self):
        def need(fields: str, ok: Callable, allowed: str):
            for field in fields.split():
                if not ok(value := getattr(self, field)):
                    raise ValueError(f"ModelConfig.{field} = {value!r}: {allowed}")

        check_types(self)
        gqa = self.attention == "gqa"
        sizes = "vocab dim layers heads kv_lora nope v_dim kv_heads ffn expert_ffn q_lora head_dim max_positions"
        need(sizes, lambda n: n is None or n > 0, "must be positive")
        need("attention", lambda name: name in ("mla", "gqa"), "'mla' or 'gqa'")
        need("score", lambda name: name in ("sigmoid", "softmax"), "'sigmoid' or 'softmax'")
        need("rope", lambda n: n > 0 and n % 2 == 0, "must be even and positive")
        need("qkv_bias o_bias qk_norm head_dim", lambda value: gqa or not value, "only attention = 'gqa' has it")
        need("q_lora", lambda n: not (gqa and n), "only attention = 'mla' has it")
        if gqa:
            need("kv_heads", lambda n: self.heads % n == 0, f"must divide heads = {self.heads}")
            need("heads", lambda n: self.head_dim or self.dim % n == 0, f"must divide dim = {self.dim}")
            need("head_dim", lambda _: self.head_size % 2 == 0, "must be even for RoPE")
        need("rope_theta", lambda x: x > 1, "must be above 1")
        scales = "logit_scale embedding_scale residual_scale route_scale attention_scale softcap norm_eps"
        need(scales, lambda x: x is None or 1e-30 <= x <= 1e6, "1e-30 to 1e6")
        need("init_std mtp_depth experts", lambda x: x >= 0, "must not be negative")
        need("dense_layers", lambda n: 0 <= n <= self.layers, f"0 to layers = {self.layers}")
        if self.experts:
            need("groups", lambda n: n > 0 and self.experts % n == 0, f"must divide experts = {self.experts}")
            need("groups_kept", lambda n: 1 <= n <= self.groups, f"1 to groups = {self.groups}")
            reachable = self.experts // self.groups * self.groups_kept
            need("experts_per_token", lambda n: 1 <= n <= reachable, f"1 to {reachable} reachable experts")
            need("shared_experts", lambda n: n >= 0, "must not be negative")
        allowed = f"a token below vocab = {self.vocab}, or None"
        need("bos eos pad", lambda token: token is None or 0 <= token < self.vocab, allowed)

    @property
    def head_size(self) -> int:
        """Head size of grouped-query attention."""
        return self.head_dim or self.dim // self.heads

    def is_moe(self, layer: int) -> bool:
        """Whether this layer routes its tokens to experts."""
        return self.experts > 0 and layer >= self.dense_layers

    @property
    def moe_layers(self) -> int:
        """L_moe: how many layers route their tokens, the last ones of the model."""
        return self.layers - self.dense_layers if self.experts else 0


def dense(**changes) -> ModelConfig:
    """The dense model of the demonstration: grouped-query attention and SwiGLU, with biases as in Qwen2."""
    return ModelConfig(**{"attention": "gqa", "experts": 0, "qkv_bias": True, **changes})

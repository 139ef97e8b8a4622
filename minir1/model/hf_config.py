"""config.json of the Hugging Face classes that compute what this model computes, out and in.

MLA with sigmoid scores is DeepseekV3ForCausalLM (a dense one has first_k_dense_replace = layers); dense GQA with biased
projections is Qwen2ForCausalLM, without bias LlamaForCausalLM.
"""

from __future__ import annotations

from minir1.model.config import ModelConfig

SUPPORTED = ("DeepseekV3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
ONLY = {  # fields of their config.json that change the result, and the one value that is computed here
    "hidden_act": "silu",
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "use_sliding_window": False,
}


def architecture(config: ModelConfig) -> str:
    """The Hugging Face class that computes the same; ValueError names the field that none has."""

    def refuse(field: str, why: str):
        raise ValueError(f"no Hugging Face class for {field} = {getattr(config, field)!r}: {why}")

    if config.softcap is not None:
        refuse("softcap", "none of the supported classes has it")
    if config.logit_scale != 1.0:
        refuse("logit_scale", "none of the supported classes has it")
    if config.attention == "mla":
        if config.experts and config.score != "sigmoid":
            refuse("score", "MLA with softmax scores is not exported yet")
        if config.experts and config.shared_experts == 0:
            refuse("shared_experts", "DeepseekV3 has at least one")
        if config.experts and config.experts // config.groups < 2:
            refuse("groups", "DeepseekV3 adds the two best experts of a group")
        return "DeepseekV3ForCausalLM"
    if config.experts:
        refuse("experts", "GQA with experts is not exported yet")
    return "Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"


def to_hf_config(config: ModelConfig) -> dict:
    """The config.json of this model."""
    name = architecture(config)
    values = {
        "architectures": [name],
        "model_type": {"DeepseekV3ForCausalLM": "deepseek_v3", "Qwen2ForCausalLM": "qwen2"}.get(name, "llama"),
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "eos_token_id": config.eos,
        "pad_token_id": config.pad,
        "torch_dtype": "float32",
    }
    if config.attention == "gqa":
        return values | {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    return values | {
        "num_key_value_heads": config.heads,
        "q_lora_rank": config.q_lora,
        "kv_lora_rank": config.kv_lora,
        "qk_nope_head_dim": config.nope,
        "qk_rope_head_dim": config.rope,
        "v_head_dim": config.v_dim,
        "rope_interleave": True,
        "n_routed_experts": config.experts or 1,
        "num_experts_per_tok": config.experts_per_token,
        "n_shared_experts": config.shared_experts,
        "moe_intermediate_size": config.expert_ffn,
        "first_k_dense_replace": config.dense_layers if config.experts else config.layers,
        "n_group": config.groups,
        "topk_group": config.groups_kept,
        "norm_topk_prob": config.norm_topk,
        "scoring_func": config.score,
        "topk_method": "noaux_tc",
        "routed_scaling_factor": config.route_scale,
        "num_nextn_predict_layers": 0,
    }


def from_hf_config(values: dict) -> ModelConfig:
    """The model that a config.json describes; ValueError lists what is supported, or names what is missing."""
    name = (values.get("architectures") or ["?"])[0]
    if name not in SUPPORTED:
        raise ValueError(f"architecture {name!r} is not supported; supported are {', '.join(SUPPORTED)}")
    for field, value in ONLY.items():
        if values.get(field, value) not in (value, None):
            raise ValueError(f"{field} = {values[field]!r} is not supported, only {value!r}")
    try:
        return _from_hf_config(name, values)
    except KeyError as error:
        raise ValueError(f"the config of a {name} needs the field {error}") from error


def _from_hf_config(name: str, values: dict) -> ModelConfig:
    def token(key: str) -> int | None:  # several are a list, the first of them the EOS
        number = values.get(f"{key}_token_id")
        return number[0] if isinstance(number, list) else number

    parameters = values.get("rope_parameters") or {}  # transformers 5 writes this instead of rope_theta
    scaled = parameters.get("rope_type", "default") != "default"
    scaling = values.get("rope_scaling") or (parameters if scaled else None)
    if scaling:
        raise ValueError(f"rope_scaling {scaling} is not supported")
    common = {
        "vocab": values["vocab_size"],
        "dim": values["hidden_size"],
        "layers": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "ffn": values["intermediate_size"],
        "norm_eps": values["rms_norm_eps"],
        "rope_theta": values.get("rope_theta") or parameters.get("rope_theta", 10_000.0),  # where left out: 10,000
        "max_positions": values["max_position_embeddings"],
        "init_std": values.get("initializer_range", 0.02),
        "tied": values.get("tie_word_embeddings", False),
        **{key: token(key) for key in ("bos", "eos", "pad")},
    }
    if name != "DeepseekV3ForCausalLM":
        return ModelConfig(
            **common,
            attention="gqa",
            experts=0,
            kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
            head_dim=values.get("head_dim"),
            qkv_bias=name == "Qwen2ForCausalLM" or values.get("attention_bias", False),
        )
    moe = values["first_k_dense_replace"] < values["num_hidden_layers"]
    return ModelConfig(
        **common,
        attention="mla",
        q_lora=values["q_lora_rank"],
        kv_lora=values["kv_lora_rank"],
        nope=values["qk_nope_head_dim"],
        rope=values["qk_rope_head_dim"],
        v_dim=values["v_head_dim"],
        experts=values["n_routed_experts"] if moe else 0,
        experts_per_token=values["num_experts_per_tok"],
        shared_experts=values["n_shared_experts"],
        expert_ffn=values["moe_intermediate_size"],
        dense_layers=values["first_k_dense_replace"] if moe else 0,
        groups=values["n_group"],
        groups_kept=values["topk_group"],
        norm_topk=values["norm_topk_prob"],
        route_scale=values["routed_scaling_factor"],
    )

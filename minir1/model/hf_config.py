"""config.json of the Hugging Face classes that compute what this model computes, out and in.

    DeepseekV3  MLA, sigmoid scores; a dense one has first_k_dense_replace = layers
    DeepseekV2  MLA, softmax scores, gates not normed
    Qwen3Moe    GQA with QK-norm, softmax scores, no shared expert
    Qwen3       GQA with QK-norm, dense
    Granite     GQA, dense, with a factor on embedding, residual, attention or logits
    Qwen2       GQA, dense, biases on query, key and value
    Llama       GQA, dense, biases nowhere or on all four projections

A model that none of these classes computes, or a class's option that this model lacks, raises an error with its field.
"""

from __future__ import annotations

import math

from minir1.model.config import ModelConfig
from minir1.model.rope import RopeScaling
from minir1.model.typed import is_a, shown

V3, V2, MOE = "DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM", "Qwen3MoeForCausalLM"
QWEN3, GRANITE, QWEN2, LLAMA = "Qwen3ForCausalLM", "GraniteForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"
SCALAR = "ForSequenceClassification"  # instead of ForCausalLM, for models that return one number: heads.py
SUPPORTED = {  # class -> model_type
    V3: "deepseek_v3",
    V2: "deepseek_v2",
    QWEN2: "qwen2",
    QWEN3: "qwen3",
    MOE: "qwen3_moe",
    LLAMA: "llama",
    GRANITE: "granite",
}
COMMON = {  # our fields and theirs, in every class
    "vocab": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
DEEPSEEK = {  # and in DeepSeek's classes
    "q_lora": "q_lora_rank",
    "kv_lora": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn": "moe_intermediate_size",
    "route_scale": "routed_scaling_factor",
}
FACTORS = {"attention_scale": None, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0}
SPECIAL = ("bos", "eos", "pad")  # …_token_id there
BIAS_ON_ALL_OR_NONE = (QWEN3, MOE, GRANITE, LLAMA)
HEADS_DIVIDE_DIM = (V2, LLAMA)  # transformers refuses others

ONLY = {  # fields of their config.json that change the result, and the one value that is computed here
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "is_causal": True,
    **dict.fromkeys(("attention_chunk_size", "attribute_map", "configuration_files", "per_layer_config")),
    "transformers_weights": None,  # the name of another file of weights
}
NO_WINDOW = {"sliding_window": None}  # where it has no switch
ONLY_MLA = NO_WINDOW | {"attention_bias": False, "rope_interleave": True, "moe_layer_freq": 1}
ONLY_IN = {
    V3: ONLY_MLA | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    V2: ONLY_MLA | {"scoring_func": "softmax", "norm_topk_prob": False},
    MOE: {"decoder_sparse_step": 1},
    LLAMA: NO_WINDOW,
    GRANITE: NO_WINDOW,
}

ORIGINAL = "original_max_position_embeddings"
LINEAR = {"factor": "factor", "mscale_all_dim": "mscale_all"}
YARN = LINEAR | {ORIGINAL: "original", "beta_slow": "slow", "beta_fast": "fast", "mscale": "mscale"}
YARN |= {"attention_factor": "attention_factor", "truncate": "whole_pairs"}
LLAMA3 = LINEAR | {ORIGINAL: "original", "low_freq_factor": "slow", "high_freq_factor": "fast"}
SCALINGS = {"default": {}, "linear": LINEAR, "yarn": YARN, "llama3": LLAMA3}  # rope_type -> their fields and ours
NEEDED = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
OTHERS = {  # fields of theirs that are read too, by type
    "int": "first_k_dense_replace num_experts num_local_experts",
    "int | None": "num_key_value_heads head_dim n_routed_experts n_shared_experts n_group topk_group "
    "num_nextn_predict_layers original_max_position_embeddings",
    "float": "initializer_range attention_multiplier embedding_multiplier residual_multiplier logits_scaling",
    "float | None": "rope_theta",
    "bool | None": "attention_bias norm_topk_prob tie_word_embeddings",
    "int | list | None": "bos_token_id eos_token_id pad_token_id",
    "list | None": "layer_types mlp_only_layers",
    "dict | None": "rope_scaling rope_parameters quantization_config id2label",
}
TYPES = {theirs: ModelConfig.__annotations__[ours] for ours, theirs in (COMMON | DEEPSEEK).items()}
TYPES |= {field: kind for kind, names in OTHERS.items() for field in names.split()}


def architecture(config: ModelConfig) -> str:
    """The Hugging Face class that computes the same; ValueError names the field that no class supports."""

    def refuse(field: str, why: str):
        value = config.rope_scaling.kind if field == "rope_scaling.kind" else getattr(config, field)
        raise ValueError(f"no Hugging Face class for {field} = {value!r}: {why}")

    name = _closest(config)
    for field, value in _fixed(name, config).items():
        if getattr(config, field) != value:
            refuse(field, f"{name}, the closest, has {value!r} only")
    if config.rope_scaling.kind == "ntk":
        refuse("rope_scaling.kind", f"theirs are {', '.join(SCALINGS)}")
    if name in HEADS_DIVIDE_DIM and config.dim % config.heads:
        refuse("heads", f"{name} wants a divisor of dim = {config.dim}")
    if config.attention == "mla" and config.experts:
        if config.shared_experts == 0:
            refuse("shared_experts", f"{name} has at least one")
        if name == V3 and config.experts // config.groups < 2:
            refuse("groups", f"{name} adds the two best experts of a group")
        if config.mtp_depth and config.dense_layers == config.layers:
            refuse("dense_layers", f"a {name} without a layer of experts has none in its MTP modules")
    return name


def _closest(config: ModelConfig) -> str:
    if config.attention == "mla":
        return V2 if config.experts and config.score == "softmax" else V3
    if config.experts:
        return MOE
    if config.qk_norm:
        return QWEN3
    if any(getattr(config, field) != value for field, value in FACTORS.items()):
        return GRANITE
    return QWEN2 if config.qkv_bias and not config.o_bias else LLAMA


def _fixed(name: str, config: ModelConfig) -> dict:
    """Our fields that are not free in this class, and the values they must have."""
    fixed = {"softcap": None}
    if name != GRANITE:
        fixed |= FACTORS
    if name != V3:
        fixed |= {"mtp_depth": 0}
    if name == V2:
        fixed |= {"norm_topk": False}
    if name == MOE:
        fixed |= {"score": "softmax", "shared_experts": 0, "groups": 1, "route_scale": 1.0, "qk_norm": True}
    if name in BIAS_ON_ALL_OR_NONE:
        fixed |= {"o_bias": config.qkv_bias}
    return fixed


def to_hf_config(config: ModelConfig) -> dict:
    """The config.json of this model, in the form that transformers 4 and 5 both read."""
    name = architecture(config)
    values = {
        "architectures": [name],
        "model_type": SUPPORTED[name],
        **{theirs: getattr(config, ours) for ours, theirs in COMMON.items()},
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        **{f"{token}_token_id": getattr(config, token) for token in SPECIAL},
        "torch_dtype": "float32",
        **_scaling_to_hf(config.rope_scaling),
    }
    return values | (_mla_to_hf(name, config) if config.attention == "mla" else _gqa_to_hf(name, config))


def _scaling_to_hf(scaling: RopeScaling) -> dict:
    if scaling.kind == "none":
        return {}
    values = {theirs: getattr(scaling, ours) for theirs, ours in SCALINGS[scaling.kind].items()}
    kind = {"type": scaling.kind, "rope_type": scaling.kind}  # DeepSeek's code reads "type"
    return {"rope_scaling": kind | {field: value for field, value in values.items() if value is not None}}


def _gqa_to_hf(name: str, config: ModelConfig) -> dict:
    values = {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    if name in BIAS_ON_ALL_OR_NONE:
        values |= {"attention_bias": config.qkv_bias}
    if name == GRANITE:
        values |= {
            "attention_multiplier": config.attention_scale or config.head_size**-0.5,
            "embedding_multiplier": config.embedding_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": 1 / config.logit_scale,
        }
    if name == MOE:
        values |= {
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.expert_ffn,
            "norm_topk_prob": config.norm_topk,
            "mlp_only_layers": list(range(config.dense_layers)),
            "decoder_sparse_step": 1,
        }
    return values


def _mla_to_hf(name: str, config: ModelConfig) -> dict:
    grouped = "group_limited_greedy" if config.groups > 1 else "greedy"
    return {theirs: getattr(config, ours) for ours, theirs in DEEPSEEK.items()} | {
        "num_key_value_heads": config.heads,
        "rope_interleave": True,
        "n_routed_experts": config.experts or 1,
        "n_shared_experts": config.shared_experts,
        "first_k_dense_replace": config.dense_layers if config.experts else config.layers,
        "n_group": config.groups,
        "topk_group": config.groups_kept,
        "norm_topk_prob": config.norm_topk,
        "scoring_func": "sigmoid" if name == V3 else "softmax",
        "topk_method": "noaux_tc" if name == V3 else grouped,
    } | ({"num_nextn_predict_layers": config.mtp_depth} if name == V3 else {})


def from_hf_config(values: dict) -> ModelConfig:
    """The model that a config.json describes; ValueError lists what is supported, or names what is missing.

    Fields that do not change the result (dropout, losses, caches, storage of weights) and unknown names are ignored.
    """
    name = class_of(values)
    if name not in SUPPORTED:
        wrong = f"architecture {name!r} is not supported"
        if name == "?":
            wrong = "config.json names no architecture: it is no model's (a run's model is in its checkpoint/)"
        raise ValueError(f"{wrong}; supported are {', '.join(SUPPORTED)}")
    only = ONLY | ONLY_IN.get(name, {}) | {"model_type": SUPPORTED[name]}
    for field, value in only.items():
        if values.get(field, value) != value:
            raise ValueError(f"{field} = {shown(values[field])} is not supported, only {value!r}")
    for field, kind in TYPES.items():
        if field in values and not is_a(values[field], kind):
            raise ValueError(f"{field} = {shown(values[field])}: must be {kind}, and finite")
    if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        raise ValueError(f"layer_types = {shown(values['layer_types'])} is not supported, only 'full_attention'")
    try:
        kind = _mla_from_hf if name in (V3, V2) else _gqa_from_hf
        config = ModelConfig(**_common_from_hf(values), **kind(name, values))
    except KeyError as error:
        raise ValueError(f"the config of a {name} needs the field {error}") from error
    architecture(config)  # what is loaded can be saved
    return config


def class_of(values: dict) -> str:
    """The class that a config.json names first, or "?"."""
    stated = values.get("architectures")
    return stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else "?"


def _common_from_hf(values: dict) -> dict:
    def token(key: str) -> int | None:  # of a list, as of several end tokens, the first; -1 in old Llama files is none
        number = values.get(f"{key}_token_id")
        number = (number or [None])[0] if isinstance(number, list) else number
        return None if number == -1 else number

    theta, scaling = _rope_from_hf(values)
    return {
        **{ours: values[theirs] for ours, theirs in COMMON.items()},
        "rope_theta": theta,
        "rope_scaling": scaling,
        "init_std": values.get("initializer_range", 0.02),
        "tied": values.get("tie_word_embeddings") or False,
        **{key: token(key) for key in SPECIAL},
    }


def _rope_from_hf(values: dict) -> tuple[float, RopeScaling]:
    """θ, and the scaling that `rope_scaling` or, as transformers 5 writes it, `rope_parameters` describes."""
    field = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = {key: value for key, value in (values.get(field) or {}).items() if value is not None or key == "truncate"}
    stated = values.get("rope_theta")
    theta = rope.pop("rope_theta", 10_000.0 if stated is None else stated)  # transformers' default
    old_name = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_name)
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"{field}.rope_type = {shown(kind)} is not supported, only {', '.join(SCALINGS)}")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{field}.partial_rotary_factor is not supported, only 1.0")
    for key in rope:
        if key not in SCALINGS[kind]:
            known = ", ".join(SCALINGS[kind]) or "none"
            raise ValueError(f"{field}.{key} = {shown(rope[key])} is not supported; fields of {kind!r} are {known}")
    if kind == "default":
        return theta, RopeScaling()
    for key in NEEDED[kind]:
        if key not in rope:
            raise KeyError(f"{field}.{key}")
    scaling = {ours: rope[theirs] for theirs, ours in SCALINGS[kind].items() if theirs in rope}
    if ORIGINAL in SCALINGS[kind]:  # as in transformers that beside the object is stronger
        lengths = values.get(ORIGINAL), scaling.get("original"), values["max_position_embeddings"]
        scaling["original"] = next(length for length in lengths if length is not None)
    return theta, RopeScaling(kind, **scaling)


def _gqa_from_hf(name: str, values: dict) -> dict:
    bias = values.get("attention_bias") or False
    fields = {
        "attention": "gqa",
        "experts": 0,
        "kv_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "head_dim": values.get("head_dim") or (128 if name == QWEN3 else None),
        "qkv_bias": bias or name == QWEN2,
        "o_bias": bias and name != QWEN2,
        "qk_norm": name in (QWEN3, MOE),
    }
    if name == GRANITE:
        fields |= {
            "attention_scale": values.get("attention_multiplier", 1.0),
            "embedding_scale": values.get("embedding_multiplier", 1.0),
            "residual_scale": values.get("residual_multiplier", 1.0),
            "logit_scale": 1 / (values.get("logits_scaling", 1.0) or math.inf),  # 0 is refused as a scale of 0
        }
    if name == MOE:
        dense = values.get("mlp_only_layers") or ()
        if any(layer not in dense for layer in range(len(dense))):
            raise ValueError(f"mlp_only_layers = {shown(dense)} is not supported, only the first layers, from 0 on")
        fields |= {
            "experts": values["num_local_experts"] if "num_local_experts" in values else values["num_experts"],
            "experts_per_token": values["num_experts_per_tok"],
            "shared_experts": 0,
            "expert_ffn": values["moe_intermediate_size"],
            "dense_layers": len(dense),
            "score": "softmax",
            "norm_topk": values.get("norm_topk_prob", False),
        }
    return fields


def _mla_from_hf(name: str, values: dict) -> dict:
    if name == V3 and values.get("head_dim", values["qk_rope_head_dim"]) != values["qk_rope_head_dim"]:
        raise ValueError(f"head_dim = {values['head_dim']} is not supported, only that of RoPE, qk_rope_head_dim")
    moe = values["first_k_dense_replace"] < values["num_hidden_layers"]
    method, experts = values.get("topk_method", "greedy"), values["n_routed_experts"]
    if name == V2 and method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method = {shown(method)} is not supported, only 'greedy' or 'group_limited_greedy'")
    limited = name == V3 or method == "group_limited_greedy"  # to the experts of a few groups
    return {ours: values[theirs] for ours, theirs in DEEPSEEK.items()} | {
        "attention": "mla",
        "experts": values.get("num_local_experts" if name == V3 else "num_experts", experts) if moe else 0,
        "shared_experts": values["n_shared_experts"] or 0,
        "dense_layers": values["first_k_dense_replace"] if moe else 0,
        "score": "sigmoid" if name == V3 else "softmax",
        "groups": values["n_group"] if limited else 1,
        "groups_kept": values["topk_group"] if limited else 1,
        "norm_topk": values["norm_topk_prob"] if name == V3 else False,
        "mtp_depth": (values.get("num_nextn_predict_layers") or 0) if name == V3 else 0,
    }

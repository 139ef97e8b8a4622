"""hf_config.py: published config.json files, both forms of RoPE scaling, and what is refused, in and out, by name."""
import dataclasses
import math
import re

import pytest

from minir1.model.config import ModelConfig, dense
from minir1.model.hf_config import SUPPORTED, architecture, from_hf_config, to_hf_config
from minir1.model.rope import RopeScaling
from minir1.model.transformer import on_meta

AROUND = {  # fields of published files that change nothing here
    "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration.Config"}, "pretraining_tp": 1,
    "torch_dtype": "bfloat16", "transformers_version": "4.39.3", "use_cache": True, "hidden_act": "silu",
}
MOE_AROUND = AROUND | {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "moe_layer_freq": 1}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
PUBLISHED = {
    "DeepSeek-V3": MOE_AROUND | {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1,
        "first_k_dense_replace": 3, "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        },
    },
    "DeepSeek-V2-Lite": MOE_AROUND | {
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "bos_token_id": 100000,
        "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "tie_word_embeddings": False, "topk_group": 1,
        "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": AROUND | {
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643, "hidden_size": 1536,
        "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 131072,
        "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
        "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Llama-3.1-8B": AROUND | {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "Qwen3-0.6B": AROUND | {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-30B-A3B": AROUND | {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "granite-3.1-8b": AROUND | {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
        "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12800, "logits_scaling": 16.0,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True,
        "vocab_size": 49155,
    },
    "deepseek-llm-7b": AROUND | {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 100000, "eos_token_id": 100001, "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 30, "num_key_value_heads": 32, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 102400,
    },
}


PARAMETERS = {  # in billions, as their hub pages count them; V3's with its MTP module, embedding and head once
    "DeepSeek-V3": 682.636, "DeepSeek-V2-Lite": 15.706, "DeepSeek-R1-Distill-Qwen-1.5B": 1.777, "Llama-3.1-8B": 8.030,
    "Qwen3-0.6B": 0.596, "Qwen3-30B-A3B": 30.532, "granite-3.1-8b": 8.171, "deepseek-llm-7b": 6.910,
}
READ = {  # fields that are easily read wrong
    "DeepSeek-V3": {
        "attention": "mla", "q_lora": 1536, "score": "sigmoid", "norm_topk": True, "route_scale": 2.5, "groups": 8,
        "groups_kept": 4, "dense_layers": 3, "mtp_depth": 1, "experts_per_token": 8, "shared_experts": 1, "eos": 1,
        "rope_scaling": RopeScaling("yarn", 40, 4096, 1, 32, mscale=1.0, mscale_all=1.0), "max_positions": 163840,
    },
    "DeepSeek-V2-Lite": {
        "attention": "mla", "q_lora": None, "score": "softmax", "norm_topk": False, "route_scale": 1.0, "groups": 1,
        "dense_layers": 1, "mtp_depth": 0, "experts_per_token": 6, "shared_experts": 2, "expert_ffn": 1408,
        "rope_scaling": RopeScaling("yarn", 40, 4096, 1, 32, mscale=0.707, mscale_all=0.707),
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        "attention": "gqa", "qkv_bias": True, "o_bias": False, "qk_norm": False, "head_size": 128, "kv_heads": 2,
        "experts": 0, "rope_scaling": RopeScaling(), "rope_theta": 10000, "tied": False,
    },
    "Llama-3.1-8B": {
        "qkv_bias": False, "o_bias": False, "eos": 128001, "norm_eps": 1e-5, "rope_theta": 5e5, "head_size": 128,
        "rope_scaling": RopeScaling("llama3", 8, 8192, slow=1, fast=4),
    },
    "Qwen3-0.6B": {"qk_norm": True, "qkv_bias": False, "head_size": 128, "dim": 1024, "heads": 16, "tied": True},
    "Qwen3-30B-A3B": {
        "attention": "gqa", "qk_norm": True, "experts": 128, "experts_per_token": 8, "expert_ffn": 768,
        "shared_experts": 0, "score": "softmax", "norm_topk": True, "dense_layers": 0, "route_scale": 1.0,
    },
    "granite-3.1-8b": {
        "attention_scale": 1 / 128, "embedding_scale": 12, "residual_scale": 0.22, "logit_scale": 1 / 16, "tied": True,
        "qkv_bias": False, "rope_theta": 1e7, "bos": 0, "eos": 0, "pad": 0,
    },
    "deepseek-llm-7b": {"qkv_bias": False, "qk_norm": False, "kv_heads": 32, "head_size": 128, "eos": 100001},
}


# ---------------------------------------------------------------- published files


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name):
    config = from_hf_config(PUBLISHED[name])
    assert {field: getattr(config, field) for field in READ[name]} == READ[name]
    count = sum(p.numel() for p in on_meta(config).parameters())
    assert round(count / 1e9, 3) == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_written_as_they_were_read(name):
    """Every field of theirs that we write has the value that the published file has."""
    published, written = PUBLISHED[name], to_hf_config(from_hf_config(PUBLISHED[name]))
    assert [architecture(from_hf_config(published))] == published["architectures"]
    same = set(published) & set(written) - {"torch_dtype", "eos_token_id", "rope_scaling"}
    assert len(same) > 12 and {key: written[key] for key in same} == {key: published[key] for key in same}
    scaling = published.get("rope_scaling") or {}
    assert {key: written.get("rope_scaling", {})[key] for key in scaling} == scaling


def test_every_class_has_a_published_file():
    assert {values["architectures"][0] for values in PUBLISHED.values()} == set(SUPPORTED)


# ---------------------------------------------------------------- RoPE


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALINGS = {
    "linear": ({"factor": 2.0}, RopeScaling("linear", 2.0)),
    "llama3": (LLAMA3, RopeScaling("llama3", 8.0, 8192, slow=1.0, fast=4.0)),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 99, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        RopeScaling("yarn", 4.0, 99, slow=2, fast=16, whole_pairs=False),
    ),
}
BASE = PUBLISHED["DeepSeek-R1-Distill-Qwen-1.5B"]


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaling_in_every_form_of_the_file(kind):
    fields, want = SCALINGS[kind]
    for config in (
        from_hf_config(BASE | {"rope_theta": 7.0, "rope_scaling": fields | {"type": kind}}),
        from_hf_config(BASE | {"rope_theta": 7.0, "rope_scaling": fields | {"rope_type": kind}}),
        from_hf_config(BASE | {"rope_theta": None, "rope_parameters": fields | {"rope_type": kind, "rope_theta": 7.0}}),
    ):
        assert (config.rope_theta, config.rope_scaling) == (7.0, want)
    written = to_hf_config(config)
    assert written["rope_theta"] == 7.0 and written["rope_scaling"].items() >= fields.items()
    assert written["rope_scaling"]["type"] == written["rope_scaling"]["rope_type"] == kind
    assert from_hf_config(written) == dataclasses.replace(config, head_dim=128)  # is always written


def test_what_a_scaling_leaves_out():
    scaling = {"type": "yarn", "factor": 4.0, "attention_factor": None}
    read = from_hf_config(BASE | {"rope_scaling": scaling}).rope_scaling
    assert read == RopeScaling("yarn", 4.0, BASE["max_position_embeddings"], slow=1, fast=32)
    default = BASE | {"rope_theta": None, "rope_parameters": {"rope_type": "default"}}
    assert from_hf_config(default).rope_scaling == RopeScaling() and from_hf_config(default).rope_theta == 10_000
    assert "rope_scaling" not in to_hf_config(from_hf_config(default))


@pytest.mark.parametrize(
    "scaling,message",
    [
        ({"type": "dynamic", "factor": 2.0}, "rope_scaling.rope_type = 'dynamic'.* default, linear, yarn, llama3"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_scaling.rope_type = 'longrope'"),
        ({"type": "ntk", "factor": 2.0}, "rope_scaling.rope_type = 'ntk'"),
        ({"type": "mrope", "mrope_section": [1, 2]}, "rope_scaling.rope_type = 'mrope'"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "rope_scaling.mrope_section"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3}, "rope_scaling.beta_fast"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor"),
        ({"type": "yarn"}, "needs the field 'rope_scaling.factor'"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "needs the field 'rope_scaling.high_freq_factor'"),
        ({"type": "yarn", "factor": -1.0}, "RopeScaling.factor = -1.0"),
    ],
)
def test_scalings_that_are_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(BASE | {"rope_scaling": scaling})
    with pytest.raises(ValueError, match=message.replace("rope_scaling", "rope_parameters")):
        from_hf_config(BASE | {"rope_parameters": scaling})


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_the_original_window_beside_the_scaling_is_stronger(kind, field):
    """As in transformers, whose logits test_fuzz_configs.py compares."""
    scaling = SCALINGS[kind][0] | {"rope_type": kind}
    values = BASE | {field: scaling, "original_max_position_embeddings": 33}
    assert from_hf_config(values).rope_scaling.original == 33
    del scaling["original_max_position_embeddings"]
    assert from_hf_config(values).rope_scaling.original == 33
    window = from_hf_config(values | {"original_max_position_embeddings": None}).rope_scaling.original
    assert window == BASE["max_position_embeddings"]


@pytest.mark.parametrize("kind,field", [("linear", "rope_scaling"), ("default", "rope_parameters")])
def test_an_original_window_that_no_scaling_uses_is_ignored(kind, field):
    values = BASE | {field: {"rope_type": kind} | ({"factor": 2.0} if kind == "linear" else {})}
    assert from_hf_config(values | {"original_max_position_embeddings": 33}) == from_hf_config(values)


def test_angles_that_differ_by_layer_are_refused():
    each = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(ValueError, match="rope_parameters.full_attention"):
        from_hf_config(BASE | {"rope_parameters": each})


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name,field,value",
    [
        ("DeepSeek-V3", "scoring_func", "softmax"),
        ("DeepSeek-V3", "topk_method", "greedy"),
        ("DeepSeek-V3", "attention_bias", True),
        ("DeepSeek-V3", "moe_layer_freq", 2),
        ("DeepSeek-V3", "rope_interleave", False),
        ("DeepSeek-V2-Lite", "scoring_func", "sigmoid"),
        ("DeepSeek-V2-Lite", "topk_method", "noaux_tc"),
        ("DeepSeek-V2-Lite", "norm_topk_prob", True),
        ("DeepSeek-V2-Lite", "moe_layer_freq", 2),
        ("Qwen3-30B-A3B", "decoder_sparse_step", 2),
        ("Qwen3-30B-A3B", "mlp_only_layers", [0, 2]),
        ("Qwen3-30B-A3B", "mlp_only_layers", [1]),
        ("Qwen3-0.6B", "use_sliding_window", True),
        ("Qwen3-0.6B", "layer_types", ["full_attention", "sliding_attention"]),
        ("Llama-3.1-8B", "mlp_bias", True),
        ("Llama-3.1-8B", "hidden_act", "gelu"),
        ("Llama-3.1-8B", "partial_rotary_factor", 0.5),
        ("granite-3.1-8b", "mlp_bias", True),
        ("granite-3.1-8b", "is_causal", False),
        ("DeepSeek-V3", "is_causal", None),  # which transformers takes for False
        ("DeepSeek-V3", "rope_interleave", None),
        ("DeepSeek-V3", "head_dim", 128),  # transformers' RoPE would have this size
        ("Qwen3-30B-A3B", "attention_chunk_size", 4),
        ("Llama-3.1-8B", "sliding_window", 4),
        ("Llama-3.1-8B", "per_layer_config", {"0": {"rms_norm_eps": 0.1}}),
        ("Llama-3.1-8B", "transformers_weights", "other.safetensors"),
        ("Llama-3.1-8B", "configuration_files", ["config.4.0.0.json"]),
        ("Llama-3.1-8B", "attribute_map", {"rms_norm_eps": "initializer_range"}),
        ("Llama-3.1-8B", "model_type", "qwen2"),  # by which transformers chooses the class
    ],
)
def test_what_would_change_the_result_is_refused(name, field, value):
    with pytest.raises(ValueError, match=rf"{field} = .* is not supported, only"):
        from_hf_config(PUBLISHED[name] | {field: value})


@pytest.mark.parametrize(
    "name,field,value,kind",
    [
        ("DeepSeek-V3", "hidden_size", "7168", "int"),
        ("DeepSeek-V3", "vocab_size", 10**400, "int"),
        ("DeepSeek-V3", "num_hidden_layers", True, "int"),
        ("DeepSeek-V3", "q_lora_rank", [1536], "int | None"),
        ("DeepSeek-V3", "first_k_dense_replace", None, "int"),
        ("DeepSeek-V3", "n_group", {}, "int | None"),
        ("DeepSeek-V3", "routed_scaling_factor", math.nan, "float"),
        ("DeepSeek-V2-Lite", "rope_theta", math.inf, "float | None"),
        ("Qwen3-0.6B", "rms_norm_eps", math.inf, "float"),
        ("Qwen3-0.6B", "layer_types", "full_attention", "list | None"),
        ("Qwen3-0.6B", "rope_scaling", [], "dict | None"),
        ("Qwen3-30B-A3B", "mlp_only_layers", 3, "list | None"),
        ("Qwen3-30B-A3B", "norm_topk_prob", "yes", "bool | None"),
        ("Llama-3.1-8B", "tie_word_embeddings", 1, "bool | None"),
        ("Llama-3.1-8B", "eos_token_id", "</s>", "int | list | None"),
        ("Llama-3.1-8B", "original_max_position_embeddings", 8192.0, "int | None"),
        ("granite-3.1-8b", "logits_scaling", "16", "float"),
        ("DeepSeek-V3", "quantization_config", [128, 128], "dict | None"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_field(name, field, value, kind):
    with pytest.raises(ValueError, match=rf"^{field} = .*: must be {re.escape(kind)}, and finite$"):
        from_hf_config(PUBLISHED[name] | {field: value})


@pytest.mark.parametrize(
    "name,fields,message",
    [
        ("granite-3.1-8b", {"logits_scaling": 0}, "logit_scale = 0.0"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": ["x", None]}, "mlp_only_layers = "),
        ("Llama-3.1-8B", {"eos_token_id": [[1]]}, "eos = "),
        ("Llama-3.1-8B", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type = "),
        ("Llama-3.1-8B", {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": None}}, "whole_pairs = None"),
        ("Llama-3.1-8B", {"rope_theta": 0}, "rope_theta = 0"),
        ("DeepSeek-V3", {"n_group": None}, "groups = None"),
        ("DeepSeek-V2-Lite", {"topk_method": 0}, "topk_method = 0"),
        ("DeepSeek-V3", {"n_shared_experts": 0}, "no Hugging Face class for shared_experts = 0"),  # cannot be saved
    ],
)
def test_values_that_no_model_has(name, fields, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(PUBLISHED[name] | fields)


def test_the_second_name_of_a_field_is_stronger():
    """As in transformers."""
    for name, alias in (("DeepSeek-V3", "num_local_experts"), ("DeepSeek-V2-Lite", "num_experts")):
        assert from_hf_config(PUBLISHED[name] | {alias: 32}).experts == 32
    assert from_hf_config(PUBLISHED["Qwen3-30B-A3B"] | {"num_local_experts": 32}).experts == 32


@pytest.mark.parametrize("field", ["hidden_size", "num_experts_per_tok", "kv_lora_rank", "first_k_dense_replace"])
def test_missing_fields_are_named(field):
    values = {key: value for key, value in PUBLISHED["DeepSeek-V2-Lite"].items() if key != field}
    with pytest.raises(ValueError, match=f"the config of a DeepseekV2ForCausalLM needs the field '{field}'"):
        from_hf_config(values)


SOFTMAX = {"score": "softmax", "norm_topk": False}
MIX = {"attention": "gqa", "score": "softmax", "shared_experts": 0, "qk_norm": True}


@pytest.mark.parametrize(
    "config,field",
    [
        (ModelConfig(**MIX | {"qk_norm": False}), "qk_norm"),
        (ModelConfig(**MIX | {"shared_experts": 1}), "shared_experts"),
        (ModelConfig(**MIX | {"score": "sigmoid"}), "score"),
        (ModelConfig(**MIX, route_scale=2.0), "route_scale"),
        (ModelConfig(**MIX, groups=2, groups_kept=1), "groups"),
        (ModelConfig(**MIX, qkv_bias=True), "o_bias"),
        (ModelConfig(**MIX, logit_scale=0.5), "logit_scale"),
        (ModelConfig(**MIX, mtp_depth=1), "mtp_depth"),
        (ModelConfig(**SOFTMAX, shared_experts=0), "shared_experts"),
        (ModelConfig(**SOFTMAX, mtp_depth=1), "mtp_depth"),
        (ModelConfig(**SOFTMAX, heads=3), "heads"),
        (ModelConfig(**SOFTMAX | {"norm_topk": True}), "norm_topk"),
        (ModelConfig(attention_scale=0.1), "attention_scale"),
        (ModelConfig(embedding_scale=2.0), "embedding_scale"),
        (ModelConfig(residual_scale=2.0), "residual_scale"),
        (ModelConfig(dense_layers=4, mtp_depth=1), "dense_layers"),
        (dense(qk_norm=True, qkv_bias=True), "o_bias"),
        (dense(qk_norm=True, qkv_bias=False, embedding_scale=2.0), "embedding_scale"),
        (dense(qkv_bias=True, residual_scale=0.5), "o_bias"),
        (dense(qkv_bias=False, o_bias=True), "o_bias"),
        (dense(qkv_bias=False, heads=3, head_dim=8, kv_heads=1), "heads"),
        (dense(mtp_depth=1), "mtp_depth"),
        (dense(softcap=5.0, logit_scale=0.5, qkv_bias=False), "softcap"),
        (ModelConfig(softcap=30.0), "softcap"),
        (ModelConfig(logit_scale=0.5), "logit_scale"),
        (ModelConfig(shared_experts=0), "shared_experts"),
        (ModelConfig(groups=8, groups_kept=4), "groups"),  # of one expert each
        (ModelConfig(attention="gqa"), "score"),
        (dense(rope_scaling=RopeScaling("ntk", 2.0)), "rope_scaling.kind"),
        (ModelConfig(rope_scaling=RopeScaling("ntk", 2.0)), "rope_scaling.kind"),
    ],
)
def test_what_no_class_computes_is_refused(config, field):
    with pytest.raises(ValueError, match=f"no Hugging Face class for {field} = "):
        to_hf_config(config)


@pytest.mark.parametrize("first", [0, 2, 4])
def test_dense_layers_of_qwen3_moe_are_the_first(first):
    config = ModelConfig(**MIX, dense_layers=first)
    assert to_hf_config(config)["mlp_only_layers"] == list(range(first))
    assert from_hf_config(to_hf_config(config)).dense_layers == first


def test_groups_of_v2_count_only_where_they_limit():
    values = to_hf_config(ModelConfig(**SOFTMAX, groups=4, groups_kept=2))
    assert (values["topk_method"], values["n_group"], values["topk_group"]) == ("group_limited_greedy", 4, 2)
    limited, free = from_hf_config(values), from_hf_config(values | {"topk_method": "greedy"})
    assert (limited.groups, limited.groups_kept, free.groups, free.groups_kept) == (4, 2, 1, 1)


def test_softmax_scores_matter_only_where_there_are_experts():
    assert architecture(ModelConfig(score="softmax", shared_experts=0, experts=0)) == "DeepseekV3ForCausalLM"


def test_mtp_depth_round_trip():
    config = dataclasses.replace(ModelConfig(), mtp_depth=2)
    assert to_hf_config(config)["num_nextn_predict_layers"] == 2 and from_hf_config(to_hf_config(config)) == config
    assert to_hf_config(ModelConfig())["num_nextn_predict_layers"] == 0  # transformers' default is 1


def test_a_special_token_of_minus_one_is_none():
    values = to_hf_config(dense(vocab=64, pad=3)) | {"pad_token_id": -1}  # as the first Llama checkpoints write it
    assert from_hf_config(values).pad is None
    with pytest.raises(ValueError, match="ModelConfig.pad = -2"):
        from_hf_config(values | {"pad_token_id": -2})


def test_the_config_of_a_run_is_told_from_one_of_an_unknown_model():
    said = "^config.json names no architecture: it is no model's .a run's model is in its checkpoint/.; supported are "
    for values in ({"steps": 3, "seed": 0}, {"architectures": []}, {"architectures": 5}):
        with pytest.raises(ValueError, match=said):
            from_hf_config(values)
    with pytest.raises(ValueError, match="^architecture 'Nosuch' is not supported"):
        from_hf_config({"architectures": ["Nosuch"]})

"""The odd and wrong values that experiments/tools/fuzz_configs.py puts into config.json and adapter_config.json."""

from __future__ import annotations

import itertools
import json
import math

from minir1.model.hf_config import ONLY, ONLY_IN, TYPES
from minir1.model.lora import PEFT_ONLY

ABSENT = object()
DEEP = json.loads("[" * 150 + "]" * 150)
VALUES = [
    ABSENT, None, True, False, -1, 0, 1, 2, 1.5, -0.5, "", "x", [], {}, [0], [[]], {"x": 1}, math.nan, math.inf, 1e-300,
    1e300, 10**18, 10**400, DEEP,
]  # fmt: skip
DOZEN = [ABSENT, None, True, False, -1, 1, 1.5, "x", [], {"x": 1}, math.nan, 10**400]  # for fields that we do not read
FEW = [None, True, False, 4, "x", [], {"x": 1}]  # for names that are no field of a configuration class
CHOICES = {  # field -> values that mean something there
    "hidden_act": ["gelu", "relu", "swish", "silu"],
    "topk_method": ["greedy", "group_limited_greedy", "noaux_tc"],
    "scoring_func": ["sigmoid", "softmax"],
    "layer_types": [["full_attention"] * 2, ["full_attention"] * 3, ["sliding_attention"] * 2, ["attention"] * 2],
    "architectures": [["LlamaForCausalLM"], ["Qwen2ForCausalLM"], ["Qwen2ForCausalLM", "LlamaForCausalLM"], [None]],
    "model_type": ["llama", "qwen2", "qwen3", "deepseek_v3", "granite"],
    "mlp_only_layers": [[1], [0, 1], [1, 0], [0, 0], [5], [0.0], [True]],
    "per_layer_config": [{"0": {"num_key_value_heads": 1}}, {"1": {"rms_norm_eps": 0.1}}, {"0": {"head_dim": 8}}],
    "attn_implementation": ["eager", "flash_attention_2"],
    "_attn_implementation": ["eager"],
    "experts_implementation": ["eager", "grouped_mm"],
    "quantization_config": [
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8]}, {"quant_method": "bitsandbytes"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [8]}, {"quant_method": "fp8", "weight_block_size": [0, True]},
    ],
    "torch_dtype": ["float16", "bfloat16", "float64"],
    "eos_token_id": [[1, 2], [70], [None], [True]],
    "attribute_map": [{"num_hidden_layers": "num_key_value_heads"}, {"rms_norm_eps": "initializer_range"}],
    "text_config": [{"sliding_window": 4}],
    "rope_type": ["default", "linear", "yarn", "llama3", "dynamic", "longrope", "proportional", "axial", "ntk"],
    "type": ["default", "linear", "yarn", "llama3", "dynamic", "longrope", "ntk", "mrope"],
    "rope_theta": [10_000, 500.0, 2, 1e6],
    "original_max_position_embeddings": [16, 32, 16.0, 4],
    "sliding_window": [4, 64], "attention_chunk_size": [4], "pad_token_id": [63, 64],
    "kv_sharing_modes": [["reuse", "reuse"]],
    "transformers_weights": ["model.safetensors", "other.safetensors"],
    "configuration_files": [["config.4.0.0.json"]],
    # of adapters
    "peft_type": ["LORA", "IA3", "ADALORA", "LOHA"],
    "task_type": ["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"],
    "target_modules": [
        ["q_proj"], ["k_proj", "q_proj"], "q_proj", ".*_proj", "all-linear", ["self_attn.q_proj"], ["lm_head"],
        ["model.layers.0.q_proj"], ["q_proj", "x.y"], ["up_proj", "gate_proj"], ["embed_tokens"], [".q_proj"],
        ["layers.0.self_attn.q_proj"],
    ],
    "target_parameters": [
        ["mlp.experts.gate_up_proj"], ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], ["experts.gate_up_proj"],
        ["gate_up_proj", "down_proj"], ["foo"], ["x.gate_up_proj", "x.down_proj"], "mlp.experts.gate_up_proj",
        ["self_attn.q_proj.weight"], ["p.experts.gate_up_proj", "p.experts.down_proj"],
    ],
    "exclude_modules": [["q_proj"], "q_proj", ["model.layers.0.self_attn.q_proj"], [".*"], ["foo"]],
    "modules_to_save": [["lm_head"], ["norm"], ["foo"]],
    "init_lora_weights": [
        "gaussian", "orthogonal", "eva", "pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga",
    ],
    "layers_to_transform": [[0, 1], [1]],
    "layers_pattern": ["layers", ["layers"]],
    "rank_pattern": [{"q_proj": 2}, {"foo": 2}], "alpha_pattern": [{"q_proj": 16}, {"foo": 2}],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [0]}],
    "alora_invocation_tokens": [[1, 2], [70]],
    "bias": ["none", "all", "lora_only"],
    "layer_replication": [[[0, 2]], [[0, 1], [0, 2]]],
    "lora_alpha": [4, 6.0, 12], "r": [3.0, 4],
    "megatron_config": [{"tensor_model_parallel_size": 1}],
    "use_bdlora": [{"nblocks": 2, "target_modules_bd_a": ["q_proj"], "match_strict": False}],
    "kasa_config": [{}], "velora_config": [{"num_groups": 1}], "arrow_config": [{"top_k": 1}],
    "monteclora_config": [{"num_samples": 2}], "loftq_config": [{"loftq_bits": 4}], "eva_config": [{"rho": 1.0}],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
}  # fmt: skip
READ = {*TYPES, *ONLY, *itertools.chain(*ONLY_IN.values()), "architectures", "model_type"}
READ |= {"r", "lora_alpha", "target_modules", "target_parameters", "base_model_name_or_path", *PEFT_ONLY}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor")
CHOICES_OF_CONFIGS = ("text_config", "attribute_map", "configuration_files", "sliding_window", "layer_types")
ROPE_KEYS = (
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "truncate", "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
    "short_factor", "long_factor", "mrope_section", "full_attention",
)  # fmt: skip
SHARED = ("DeepseekV3", "Llama")  # whose cases have the names that are read by files of no class
READ_BY = (
    "configuration_utils", "modeling_rope_utils", "modeling_utils", "modeling_layers", "masking_utils", "cache_utils",
    "integrations/sdpa_attention", "integrations/moe", "utils/generic", "utils/output_capturing",
)  # fmt: skip


def values_of(old: dict, path: tuple[str, ...], others: set[str]) -> list:
    """What a field is changed to: VALUES, or fewer, CHOICES, and what lies near the value that it has.

    old: the content of the file; path: of the field; others: the names that are no fields, but read somewhere.
    """
    for key in path:
        old = old.get(key) if isinstance(old, dict) else None
    if path[0] in others:
        return [*FEW, *CHOICES.get(path[0], ())]
    if path[0] not in READ:
        return [*DOZEN, *CHOICES.get(path[0], ())]
    near = [[old], str(old)]
    if isinstance(old, bool):
        near += [not old]
    elif isinstance(old, (int, float)):
        near += [old + 1, old * 2, old / 2, -old, float(old)]
    elif isinstance(old, list):
        near += [old[::-1], old + old, old[:1]]
    elif isinstance(old, dict):
        near += [[old], {"full_attention": old}]
    return [*VALUES, *CHOICES.get(path[-1], ()), *near]

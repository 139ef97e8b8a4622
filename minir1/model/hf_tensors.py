"""Names of our tensors in Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from minir1.model.config import ModelConfig
from minir1.model.transformer import Transformer

NAMES = {  # ours -> theirs, inside a layer
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.q_head_norm": "self_attn.q_norm",
    "attention.k_head_norm": "self_attn.k_norm",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.router": "mlp.gate",
    "ffn.shared.gate": "mlp.shared_experts.gate_proj",
    "ffn.shared.up": "mlp.shared_experts.up_proj",
    "ffn.shared.down": "mlp.shared_experts.down_proj",
}
EMBEDDING = "model.embed_tokens.weight"
TOP = {"embedding.weight": EMBEDDING, "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
MTP = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}  # of module k, layer L + k
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
REPEATED = ("embed_tokens.weight", "shared_head.head.weight")  # copies of the model's own, in each MTP module


def uncompiled(name: str) -> str:
    """The name of a tensor or module without what torch.compile, of the model or of a part, puts into it."""
    return name.replace("_orig_mod.", "")


def their_module(ours: str) -> str:
    """`blocks.0.attention.wq` -> `model.layers.0.self_attn.q_proj`, for the modules in NAMES."""
    _, layer, inner = ours.split(".", 2)
    return f"model.layers.{layer}.{NAMES[inner]}"


def to_hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Their names -> tensors that share the model's memory; experts one by one, as in published checkpoints.

    Their classes with softmax scores have no selection bias; ValueError where a model has one that is not zero.
    """
    tensors = {}
    for ours, tensor in _named(model):
        ours, tensor = uncompiled(ours), tensor.detach()
        if ours in TOP:
            if not (ours == "head.weight" and model.config.tied):
                tensors[TOP[ours]] = tensor
            continue
        part, index, inner = ours.split(".", 2)  # "mtp", "0", "block.ffn.up.weight"
        prefix = f"model.layers.{int(index) + (model.config.layers if part == 'mtp' else 0)}."
        inner = inner.removeprefix("block.")
        if inner == "ffn.bias":
            if model.config.score == "sigmoid":
                tensors[prefix + "mlp.gate.e_score_correction_bias"] = tensor
            elif not tensor.is_meta and tensor.any():
                raise ValueError(f"{ours} is not zero, and no Hugging Face class with softmax scores has such a bias")
        elif inner == "ffn.experts.gate_up":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                tensors[f"{prefix}mlp.experts.{e}.gate_proj.weight"] = gate
                tensors[f"{prefix}mlp.experts.{e}.up_proj.weight"] = up
        elif inner == "ffn.experts.down":
            for e, down in enumerate(tensor):
                tensors[f"{prefix}mlp.experts.{e}.down_proj.weight"] = down
        else:
            module, kind = inner.rsplit(".", 1)
            tensors[f"{prefix}{(NAMES | MTP)[module]}.{kind}"] = tensor
    return tensors


def _named(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """As `state_dict`, which would divide the weights of a model in shards again."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name not in module._non_persistent_buffers_set:  # such as PackedLinear's
                yield f"{prefix}.{name}".lstrip("."), tensor


def copy_of(name: str, config: ModelConfig) -> str | None:
    """The tensor that a redundant one of a checkpoint, which is none of `to_hf_tensors`, has to be equal to, if any.

    Redundant are the embedding and head that published MTP modules repeat, and a tied head beside its embedding.
    """
    if name == TOP["head.weight"] and config.tied:
        return EMBEDDING
    match = LAYER.fullmatch(name)
    if match is None or int(match[1]) < config.layers or match[2] not in REPEATED:
        return None
    return EMBEDDING if config.tied or match[2] == "embed_tokens.weight" else TOP["head.weight"]


def with_mtp_of(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The configuration with only those MTP modules of which a checkpoint with tensors `names` has any tensor.

    transformers writes `num_nextn_predict_layers` 1 but saves no module. An incomplete module stays in the
    configuration, so that the missing tensors are reported.
    """
    stored = {int(match[1]) for match in map(LAYER.fullmatch, names) if match and match[2] not in REPEATED}
    depth = 0
    while depth < config.mtp_depth and config.layers + depth in stored:
        depth += 1
    return dataclasses.replace(config, mtp_depth=depth)

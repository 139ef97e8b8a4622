"""Where each tensor of ours stands in a Hugging Face checkpoint."""

from __future__ import annotations

from torch import Tensor

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
TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def to_hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Their names -> tensors that share the model's memory; experts one by one, as published checkpoints hold them."""
    tensors = {}
    for ours, tensor in model.state_dict().items():
        if ours in TOP:
            if not (ours == "head.weight" and model.config.tied):
                tensors[TOP[ours]] = tensor
            continue
        _, layer, inner = ours.split(".", 2)
        prefix = f"model.layers.{layer}."
        if inner == "ffn.bias":
            tensors[prefix + "mlp.gate.e_score_correction_bias"] = tensor
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
            tensors[f"{prefix}{NAMES[module]}.{kind}"] = tensor
    return tensors

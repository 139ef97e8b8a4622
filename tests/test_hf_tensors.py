"""hf_tensors.py: every tensor has one name there; redundant tensors; the MTP modules of a checkpoint."""
import dataclasses

import pytest
import torch

from minir1.model.config import ModelConfig, dense
from minir1.model.hf_tensors import EMBEDDING, copy_of, to_hf_tensors, with_mtp_of
from minir1.model.transformer import Transformer

CONFIG = ModelConfig(vocab=16, dim=16, layers=2, heads=2, ffn=8, expert_ffn=8, experts=4, mtp_depth=2)
SOFTMAX = dataclasses.replace(CONFIG, score="softmax", norm_topk=False, mtp_depth=0)


@pytest.mark.parametrize("config", [CONFIG, dense(vocab=16, dim=16, heads=2, qk_norm=True, o_bias=True)])
def test_every_number_has_one_name_and_is_shared(config):
    model = Transformer(config)
    theirs = to_hf_tensors(model)
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(t.numel() for t in model.state_dict().values())
    for tensor in theirs.values():
        tensor.fill_(7.0)
    assert all((tensor == 7).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("config", [CONFIG, dense(vocab=16, dim=16, heads=2, tied=True)])
def test_a_compiled_model_has_the_same_names(config):
    model = Transformer(config)
    plain = to_hf_tensors(model)
    assert to_hf_tensors(torch.compile(model, backend="eager")).keys() == plain.keys()
    model.blocks[1].ffn = torch.compile(model.blocks[1].ffn, backend="eager")
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    for module in model.mtp:
        module.block = torch.compile(module.block, backend="eager")
    compiled = to_hf_tensors(torch.compile(model, backend="eager"))
    assert list(compiled) == list(plain) and all(plain[name].data_ptr() == t.data_ptr() for name, t in compiled.items())


def test_names_of_an_mtp_module():
    """As DeepSeek-V3 names its layer 61."""
    prefix = "model.layers.3."
    names = {name.removeprefix(prefix) for name in to_hf_tensors(Transformer(CONFIG)) if name.startswith(prefix)}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < names
    assert {"input_layernorm.weight", "self_attn.kv_b_proj.weight", "mlp.experts.3.up_proj.weight"} < names
    assert "mlp.gate.e_score_correction_bias" in names and not any("mtp" in name or "block" in name for name in names)


def test_softmax_scores_have_no_selection_bias_in_their_files():
    model = Transformer(SOFTMAX)
    assert not any("bias" in name for name in to_hf_tensors(model))
    model.blocks[1].ffn.bias[2] = 0.1
    with pytest.raises(ValueError, match="blocks.1.ffn.bias is not zero"):
        to_hf_tensors(model)
    with torch.device("meta"):
        assert to_hf_tensors(Transformer(SOFTMAX))  # values are unknown


@pytest.mark.parametrize(
    "name,original",
    [
        ("model.layers.2.embed_tokens.weight", EMBEDDING),
        ("model.layers.3.shared_head.head.weight", "lm_head.weight"),
        ("model.layers.1.embed_tokens.weight", None),  # no MTP module
        ("model.layers.2.shared_head.norm.weight", None),
        ("model.layers.0.self_attn.q_proj.bias", None),
        ("model.layers.2.mlp.up_proj.weight", None),
        ("lm_head.weight", None),
        ("extra", None),
    ],
)
def test_redundant_tensors(name, original):
    assert copy_of(name, CONFIG) == original
    assert copy_of(name, dataclasses.replace(CONFIG, mtp_depth=0)) == original


def test_a_tied_head_repeats_the_embedding():
    tied = dataclasses.replace(CONFIG, tied=True)
    assert copy_of("lm_head.weight", tied) == copy_of("model.layers.2.shared_head.head.weight", tied) == EMBEDDING


def test_mtp_modules_of_a_checkpoint():
    names = set(to_hf_tensors(Transformer(CONFIG)))
    module = {k: {name for name in names if name.startswith(f"model.layers.{k}.")} for k in (2, 3)}
    main = names - module[2] - module[3]
    assert with_mtp_of(CONFIG, names) == CONFIG
    assert with_mtp_of(CONFIG, main) == dataclasses.replace(CONFIG, mtp_depth=0)
    assert with_mtp_of(CONFIG, main | module[2]).mtp_depth == 1
    assert with_mtp_of(CONFIG, main | module[3]).mtp_depth == 0  # which is surplus then
    assert with_mtp_of(CONFIG, main | {"model.layers.2.hnorm.weight"}).mtp_depth == 1  # the rest is missing then
    assert with_mtp_of(CONFIG, main | {"model.layers.2.embed_tokens.weight"}).mtp_depth == 0
    assert with_mtp_of(dataclasses.replace(CONFIG, mtp_depth=0), names).mtp_depth == 0

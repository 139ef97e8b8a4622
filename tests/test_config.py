"""config.py: what does not fit together is refused by name."""
import dataclasses
import math

import pytest

from minir1.model.config import ModelConfig, dense
from minir1.model.typed import is_a, shown

MOE = {"experts": 8, "experts_per_token": 2}
WRONG = [
    ("vocab", 0, {}),
    ("dim", None, {}),
    ("layers", 2.0, {}),
    ("heads", True, {}),
    ("rope_theta", "1e4", {}),
    ("tied", 1, {}),
    ("eos", "</s>", {}),
    ("rope_scaling", None, {}),
    ("dim", -1, {}),
    ("layers", 0, {}),
    ("heads", 0, {}),
    ("kv_lora", 0, {}),
    ("q_lora", 0, {}),
    ("rope", 15, {}),
    ("rope", 0, {}),
    ("attention", "mha", {}),
    ("score", "relu", {}),
    ("kv_heads", 3, {"attention": "gqa"}),  # 4 heads
    ("heads", 3, {"attention": "gqa", "kv_heads": 3}),  # 128 / 3
    ("head_dim", 7, {"attention": "gqa"}),
    ("head_dim", 0, {"attention": "gqa"}),
    ("dense_layers", 5, {"layers": 4}),
    ("experts", -1, {}),
    ("groups", 3, MOE),
    ("groups", 0, MOE),
    ("groups_kept", 3, MOE | {"groups": 2}),
    ("experts_per_token", 9, {"experts": 8}),
    ("experts_per_token", 5, {"experts": 8, "groups": 2}),  # one group of four is used
    ("experts_per_token", 0, {"experts": 8}),
    ("shared_experts", -1, MOE),
    ("softcap", 0.0, {}),
    ("logit_scale", 0.0, {}),
    ("rope_theta", 0.0, {}),
    ("eos", 192, {"vocab": 192}),
    ("pad", -1, {}),
    ("qkv_bias", True, {"attention": "mla"}),
    ("o_bias", True, {"attention": "mla"}),
    ("qk_norm", True, {"attention": "mla"}),
    ("attention_scale", 0.0, {}),
    ("embedding_scale", 0.0, {}),
    ("residual_scale", -1.0, {}),
    ("mtp_depth", -1, {}),
    ("head_dim", 16, {"attention": "mla"}),
    ("q_lora", 8, {"attention": "gqa"}),
    ("route_scale", 0.0, {}),
    ("init_std", -0.1, {}),
    ("norm_eps", math.inf, {}),
    ("norm_eps", math.nan, {}),
    ("rope_theta", math.nan, {}),
    ("rope_theta", 1.0, {}),  # YaRN divides by its logarithm
    ("embedding_scale", 1e300, {}),
    ("attention_scale", math.inf, {}),
    ("vocab", 2**63, {}),
    ("rope_theta", 10**30, {}),  # no tensor takes an integer of more than 64 bits
]


@pytest.mark.parametrize("field,value,others", WRONG)
def test_a_wrong_value_is_named(field, value, others):
    with pytest.raises(ValueError) as error:
        ModelConfig(**{**others, field: value})
    assert f"ModelConfig.{field} = {shown(value)}" in str(error.value)


def test_types():
    assert is_a(1, "int") and is_a(1, "float") and is_a(1.0, "float") and is_a(True, "bool")
    assert is_a(None, "int | None") and not is_a(None, "int")
    assert is_a(2**63 - 1, "int") and is_a(-(2**62), "float") and is_a([], "list | None") and is_a("x", "str")
    assert not any(is_a(value, "int | None") for value in (True, 1.0, 2**63, 10**400, "1", [1], {}))
    assert not any(is_a(value, "float") for value in (None, False, math.nan, -math.inf, 10**400, "1.0"))
    assert not is_a(1, "bool") and not is_a(0, "str")


def test_bounds_are_allowed():
    ModelConfig(vocab=8, eos=7, bos=0, dense_layers=4, layers=4)
    ModelConfig(experts=4, experts_per_token=4, shared_experts=0)
    ModelConfig(experts=8, groups=4, groups_kept=2, experts_per_token=4, q_lora=1)
    ModelConfig(experts=0, groups=3, experts_per_token=99)  # of no concern without experts
    ModelConfig(attention="mla", heads=3, kv_heads=2)  # nor are key heads to MLA


def test_head_size():
    assert ModelConfig(dim=96, heads=4).head_size == 24
    assert ModelConfig(dim=96, heads=4, head_dim=16, attention="gqa").head_size == 16
    assert dense(dim=100, heads=3, kv_heads=3, head_dim=8).head_size == 8  # 3 need not divide 100


def test_which_layers_have_experts():
    config = ModelConfig(layers=4, dense_layers=2)
    assert [config.is_moe(i) for i in range(4)] == [False, False, True, True]
    assert not any(dense(layers=4).is_moe(i) for i in range(4))
    assert config.moe_layers == 2 and dense(layers=4).moe_layers == 0


def test_dense_is_like_qwen2_and_takes_changes():
    config = dense(dim=64, qkv_bias=False)
    assert (config.attention, config.experts, config.dim, config.qkv_bias) == ("gqa", 0, 64, False)
    assert dense().qkv_bias


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().dim = 3

"""lora.py: new adapters change nothing, off they are the base, merged they are one matrix, and PEFT reads them."""
import json
import math

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minir1.losses import nll
from minir1.model.config import ModelConfig, dense
from minir1.model.hf import load, save
from minir1.model.lora import LoRALinear, adapters, adapters_off, add_adapters, load_adapters, merge, save_adapters
from minir1.model.moe import MoE
from minir1.model.transformer import Transformer
from minir1.sample import generate
from minir1.tasks.countdown_corpus import WORDS
from minir1.tokenizer import word_level

V = 64
SHAPE = {"vocab": V, "dim": 32, "layers": 3, "heads": 4, "ffn": 40, "init_std": 0.2}
MLA = SHAPE | {"kv_lora": 12, "nope": 8, "rope": 4, "v_dim": 8, "expert_ffn": 12}
CONFIGS = {
    "mla + moe": ModelConfig(**MLA),
    "mla + moe, q_lora, odd widths": ModelConfig(**MLA | {"expert_ffn": 9}, q_lora=10),
    "mla, dense": ModelConfig(**MLA, experts=0),
    "gqa": dense(**SHAPE),
}
OTHERS = {  # of the other classes, for the files
    "v2": ModelConfig(**MLA, score="softmax", norm_topk=False),
    "qwen3 moe": ModelConfig(
        **SHAPE, attention="gqa", head_dim=12, qk_norm=True, score="softmax", shared_experts=0, expert_ffn=12
    ),
    "granite, tied": dense(**SHAPE | {"qkv_bias": False}, tied=True, residual_scale=0.4, logit_scale=0.3),
}
TOKENIZER = word_level(WORDS, largest_number=24)
X = torch.randint(0, V, (3, 17), generator=torch.Generator().manual_seed(5))


def build(config, trained=True, **settings) -> Transformer:
    """A model with adapters that are no longer zero."""
    torch.manual_seed(0)
    model = Transformer(config)
    add_adapters(model, **{"rank": 4, "alpha": 6.0} | settings)
    if trained:
        for adapter in adapters(model).values():
            adapter.B.data.normal_(std=0.1)
    return model


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@torch.no_grad()
def test_new_adapters_change_no_bit(config):
    torch.manual_seed(0)
    plain = Transformer(config)
    assert torch.equal(build(config, trained=False)(X), plain(X))


@torch.no_grad()
def test_switched_off_the_model_is_its_base_to_the_bit(config):
    torch.manual_seed(0)
    plain, model = Transformer(config), build(config)
    assert (model(X) - plain(X)).abs().max() > 0.05
    with adapters_off(model):
        assert torch.equal(model(X), plain(X))
        want = generate(plain, X[:, :4].tolist(), max_tokens=6, temperature=0).tokens
        assert torch.equal(generate(model, X[:, :4].tolist(), max_tokens=6, temperature=0).tokens, want)
    assert (model(X) - plain(X)).abs().max() > 0.05


def test_nested_and_after_an_error_adapters_come_back_on_at_the_outer_end(config):
    model = build(config)
    with pytest.raises(KeyError), adapters_off(model):
        with adapters_off(model):
            pass
        assert not any(adapter.on for adapter in adapters(model).values())
        raise KeyError
    assert all(adapter.on for adapter in adapters(model).values())


@torch.no_grad()
def test_an_adapter_by_hand():
    """W x + bias + α/r · B(A x) with α = 6, r = 2: W x = (2, 1), A x = (3, -1), B(A x) = (-1, 6), three times that."""
    layer = LoRALinear(torch.nn.Linear(2, 2), rank=2, alpha=6.0)
    layer.base.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    layer.base.bias.copy_(torch.tensor([10.0, 20.0]))
    layer.A.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    layer.B.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [2 + 10 - 3, 1 + 20 + 18]
    assert layer.weight.tolist() == [[3, -2], [7, 6]]


@torch.no_grad()
def test_merged_is_the_same_function_and_a_plain_model(config):
    model = build(config)
    want = model(X)
    plain = Transformer(config)
    plain.load_state_dict(merge(model).state_dict())
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(plain(X), want, rtol=0, atol=2e-5)


@torch.no_grad()
def test_decoding_over_the_cache_uses_the_adapters(config):
    """MLA's absorbed form uses the weight matrix, not the layer's forward."""
    model = build(config)
    cache = model.cache(3, 17)
    model.hidden(X[:, :9], cache=cache)
    steps = [model.hidden(X[:, t : t + 1], cache=cache)[:, 0] for t in range(9, 17)]
    torch.testing.assert_close(torch.stack(steps, 1), model.hidden(X)[:, 9:], rtol=0, atol=2e-5)


@torch.no_grad()
def test_each_expert_has_an_adapter_of_its_own():
    model = build(CONFIGS["mla + moe"], targets=["experts"])
    experts = next(m for m in model.modules() if isinstance(m, MoE)).experts
    x, chosen = torch.randn(5, 32), torch.tensor([[0, 3], [7, 1], [3, 3], [2, 0], [5, 6]])
    gates = torch.rand(5, 2)
    up, down = experts.adapters["gate_up"], experts.adapters["down"]
    for n in range(5):
        want = 0
        for e, g in zip(chosen[n].tolist(), gates[n]):
            W = experts.gate_up[e] + 1.5 * up.B[e] @ up.A[e]  # α/r = 6/4
            V_ = experts.down[e] + 1.5 * down.B[e] @ down.A[e]
            gate, value = (W @ x[n]).chunk(2)
            want = want + g * (V_ @ (torch.nn.functional.silu(gate) * value))
        torch.testing.assert_close(experts(x, chosen, gates)[n], want, rtol=1e-4, atol=1e-5)


def test_only_adapters_train(config):
    model = build(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    nll(model.logprob(X)).mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        is_adapter = name.endswith((".A", ".B"))
        assert p.requires_grad == is_adapter and torch.equal(p, before[name]) == (not is_adapter), name


def test_ranks_and_targets():
    model = build(CONFIGS["mla + moe"], rank=2, targets=["wkv_b", "experts"])
    assert {name.rsplit(".", 1)[1] for name in adapters(model)} == {"wkv_b", "gate_up", "down"}
    assert len(adapters(model)) == 3 + 2 * 2  # three layers, the first of them dense
    assert all(2 in a.A.shape for a in adapters(model).values())
    count = sum(p.numel() for p in build(CONFIGS["gqa"], rank=3, targets=["wo"]).parameters() if p.requires_grad)
    assert count == 3 * 3 * (32 + 32)


@pytest.mark.parametrize("name,settings,message", [
    ("gqa", {"targets": ["q_proj"]}, "q_proj: allowed are wq, "),
    ("gqa", {"rank": 0}, "rank = 0"),
    ("gqa", {"alpha": 0}, "alpha = 0"),
    ("gqa", {"targets": ["experts", "wkv_a"]}, "the model has none of them"),
    # PEFT would read these names as those of routed experts, in DeepseekV3 even where a model has none.
    ("mla + moe", {"targets": ["wq", "gate"]}, "wq, gate: gate, up and down only with .* not with 'mla' and 8"),
    ("mla, dense", {"targets": ["down"]}, "down: gate, up and down only with .* not with 'mla' and 0"),
])
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(CONFIGS[name], **settings)


def test_default_targets_of_a_dense_model_of_a_class_with_experts():
    assert {name.rsplit(".", 1)[1] for name in adapters(build(CONFIGS["mla, dense"]))} == {"wq", "wo", "wkv_a", "wkv_b"}


def test_adapters_are_not_stacked_upon_adapters():
    with pytest.raises(ValueError, match="already"):
        add_adapters(build(CONFIGS["gqa"]), 2, 2)


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture(params=["mla + moe", "mla, dense", "gqa", *OTHERS])
def folders(request, tmp_path):
    """The model with adapters, the folder of its base, that of its adapters."""
    config = (CONFIGS | OTHERS)[request.param]
    torch.manual_seed(0)
    save(Transformer(config), TOKENIZER, tmp_path / "base")
    model = build(config)
    save_adapters(model, tmp_path / "adapters", tmp_path / "base")
    return model, tmp_path / "base", tmp_path / "adapters"


@torch.no_grad()
def test_peft_opens_the_folder_and_computes_the_same(folders):
    model, base, path = folders
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, path).eval()
    assert (theirs.get_base_model()(X).logits - Transformer(model.config)(X)).abs().max() > 0.05
    torch.testing.assert_close(theirs(X).logits, model(X), rtol=0, atol=2e-5)


@torch.no_grad()
def test_what_peft_writes_is_read(folders, tmp_path):
    model, base, path = folders
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.PeftModel.from_pretrained(theirs, path).save_pretrained(tmp_path / "again")
    torch.manual_seed(0)
    other = Transformer(model.config)
    load_adapters(other, tmp_path / "again")
    assert torch.equal(other(X), model(X))


@torch.no_grad()
def test_the_folder_of_adapters_opens_with_its_base(folders):
    model, _, path = folders
    again, tokenizer = load(path)
    assert torch.equal(again(X), model(X)) and tokenizer.size == TOKENIZER.size
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "some/where"}))
    with pytest.raises(ValueError, match="base_model_name_or_path = 'some/where' is no folder"):
        load(path)
    for wrong in (None, 5, [], "x" * 5000, "\0"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": wrong}))
        with pytest.raises(ValueError, match="base_model_name_or_path = .* is no folder with a config.json"):
            load(path)


def test_only_adapters_are_saved(folders):
    model, _, path = folders
    stored = load_file(path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sorted(p.name for p in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_does_not_fit_is_named_and_leaves_the_model_plain(folders):
    model, _, path = folders
    stored = load_file(path / "adapter_model.safetensors")
    first, second, *_ = sorted(stored)
    save_file({name: t for name, t in stored.items() if name != first} | {"x": torch.ones(2), second: torch.ones(1, 1)},
              path / "adapter_model.safetensors")
    other = Transformer(model.config)
    with pytest.raises(ValueError, match=f"missing: {first}; surplus: x; shape of {second}"):
        load_adapters(other, path)
    assert not adapters(other)


@pytest.mark.parametrize("change,message", [
    ({"use_dora": True}, "use_dora = True is not supported"),
    ({"use_rslora": True}, "use_rslora = True is not supported"),
    ({"use_rslora": 1}, "use_rslora = 1 is not supported"),
    ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens = \[1, 2\] is not supported"),
    ({"layers_to_transform": 0}, "layers_to_transform = 0 is not supported"),  # not empty: the first layer
    ({"layers_to_transform": False}, "layers_to_transform = False is not supported"),
    ({"exclude_modules": ["q_proj"]}, "exclude_modules = "),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
    ({"kasa_config": {}}, "kasa_config = {} is not supported"),  # which switches it on
    ({"lora_alpha": 1e300}, r"alpha = 1e\+300 \(above 0, to 1e6\)"),
    ({"lora_bias": True}, "lora_bias = True"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices = "),
    ({"layer_replication": [[0, 2]]}, "layer_replication = "),
    ({"use_qalora": True}, "use_qalora = True"),
    ({"of_a_later_peft": True}, "of_a_later_peft = True is not supported, only null, false"),
    ({"r": 4.0}, "r = 4.0: must be int"),
    ({"r": 10**9}, r"rank = 1000000000 \(1 to dim = "),
    ({"lora_alpha": math.nan}, "lora_alpha = nan: must be float"),
    ({"lora_alpha": 10**400}, "lora_alpha = 1000.*: must be float"),
    ({"target_modules": ["q_proj", 5]}, "target_modules = .*: must be a list of names"),
    ({"target_parameters": ["mlp.experts.foo"]}, "target_parameters = .* is not supported"),
    ({"bias": []}, r"bias = \[\] is not supported"),
    ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
    ({"target_modules": ["lm_head"]}, "target_modules lm_head"),
    ({"target_modules": ".*_proj"}, r"target_modules = '\.\*_proj': must be a list of names"),
    ({"alpha_pattern": {"q_proj": 64}}, "alpha_pattern = {'q_proj': 64} is not supported"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2} is not supported"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
    ({"r": None}, "r = None: must be int"),
])
@pytest.mark.parametrize("folders", ["gqa"], indirect=True)
def test_unsupported_adapters_are_refused(folders, change, message):
    model, _, path = folders
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_adapters(Transformer(model.config), path)


@pytest.mark.parametrize("folders", ["gqa"], indirect=True)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files_are_named(folders, name):
    model, _, path = folders
    (path / name).write_bytes((path / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_adapters(Transformer(model.config), path)


def test_a_model_with_adapters_is_not_saved_as_a_whole(tmp_path):
    with pytest.raises(ValueError, match="has adapters: lora.merge"):
        save(build(CONFIGS["gqa"]), TOKENIZER, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_files_and_missing_adapters_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        load_adapters(Transformer(CONFIGS["gqa"]), tmp_path)
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(Transformer(CONFIGS["gqa"]), tmp_path, "base")

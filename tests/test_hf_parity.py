"""Every supported class against transformers: logits, gradients and greedy tokens, there and back."""
import copy
import json

import pytest
import torch
import transformers
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from minir1.model.config import ModelConfig, dense
from minir1.model.hf import load, save
from minir1.model.hf_config import SUPPORTED, architecture
from minir1.model.hf_tensors import to_hf_tensors
from minir1.model.moe import MoE
from minir1.model.packing import packing
from minir1.model.rope import RopeScaling
from minir1.model.transformer import Transformer
from minir1.sample import generate
from minir1.tasks.countdown_corpus import WORDS
from minir1.tokenizer import word_level

transformers.utils.logging.disable_progress_bar()

V, T = 64, 48
YARN = RopeScaling("yarn", factor=4, original=16)  # 16 positions are stretched to 64
LITE = RopeScaling("yarn", factor=4, original=16, mscale=0.707, mscale_all=0.707, fast=4)
UNLIKE = RopeScaling("yarn", factor=4, original=16, mscale=0.9, mscale_all=0.4, slow=0.5, fast=2, whole_pairs=False)
LLAMA3 = RopeScaling("llama3", factor=4, original=16, slow=1, fast=4)
LINEAR = RopeScaling("linear", factor=4)

SHAPE = {"vocab": V, "dim": 32, "layers": 3, "heads": 4, "ffn": 40, "init_std": 0.17, "max_positions": 64}
MLA = SHAPE | {"kv_lora": 12, "nope": 8, "rope": 8, "v_dim": 6, "expert_ffn": 12}
GROUPS = {"experts": 12, "experts_per_token": 3, "groups": 4, "groups_kept": 2}
SOFTMAX = MLA | {"score": "softmax", "norm_topk": False}
LLAMA = SHAPE | {"qkv_bias": False}
BIASED = SHAPE | {"qkv_bias": True, "o_bias": True}
QWEN3 = LLAMA | {"qk_norm": True, "head_dim": 12}
GRANITE = {"attention_scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 1 / 3}
MIX = QWEN3 | {"experts": 8, "score": "softmax", "shared_experts": 0, "expert_ffn": 12}
CONFIGS = {
    "DeepseekV3": ModelConfig(**MLA, rope_scaling=LITE, route_scale=2.5),
    "DeepseekV3, groups": ModelConfig(**MLA, **GROUPS, rope_scaling=UNLIKE, q_lora=10, shared_experts=2),
    "DeepseekV3, linear": ModelConfig(**MLA, rope_scaling=LINEAR, tied=True, dense_layers=2, norm_eps=1e-3),
    "DeepseekV3, all moe": ModelConfig(**MLA, dense_layers=0, norm_topk=False, route_scale=1.5, rope_theta=500.0),
    "DeepseekV3, dense": ModelConfig(**MLA, experts=0),
    "DeepseekV2": ModelConfig(**SOFTMAX, rope_scaling=LITE, shared_experts=2),
    "DeepseekV2, groups": ModelConfig(**SOFTMAX, **GROUPS, rope_scaling=YARN, q_lora=10, route_scale=16.0),
    "DeepseekV2, plain": ModelConfig(**SOFTMAX, dense_layers=0, tied=True, norm_eps=1e-3),
    "Qwen2": dense(**SHAPE, rope_scaling=YARN),
    "Qwen2, mscale": dense(**SHAPE, rope_scaling=UNLIKE, kv_heads=1, tied=True),
    "Qwen2, wide heads": dense(**SHAPE, tied=True, head_dim=12, kv_heads=1, norm_eps=1e-3),
    "Qwen2, factor": dense(**SHAPE, rope_scaling=RopeScaling("yarn", factor=4, original=16, attention_factor=0.8)),
    "Qwen3": dense(**QWEN3, rope_scaling=YARN, tied=True),
    "Qwen3, biases": dense(**QWEN3 | {"qkv_bias": True}, o_bias=True, kv_heads=4),
    "Qwen3, plain": dense(**QWEN3 | {"head_dim": 16}, kv_heads=1, rope_theta=1e6),
    "Qwen3Moe": ModelConfig(**MIX, attention="gqa", rope_scaling=YARN, dense_layers=0),
    "Qwen3Moe, dense first": ModelConfig(**MIX, attention="gqa", norm_topk=False, dense_layers=2, tied=True),
    "Qwen3Moe, biases": ModelConfig(**MIX | {"qkv_bias": True}, o_bias=True, attention="gqa", experts_per_token=3),
    "Llama": dense(**LLAMA, rope_scaling=LLAMA3),
    "Llama, biases": dense(**BIASED, rope_scaling=LINEAR, kv_heads=4),
    "Llama, wide heads": dense(**LLAMA, rope_scaling=LLAMA3, head_dim=12, kv_heads=1, tied=True, rope_theta=500.0),
    "Granite": dense(**LLAMA, **GRANITE, rope_scaling=YARN),
    "Granite, biases": dense(**BIASED, embedding_scale=2.0, head_dim=12, tied=True),
    "Granite, logits": dense(**LLAMA, logit_scale=0.4, rope_theta=1e7),
}
ONE_EACH = [name for name in CONFIGS if "," not in name]
TOKENIZER = word_level(WORDS, largest_number=24)
LENGTHS = torch.tensor([T, 31, 5])
REAL = torch.arange(T) < LENGTHS.unsqueeze(1)
X = torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(5))


def build(config, seed=0):
    """A random model with random norm weights, biases, and V3's selection bias."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    for module in model.modules():
        if isinstance(module, MoE) and config.score == "sigmoid":
            module.bias.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name -> our model, the folder it was saved to, and transformers' model of that folder; each made once."""
    made = {}

    def get(name):
        if name not in made:
            model, folder = build(CONFIGS[name]), tmp_path_factory.mktemp("saved")
            save(model, TOKENIZER, folder)
            theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
            assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.parameters())
            made[name] = model, folder, theirs.eval()
        return made[name]

    return get


# ---------------------------------------------------------------- numbers


def test_the_list_covers_every_class():
    assert {architecture(config) for config in CONFIGS.values()} == set(SUPPORTED)
    assert [f"{name}ForCausalLM" for name in ONE_EACH] == [architecture(CONFIGS[name]) for name in ONE_EACH]


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_with_padding_and_beyond_the_window(pair, name):
    model, _, theirs = pair(name)
    assert type(theirs).__name__ == architecture(model.config) == name.split(",")[0] + "ForCausalLM"
    have = model(X, lengths=LENGTHS)
    want = theirs(X, attention_mask=REAL.long()).logits
    assert want[REAL].std() > 0.3  # not a flat model
    torch.testing.assert_close(have[REAL], want[REAL], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(pair, name):
    model, _, theirs = pair(name)
    (-model.logprob(X, lengths=LENGTHS).sum() / (LENGTHS - 1).sum()).backward()
    theirs(X, attention_mask=REAL.long(), labels=X.masked_fill(~REAL, -100)).loss.backward()
    shadow = copy.deepcopy(model)
    for p, q in zip(shadow.parameters(), model.parameters()):
        p.data = q.grad
    ours = to_hf_tensors(shadow)
    for key, p in theirs.named_parameters():
        have = stacked(ours, key) if ".mlp.experts." in key else ours[key]
        assert (have - p.grad).norm() <= 1e-5 * p.grad.norm(), key
    model.zero_grad()
    theirs.zero_grad()


def stacked(ours, key):
    """transformers' stacked experts from ours, one by one."""
    prefix, kind = key.rsplit(".", 1)
    experts = range(sum(name.startswith(prefix) and name.endswith("down_proj.weight") for name in ours))
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return torch.stack([torch.cat([ours[f"{prefix}.{e}.{part}.weight"] for part in parts]) for e in experts])


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_64_greedy_tokens(pair, name):
    model, _, theirs = pair(name)
    prompt = X[:1, :5]
    want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)
    have = generate(model, prompt.tolist(), max_tokens=64, temperature=0).tokens
    assert have[0].tolist() == want[0, 5:].tolist()
    assert name not in ONE_EACH or len(set(have[0].tolist())) > 3


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(pair, name, tmp_path):
    """What transformers writes of our model is our model: configuration, weights to the bit, logits."""
    model, _, theirs = pair(name)
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())  # the newer form of the file
    again, _ = load(tmp_path)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(again(X), model(X))


# ---------------------------------------------------------------- multi-token prediction


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_modules(depth, tmp_path):
    """States and logits of each module, from weights that transformers reads from our folder."""
    config = ModelConfig(**MLA, **GROUPS, rope_scaling=LITE, q_lora=10, mtp_depth=depth)
    model = build(config)
    save(model, TOKENIZER, tmp_path)
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.(3|4)\..*"]  # the class knows 61 layers only
    theirs = MtpModel.from_pretrained(main).eval()
    cache = MtpCache(config=main.config.get_mtp_config())
    have, want = model.hidden(X), main.model(X).last_hidden_state
    for k in range(depth):
        tokens = X[:, k + 1 :]
        want = theirs.forward_layer(
            k, want[:, :-1], torch.arange(k + 1, T).expand(len(X), -1), cache, input_ids=tokens
        )
        layout = packing(*tokens.shape, None, X.device)
        embedded, hidden = layout.pack(model.embed(tokens)), layout.pack(have[:, :-1])
        have = layout.pad(model.mtp[k](embedded, hidden, model.freqs_cis(layout.positions()), layout)[0])
        torch.testing.assert_close(have, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.logits(have), theirs._project_to_logits(want), rtol=0, atol=1e-5)

"""hf.py: our folders come back bit for bit, transformers opens them and we open its own; errors name the cause."""
import dataclasses
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minir1.model.config import ModelConfig, dense
from minir1.model.hf import load, save
from minir1.model.hf_config import SUPPORTED, from_hf_config, to_hf_config
from minir1.model.moe import MoE
from minir1.model.transformer import Transformer
from minir1.tasks.countdown_corpus import WORDS
from minir1.tokenizer import EOS, TAGS, Tokenizer, train_bpe, word_level

transformers.utils.logging.disable_progress_bar()

V = 64
SHAPE = {"vocab": V, "dim": 32, "layers": 3, "heads": 4, "ffn": 40, "init_std": 0.2}
MLA = SHAPE | {"kv_lora": 12, "nope": 8, "rope": 4, "v_dim": 6, "expert_ffn": 12}
CONFIGS = {
    "v3": ModelConfig(**MLA),
    "v3 q_lora, groups, scale": ModelConfig(
        **MLA, q_lora=10, experts=12, experts_per_token=3, groups=4, groups_kept=2, route_scale=2.5,
        shared_experts=2,
    ),
    "v3 all moe, gates not normed": ModelConfig(**MLA, dense_layers=0, norm_topk=False, route_scale=1.5),
    "v3 dense": ModelConfig(**MLA, experts=0),
    "v3 tied, other eps and theta": ModelConfig(**MLA, tied=True, norm_eps=1e-3, rope_theta=500.0),
    "qwen2": dense(**SHAPE),
    "qwen2 tied, wide heads": dense(**SHAPE, tied=True, head_dim=12, kv_heads=1, norm_eps=1e-3),
    "llama": dense(**SHAPE, qkv_bias=False, rope_theta=500.0),
}
TOKENIZER = word_level(WORDS, largest_number=24)
X = torch.randint(0, V, (3, 17), generator=torch.Generator().manual_seed(5))


def build(config, seed=0):
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    for module in model.modules():
        if isinstance(module, MoE):
            module.bias.normal_(std=0.1)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """(model, folder)"""
    model, folder = build(CONFIGS[request.param]), tmp_path_factory.mktemp("saved")
    save(model, TOKENIZER, folder)
    return model, folder


@pytest.fixture
def folder(tmp_path):
    save(build(CONFIGS["v3"]), TOKENIZER, tmp_path)
    return tmp_path


def test_special_tokens_reach_config_and_generation_config(tmp_path):
    save(build(dense(**SHAPE, eos=0, pad=1)), TOKENIZER, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 0, 1)
    theirs.save_pretrained(tmp_path / "theirs")
    TOKENIZER.save(tmp_path / "theirs")
    assert load(tmp_path)[0].config.eos == load(tmp_path / "theirs")[0].config.eos == 0


# ---------------------------------------------------------------- ours, read by us


def test_round_trip_gives_equal_bits(saved):
    model, folder = saved
    again, tokenizer = load(folder)
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (again.head.weight is again.embedding.weight) == model.config.tied
    assert torch.equal(again(X), model(X)) and tokenizer.size == TOKENIZER.size


def test_saving_what_was_loaded_writes_the_same_bytes(saved, tmp_path):
    save(*load(saved[1]), tmp_path)
    for path in saved[1].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["v3", "v3 q_lora, groups, scale", "v3 all moe, gates not normed"])
def test_config_round_trip(name):
    config = dataclasses.replace(CONFIGS[name], eos=3, pad=4, bos=5, max_positions=99)
    assert from_hf_config(to_hf_config(config)) == config


def test_dtypes(tmp_path):
    """The stored dtype, or the one asked for; the selection bias stays in fp32."""
    model = build(CONFIGS["v3"])
    bias = model.blocks[1].ffn.bias.clone()
    save(model.bfloat16(), TOKENIZER, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half, full = load(tmp_path)[0], load(tmp_path, dtype=torch.float32)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert torch.equal(half.blocks[1].ffn.bias, bias) and torch.equal(full.blocks[1].ffn.bias, bias)
    assert torch.equal(full.head.weight.bfloat16(), half.head.weight)


# ---------------------------------------------------------------- shards


def sharded(folder, shard_bytes=9_000, config="v3", **changes):
    model = build(dataclasses.replace(CONFIGS[config], **changes))
    save(model, TOKENIZER, folder, shard_bytes=shard_bytes)
    return model, json.loads((folder / "model.safetensors.index.json").read_text())


def test_shards_hold_everything_within_the_limit(tmp_path):
    model, index = sharded(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 3 and files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    shards = {file: load_file(tmp_path / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in shards[file]}
    for file, tensors in shards.items():
        assert sum(t.nbytes for t in tensors.values()) <= 9_000 or len(tensors) == 1, file
    assert index["metadata"] == {
        "total_size": sum(t.nbytes for tensors in shards.values() for t in tensors.values()),
        "total_parameters": sum(t.numel() for t in model.state_dict().values()),
    }
    again = load(tmp_path)[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_transformers_reads_our_shards_and_we_theirs(tmp_path):
    model, _ = sharded(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(other(X).logits, model(X), rtol=0, atol=1e-5)
    (tmp_path / "theirs").mkdir()
    other.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    TOKENIZER.save(tmp_path / "theirs")
    again = load(tmp_path / "theirs")[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tensor_larger_than_a_shard_and_a_limit_that_just_fits(tmp_path):
    _, index = sharded(tmp_path, shard_bytes=1)
    assert len(set(index["weight_map"].values())) == len(index["weight_map"])
    save(build(CONFIGS["v3"]), TOKENIZER, tmp_path, shard_bytes=index["metadata"]["total_size"])
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    with pytest.raises(ValueError, match="shard_bytes = 0"):
        save(build(CONFIGS["v3"]), TOKENIZER, tmp_path, shard_bytes=0)


def test_weights_of_an_earlier_save_go_and_other_files_stay(tmp_path):
    (tmp_path / "model-notes.txt").write_text("mine")
    (tmp_path / "chat_template.jinja").write_text("of an older tokenizer")
    sharded(tmp_path, shard_bytes=2_000)
    model, index = sharded(tmp_path, shard_bytes=20_000, config="qwen2")
    assert {path.name for path in tmp_path.glob("*.safetensors*")} == {
        "model.safetensors.index.json", *index["weight_map"].values()
    }
    save(model, TOKENIZER, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == ["model.safetensors"]
    again, tokenizer = load(tmp_path)
    assert torch.equal(again(X), model(X)) and tokenizer.template == TOKENIZER.template
    sharded(tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "model-notes.txt").exists()


def test_sharded_saving_is_deterministic(tmp_path):
    for name in ("a", "b"):
        sharded(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_absent_and_damaged_shards_are_named(tmp_path):
    _, index = sharded(tmp_path)
    second, third = sorted(set(index["weight_map"].values()))[1:3]
    whole = (tmp_path / second).read_bytes()
    (tmp_path / second).write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=f"{second} is damaged"):
        load(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(ValueError, match=f"names shards that are not there: {second}$"):
        load(tmp_path)
    (tmp_path / second).write_bytes((tmp_path / third).read_bytes())
    with pytest.raises(ValueError, match=f"is in two shards, {second} and {third}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text,match",
    [
        ("{", "index.json is damaged"),
        ("[]", "holds no object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"names '../model.safetensors'"),
        ('{"weight_map": {"a": "model.bin"}}', "names 'model.bin'"),
    ],
)
def test_damaged_indices(tmp_path, text, match):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


MEASURE = """
import sys, threading, time
import torch
from safetensors.torch import load_file
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.model.transformer import Transformer
from minir1.tokenizer import word_level

def anonymous():  # bytes; pages of a mapped file, which the system may drop, are not among them
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

def peak(work):
    before, highest, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.is_set():
            highest[0] = max(highest[0], anonymous())
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch)
    watcher.start()
    out = work()
    highest[0] = max(highest[0], anonymous())
    done.set()
    watcher.join()
    return out, highest[0] - before

def twice(path):  # uses twice the memory, to check that the measurement shows it
    tensors = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    return [{name: tensor.clone() for name, tensor in part.items()} for part in tensors for _ in range(2)]

from pathlib import Path
path = Path(sys.argv[1])
config = ModelConfig(vocab=2048, dim=512, layers=4, heads=8, ffn=1024, experts=32, expert_ffn=256)
model = Transformer(config).bfloat16()
size = sum(p.nbytes for p in model.parameters())
_, saving = peak(lambda: hf.save(model, word_level((), 24), path, shard_bytes=size // 4 + 2**21))
del model
state = torch.random.get_rng_state()
(model, _), loading = peak(lambda: hf.load(path))
assert torch.equal(state, torch.random.get_rng_state())  # nothing is drawn for weights that are read
assert {name for name, _ in (*model.named_parameters(), *model.named_buffers())} == set(model.state_dict())
_, naive = peak(lambda: twice(path))
print(size, len(list(path.glob("*.safetensors"))), saving / size, loading / size, naive / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_saving_and_loading(tmp_path):
    """Anonymous resident memory, measured in its own process: saving and loading need the weights once."""
    threshold = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # freed memory goes back at once
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], env=os.environ | threshold, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    size, shards, saving, loading, naive = map(float, out.stdout.split())
    assert size > 80 * 2**20 and shards in (4, 5)
    assert saving < 0.3 and 0.9 < loading < 1.15 and naive > 1.8


# ---------------------------------------------------------------- other forms of the files


def test_older_config_files():
    """rope_theta at the top or left out, key heads left out, several end tokens."""
    new = to_hf_config(CONFIGS["llama"]) | {"num_key_value_heads": None, "eos_token_id": [5, 6]}
    config = from_hf_config(new)
    assert (config.rope_theta, config.kv_heads, config.eos) == (500.0, 4, 5)
    assert from_hf_config(new | {"eos_token_id": []}).eos is None
    del new["rope_theta"], new["num_key_value_heads"], new["head_dim"]
    config = from_hf_config(new)
    assert (config.rope_theta, config.kv_heads, config.head_size) == (10_000.0, 4, 8)


def test_generation_config_survives_with_its_end_tokens(tmp_path):
    save(build(dense(**SHAPE, eos=0, pad=1)), TOKENIZER, tmp_path)
    stated = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": [0, 7], "pad_token_id": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    model, tokenizer = load(tmp_path)
    save(model, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == stated
    model.config = dataclasses.replace(model.config, eos=5)  # not one of them: then it alone
    save(model, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == stated | {"eos_token_id": 5}
    change(tmp_path, eos_token_id="absent", pad_token_id=None)
    assert (load(tmp_path)[0].config.eos, load(tmp_path)[0].config.pad) == (0, 1)


# ---------------------------------------------------------------- tokenizers


def bpe():
    return train_bpe(["make 24 from 11, 3 — é\n"] * 9, 280, numbers=True)


def qwen_like():
    """Our BPE, split and normalised as Qwen's."""
    tokenizer = bpe()
    qwen = transformers.Qwen2Tokenizer()._tokenizer
    tokenizer.backend.normalizer, tokenizer.backend.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    return tokenizer


@pytest.mark.parametrize(
    "config,make,opener",
    [
        (CONFIGS["v3"], lambda: TOKENIZER, "AutoTokenizer"),
        (CONFIGS["v3"], bpe, "AutoTokenizer"),
        (CONFIGS["llama"], lambda: TOKENIZER, "AutoTokenizer"),
        (CONFIGS["llama"], bpe, "AutoTokenizer"),
        (CONFIGS["qwen2"], qwen_like, "AutoTokenizer"),
        (CONFIGS["qwen2"], bpe, "PreTrainedTokenizerFast"),  # AutoTokenizer takes Qwen's splitting: see hf.py
        (CONFIGS["qwen2"], lambda: TOKENIZER, "PreTrainedTokenizerFast"),
    ],
    ids=["v3 words", "v3 bpe", "llama words", "llama bpe", "qwen2 qwen", "qwen2 bpe", "qwen2 words"],
)
def test_transformers_opens_the_tokenizer(config, make, opener, tmp_path):
    tokenizer = make()
    save(Transformer(dataclasses.replace(config, vocab=320)), tokenizer, tmp_path)
    auto = getattr(transformers, opener).from_pretrained(tmp_path)
    text = f"User:make 24 from 11,3\nAssistant:{TAGS[0]}11-3=8,8*3=24:24 yes\n{TAGS[1]}{EOS} ?é"
    assert auto(text)["input_ids"] == tokenizer.encode(text)
    assert auto.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (auto.eos_token_id, auto.pad_token_id, len(auto)) == (tokenizer.eos, tokenizer.pad, tokenizer.size)
    chat = [{"role": "user", "content": "make 24"}, {"role": "assistant", "content": "yes"}]
    for messages in (chat[:1], chat):
        have = auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert have == tokenizer.render(messages)
    auto.save_pretrained(tmp_path / "theirs")  # and back again, the template in a file of its own
    again = Tokenizer.load(tmp_path / "theirs")
    assert again.encode(text) == tokenizer.encode(text) and again.render(chat) == tokenizer.render(chat)


# ---------------------------------------------------------------- what is refused


def change(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}"):
        load(folder)


@pytest.mark.parametrize(
    "damaged",
    [lambda data: b"", lambda data: data[:100], lambda data: data[:-1000], lambda data: b"x" * 999],
    ids=["empty", "truncated header", "truncated data", "not safetensors"],
)
def test_damaged_weights(folder, damaged):
    path = folder / "model.safetensors"
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load(folder)


def alter(folder, change_tensors):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path)


def test_tensors_that_do_not_fit_are_named(folder):
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"

    def wrong(tensors):
        del tensors[expert]
        tensors["model.layers.9.extra"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(33)

    alter(folder, wrong)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert f"missing: {expert}" in str(error.value)
    assert "surplus: model.layers.9.extra" in str(error.value)
    assert "shape of model.norm.weight: (33,), expected (32,)" in str(error.value)


def test_the_error_stays_short_where_no_tensor_fits(folder):
    def wrong(tensors):
        for name in list(tensors):
            tensors["model." + name] = tensors.pop(name)

    alter(folder, wrong)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight; .*and \d+ more") as error:
        load(folder)
    assert len(str(error.value)) < 1000


def test_the_error_names_some_tensors_of_each_kind(folder):
    def wrong(tensors):
        for name in [name for name in tensors if "layers.1.mlp.experts" in name]:
            del tensors[name]
        for name in [name for name in tensors if "layers.2.mlp.experts" in name]:
            tensors[name] = torch.zeros(3)
        tensors |= {f"extra.{i}": torch.zeros(1) for i in range(7)} | {"model.norm.weight": torch.ones(32).int()}

    alter(folder, wrong)
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert message.count("missing: ") == message.count("surplus: ") == message.count("shape of ") == 4
    assert message.count("and 20 more") == 2 and "and 3 more" in message  # 8 experts of 3 matrices; 7 extra
    assert "dtype of model.norm.weight: I32" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_not_read(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ValueError, match=f"only {name}: a pickle may run any code.*convert"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_no_model_computes_in(folder, dtype):
    with pytest.raises(ValueError, match=f"dtype = {dtype}: must be one of torch.float64, "):
        load(folder, dtype=dtype)


def test_unknown_architectures_list_what_is_supported(folder):
    for name in (["MambaForCausalLM"], [], None, "absent", "LlamaForCausalLM", 5, [None], [["x"]], {"0": 1}):
        change(folder, architectures=name)
        with pytest.raises(ValueError) as error:
            load(folder)
        assert all(known in str(error.value) for known in SUPPORTED)
        assert name != ["MambaForCausalLM"] or "MambaForCausalLM" in str(error.value)


NO_JSON = ["{", "", "[" * 100_000, '{"vocab_size":' * 100_000, "9" * 5000, '{"vocab_size": 64,}', "\x00"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", NO_JSON, ids=range(len(NO_JSON)))
def test_a_file_that_is_no_json(folder, name, text):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(folder)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load(folder)


@pytest.mark.parametrize("text", ["[]", "null", "5", '"x"', "NaN", "true"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_holds_no_object(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} holds no object"):
        load(folder)


@pytest.mark.parametrize("value", ["x", True, 1.0, [1, "x"], [None, {}], {}, 10**400, math.inf])
def test_end_tokens_of_generation_config_are_tokens(folder, value):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id = .*: must be a token, or several"):
        load(folder)


# ---- tensors that repeat others, and sizes that the weights do not have


def test_a_tied_head_must_be_the_embedding(tmp_path):
    """transformers computes with a head of its own then, and warns: config.json does not say what the folder holds."""
    model = build(CONFIGS["qwen2 tied, wide heads"])
    save(model, TOKENIZER, tmp_path)
    alter(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load(tmp_path)[0](X), model(X))
    assert load(tmp_path, dtype=torch.bfloat16)
    alter(tmp_path, lambda tensors: tensors["lm_head.weight"][5].neg_())
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load(tmp_path)
    alter(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(())}))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load(tmp_path)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "name,original",
    [("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight")],
)
def test_what_mtp_modules_repeat_must_be_equal(tmp_path, depth, name, original):
    model, name = build(dataclasses.replace(CONFIGS["v3"], mtp_depth=depth)), f"model.layers.3.{name}"
    save(model, TOKENIZER, tmp_path)
    alter(tmp_path, lambda tensors: tensors.update({name: tensors[original].clone()}))
    assert torch.equal(load(tmp_path)[0](X), model(X))
    alter(tmp_path, lambda tensors: tensors[name][5].neg_())
    with pytest.raises(ValueError, match=f"{name} differs from {original}"):
        load(tmp_path)


def test_frequencies_in_old_files_do_not_count(tmp_path):
    """Computed from config.json, as in transformers."""
    model = build(CONFIGS["llama"])
    save(model, TOKENIZER, tmp_path)
    alter(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(X).logits, model(X), rtol=0, atol=1e-5)
    assert torch.equal(load(tmp_path)[0](X), model(X))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"num_hidden_layers": 10**5}, "config.json has 100000 layers, 99999 of them with 8 experts"),
        ({"num_hidden_layers": 2**62, "num_nextn_predict_layers": 2**62}, "layers, .* of them with 8 experts"),
        ({"n_routed_experts": 10**6}, "with 1000000 experts, the weights are only"),
        ({"n_routed_experts": 2**62, "n_group": 2**61, "topk_group": 2**61}, "experts, the weights are only"),
        ({"vocab_size": 2**62}, "has a size of 4611686018427387904, the largest of the weights is 64"),
        ({"hidden_size": 10**9, "intermediate_size": 10**9}, "has a size of 1000000000"),
        ({"num_attention_heads": 10**12}, "has a size of 1000000000000"),
        ({"v_head_dim": 2**61}, "has a size of 2305843009213693952"),
        ({"n_shared_experts": 10**9}, "has a size of 1000000000"),
        ({"q_lora_rank": 10**9}, "has a size of 1000000000"),
        ({"qk_nope_head_dim": 2**63}, "qk_nope_head_dim = 9223372036854775808: must be int"),
        ({"num_nextn_predict_layers": 2**62}, None),  # only those are built that have weights
        ({"max_position_embeddings": 2**62}, None),
    ],
)
def test_sizes_are_compared_with_the_weights_before_anything_is_built(folder, fields, message):
    change(folder, **fields)
    began = time.process_time()
    if message is None:
        assert load(folder)
    else:
        with pytest.raises(ValueError, match=message):
            load(folder)
    assert time.process_time() - began < 1


def test_a_tokenizer_larger_than_the_model(folder):
    train_bpe(["text"], 262).save(folder)
    with pytest.raises(ValueError, match="the tokenizer has 262 tokens, the model only 64"):
        load(folder)


def test_nothing_is_written_of_a_model_that_no_class_computes(tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face class for softcap = 30.0"):
        save(Transformer(dense(softcap=30.0)), TOKENIZER, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""count.py: published totals, parts that sum to the model, and FLOPs as torch counts them."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import count as command
from experiments import pretrain
from experiments.count_figure import sizes
from minir1 import tasks
from minir1.model import block
from minir1.model import count as counting
from minir1.model.config import ModelConfig, dense
from minir1.model.hf_config import to_hf_config
from minir1.model.presets import DEEPSEEK_V3, PRESETS
from minir1.model.transformer import Transformer, on_meta
from minir1.tokenizer import word_level

MOE = {"vocab": 40, "dim": 24, "layers": 3, "heads": 3, "kv_lora": 10, "nope": 6, "rope": 4, "v_dim": 8, "ffn": 20}
MOE |= {"experts": 6, "experts_per_token": 2, "expert_ffn": 5}  # a width that torch's grouped product cannot take
GQA = {"vocab": 40, "dim": 24, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 20}
TINY = {
    "mla": ModelConfig(**MOE),
    "q_lora, two shared, groups": ModelConfig(**MOE, q_lora=7, shared_experts=2, groups=3, groups_kept=2),
    "mla dense": ModelConfig(**MOE | {"experts": 0}, tied=True),
    "mtp": ModelConfig(**MOE, mtp_depth=2),
    "gqa": dense(**GQA, o_bias=True),
    "gqa tied, head_dim": dense(**GQA, qkv_bias=False, tied=True, head_dim=10, qk_norm=True),
    "gqa moe": ModelConfig(**MOE, attention="gqa", kv_heads=1, shared_experts=0, dense_layers=0, qk_norm=True),
    "gqa mtp": dense(**GQA, mtp_depth=1, tied=True),
}
tiny = pytest.mark.parametrize("config", TINY.values(), ids=TINY)

# ---- published figures -------------------------------------------------------------------------


def test_deepseek_v3_is_671b_of_which_37b_are_active():
    counts = counting.count(DEEPSEEK_V3, length=4096)
    assert counts["total"] == 671_026_404_352
    assert counts["active"] / 1e9 == pytest.approx(36.63, abs=0.005)
    assert counts["active_with_embedding"] / 1e9 == pytest.approx(37.55, abs=0.005)
    assert counts["total/mtp"] / 1e9 == pytest.approx(11.6, abs=0.05)
    assert counts["total/routed"] == 58 * 256 * 3 * 7168 * 2048 and counts["active/routed"] == 58 * 8 * 3 * 7168 * 2048
    # arXiv:2505.09343, tables 1 and 2: 70.272 KB of cache and 250 GFLOP of training a token, rows of 4,096
    assert counts["cache/token_layer"] == 512 + 64 and counts["cache/token"] == 70_272
    assert counts["flops/train"] / 1e9 == pytest.approx(250, abs=0.6)


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("deepseek-v3-16b", 15.71, 2.45),
        ("deepseek-v2-lite", 15.71, 2.45),
        ("r1-distill-qwen-7b", 7.616, 7.07),  # the published "6.5B without embedding", and the head
        ("r1-distill-qwen-14b", 14.77, 13.99),
        ("r1-distill-qwen-32b", 32.76, 31.99),
        ("r1-distill-llama-8b", 8.030, 7.50),
        ("r1-distill-llama-70b", 70.55, 69.50),
        ("qwen3-0.6b", 0.596, 0.596),
        ("qwen3-30b-a3b", 30.53, 3.04),
        ("granite-8b", 8.171, 8.171),
    ],
)
def test_known_sizes(name, total, active):
    counts = counting.count(PRESETS[name])
    assert counts["total"] / 1e9 == pytest.approx(total, rel=1e-3)
    assert counts["active"] / 1e9 == pytest.approx(active, rel=2e-3)


def test_the_distilled_qwen_is_qwen_untied():
    config = PRESETS["r1-distill-qwen-1.5b"]
    assert counting.count(replace(config, tied=True))["total"] == 1_543_714_304  # Qwen2.5-1.5B
    assert counting.count(config)["total"] == 1_543_714_304 + 151_936 * 1536


def test_the_larger_two_of_qwen2_have_another_epsilon():
    names = [f"r1-distill-qwen-{size}b" for size in ("1.5", "7", "14", "32")]
    assert [PRESETS[name].norm_eps for name in names] == [1e-6, 1e-6, 1e-5, 1e-5]


def test_our_presets_are_the_models_of_the_demonstration():
    for name, kind in (("minir1", False), ("minir1-dense", True)):
        config = pretrain.Config(dense=kind)
        trained = pretrain.build_model(config, word_level(*tasks.load("countdown").vocabulary()))
        assert counting.count(PRESETS[name])["total"] == sum(p.numel() for p in trained.parameters())


# ---- parts -------------------------------------------------------------------------------------


@tiny
def test_parts_sum_to_the_model(config):
    model = Transformer(config)
    total = counting.total_parameters(model)
    assert sum(total.values()) == sum(p.numel() for p in model.parameters())
    assert total == counting.total_parameters(on_meta(config))
    assert total["mtp"] == sum(p.numel() for p in model.mtp.parameters())


def test_every_part_by_hand():
    total = counting.total_parameters(on_meta(TINY["q_lora, two shared, groups"]))
    active = counting.active_parameters(on_meta(TINY["q_lora, two shared, groups"]))
    attention = 24 * 7 + 7 * 3 * 10 + 24 * 14 + 10 * 3 * 14 + 3 * 8 * 24
    parts = {
        "embedding": 40 * 24,
        "attention": 3 * attention,
        "dense": 3 * 24 * 20,
        "shared": 2 * 2 * 3 * 24 * 5,
        "routed": 2 * 6 * 3 * 24 * 5,
        "router": 2 * 24 * 6,
        "norms": 3 * (2 * 24 + 7 + 10) + 24,
        "head": 40 * 24,
        "mtp": 0,
    }
    assert total == parts
    assert active == parts | {"embedding": 0, "routed": 2 * 2 * 3 * 24 * 5}


def test_a_tied_embedding_counts_once_and_works_as_the_head():
    model = on_meta(TINY["gqa mtp"])
    assert counting.total_parameters(model)["head"] == 0
    assert counting.active_parameters(model)["head"] == 40 * 24 and counting.active_parameters(model)["embedding"] == 0
    counts = counting.count(TINY["gqa mtp"])
    assert counts["total"] == counts["active"] == counts["active_with_embedding"]


def test_biases_and_norm_weights_are_parameters_but_no_matrices():
    model = on_meta(TINY["gqa"])
    every, matrices = counting.active_parameters(model), counting.active_parameters(model, matrices=True)
    assert every["attention"] - matrices["attention"] == 3 * (24 + 2 * 12 + 24) and matrices["norms"] == 0


def test_an_unknown_parameter_is_named():
    with pytest.raises(ValueError, match="parameter 'lora_a' belongs to no part; known are embedding, attention"):
        counting.part_of("lora_a")


# ---- cache and operations ----------------------------------------------------------------------


def flops(work) -> int:
    """What torch counts; attention without a cache counts as two products of full squares."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def padded(config: ModelConfig) -> ModelConfig:
    """With one size for q, k and v: attention pads the smaller ones, and torch counts the padding."""
    return replace(config, v_dim=config.nope + config.rope)


@tiny
def test_flops_of_a_forward_pass_are_those_that_torch_counts(config):
    model = Transformer(padded(config))
    counts = flops(lambda: model(torch.zeros(2, 7, dtype=torch.int64)))
    assert counts == 2 * 7 * counting.forward_flops(model, keys=7)  # torch's square has no mask


@tiny
def test_flops_of_decoding_are_those_that_torch_counts(config, monkeypatch):
    monkeypatch.setattr(block, "SMALL", 0)  # no fused matrices, which trade products for fewer operators
    model = Transformer(config)
    cache = model.cache(2, 16)
    model.hidden(torch.zeros(2, 5, dtype=torch.int64), cache=cache)
    counts = flops(lambda: model.logits(model.hidden(torch.zeros(2, 1, dtype=torch.int64), cache=cache)))
    assert counts == 2 * counting.decode_flops(model, length=6)


def test_flops_by_hand():
    model = on_meta(dense(vocab=10, dim=4, layers=2, heads=2, kv_heads=1, ffn=6, mtp_depth=1))
    block = 4 * (4 + 2 + 2) + 4 * 4 + 3 * 4 * 6
    pairs = 2 * 2 * (2 + 2)  # 2·H·(d + d) a key a layer
    assert counting.forward_flops(model, 3) == 2 * (2 * block + 40) + 2 * pairs * 3
    assert counting.decode_flops(model, 3) == counting.forward_flops(model, 3)
    assert counting.train_flops(model, 5) == 3 * counting.forward_flops(model, 3)  # (5 + 1) / 2 keys on average
    assert counting.train_flops(model, 5, mtp=True) == 3 * (2 * (block + 8 * 4 + 40) + pairs * 3)


def test_the_backward_pass_takes_twice_the_products():
    model = Transformer(replace(TINY["gqa"], layers=1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert counter.get_total_flops() == 4 * 3 * counting.forward_flops(model, keys=4)


def test_cache():
    assert counting.cache_values(TINY["mla"]) == 3 * (10 + 4)
    assert counting.cache_values(TINY["gqa tied, head_dim"]) == 3 * 2 * 2 * 10
    assert counting.count(TINY["mla"], cache_bytes=1)["cache/token"] == 42


# ---- the command line --------------------------------------------------------------------------


def test_config_files_and_folders(tmp_path):
    config = TINY["gqa"]
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(replace(config, o_bias=False))))
    expected = counting.count(replace(config, o_bias=False))["total"]
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        assert command.main(command.Config(name))[name]["total"] == expected


def test_what_cannot_be_counted_says_why(tmp_path):
    with pytest.raises(ValueError, match="'gpt-5' is neither a preset nor a config.json; presets are deepseek-r1, "):
        command.find("gpt-5")
    with pytest.raises(ValueError, match="neither"):
        command.find(str(tmp_path))  # a folder without config.json
    for text, message in (("{", "is damaged"), ("[1]", "holds no object"), ('{"architectures": ["Rnn"]}', "'Rnn'")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            command.find(str(tmp_path))
    with pytest.raises(ValueError, match="length = 0"):
        counting.count(TINY["mla"], length=0)


def test_all_presets_at_once(tmp_path, capsys):
    files = {"json": tmp_path / "a" / "count.json", "figure": tmp_path / "count.png"}
    command.main(command.Config("all", length=8192, **files))
    text = capsys.readouterr().out
    assert "671.0B" in text and "36.63B" in text and "length of 8,192" in text
    counts = json.loads(files["json"].read_text())
    assert list(counts) == list(PRESETS) and counts["minir1"]["length"] == 8192
    assert files["figure"].read_bytes().startswith(b"\x89PNG")


def test_it_runs_from_the_command_line():
    command_line = [sys.executable, "-m", "experiments.count", "minir1", "--length", "64"]
    done = subprocess.run(command_line, capture_output=True, text=True)
    assert done.returncode == 0 and "1.020M parameters" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-0.6b"])
def test_one_preset_prints_its_parts(name, capsys):
    command.main(command.Config(name))
    text = capsys.readouterr().out
    assert "embedding" in text and "decoding, a token at position 4,096" in text
    assert ("multi-token prediction" in text) == ("routed experts" in text) == ("v3" in name)


def test_numbers_for_people():
    assert [command.human(n) for n in (671.026e9, 37.55e9, 1.777e9, 320)] == ["671.0B", "37.55B", "1.777B", "320"]
    assert command.human(260.7e9, "FLOP") == "260.7 GFLOP"


# ---- the figure --------------------------------------------------------------------------------


def test_the_figure_says_what_it_shows(tmp_path):
    counts = {"a": (1e9, 1e9), "b": (1.01e9, 1.01e9), "moe": (5e11, 2.5e10)}
    counts = {name: {"total": total, "active_with_embedding": active} for name, (total, active) in counts.items()}
    figure = sizes(counts, tmp_path / "a.png")
    words = [text.get_text() for owner in (figure, *figure.axes) for text in owner.texts]
    assert {"a · b", "moe\n25B of 500B: 5.0%", "moe: a token uses 25B of 500B parameters"} <= set(words)
    alone = sizes({"a": counts["a"]}, tmp_path / "b.png")
    assert alone.texts[0].get_text() == "Dense models use every parameter for every token"

"""gqa.py: query heads share keys; with as many key heads as query heads it is multi-head attention."""
import pytest
import torch

from minir1.model.cache import Cache
from minir1.model.config import dense
from minir1.model.gqa import GQA
from minir1.model.packing import packing
from minir1.model.rope import rope_freqs_cis, rotate


def build(**changes):
    torch.manual_seed(2)
    config = dense(**{"dim": 24, "heads": 6, "kv_heads": 2, "head_dim": 8, "layers": 2, **changes})
    layer = GQA(config)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return config, layer.double()


def freqs_cis(config, positions):
    return rope_freqs_cis(config.head_size, positions, config.rope_theta)


def run(config, layer, x):
    """x [T, D], one row"""
    layout = packing(1, len(x), None, x.device)
    return layer(x, freqs_cis(config, layout.positions()), layout)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("H,K", [(6, 6), (6, 2), (6, 1)])
def test_against_the_equations(H, K, bias):
    config, layer = build(heads=H, kv_heads=K, qkv_bias=bias)
    x = torch.randn(5, 24, dtype=torch.float64)
    cis = freqs_cis(config, torch.arange(5))
    turned = lambda x: rotate(x.unsqueeze(1), cis, interleaved=False).squeeze(1)
    heads = []
    for h in range(H):
        q = turned(layer.wq(x)[:, h * 8 : h * 8 + 8])
        k, v = (w(x).chunk(K, -1)[h // (H // K)] for w in (layer.wk, layer.wv))
        scores = (q @ turned(k).T / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    have, entry = run(config, layer, x)
    torch.testing.assert_close(have, torch.cat(heads, -1) @ layer.wo.weight.T, rtol=1e-6, atol=1e-8)
    assert entry.shape == (5, 2, K, 8)


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("changes", [
    {"kv_heads": 6}, {"kv_heads": 3, "qkv_bias": True}, {"kv_heads": 1},
    {"qk_norm": True, "o_bias": True, "attention_scale": 0.7},
], ids=str)
def test_decoding_equals_prefill(changes, chunk):
    config, layer = build(**changes)
    x = torch.randn(5, 24, dtype=torch.float64)
    want, entry = run(config, layer, x)
    cache = Cache(config, rows=1, slots=5, dtype=torch.float64)
    for t in range(0, 5, chunk):
        part = x[None, t : t + chunk]
        positions = cache.positions(part.shape[1])
        step = part, freqs_cis(config, positions), cache, 0, positions, cache.bias(positions)
        plain, out = layer.decode(*step), layer.decode(*step, layer.fuse())  # the second one writes the same entry
        cache.advance(part.shape[1], part.shape[1])
        torch.testing.assert_close(plain[0], want[t : t + chunk], rtol=1e-5, atol=1e-5)  # softmax in fp32
        torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cache.layers[0][0], entry, rtol=1e-10, atol=1e-10)


def test_the_cache_holds_keys_and_values_of_the_key_heads():
    config, _ = build(kv_heads=2)
    cache = Cache(config, rows=3, slots=7)
    size = sum(layer.untyped_storage().nbytes() for layer in cache.layers)
    assert size == config.layers * 3 * 7 * 2 * 2 * 8 * 4


def test_biases_where_qwen_has_them():
    _, layer = build(qkv_bias=True)
    names = {"wq.weight", "wk.weight", "wv.weight", "wo.weight"}
    assert {n for n, _ in layer.named_parameters()} == names | {"wq.bias", "wk.bias", "wv.bias"}
    _, layer = build(qkv_bias=False)
    assert {n for n, _ in layer.named_parameters()} == names
    _, layer = build(qkv_bias=False, o_bias=True)
    assert {n for n, _ in layer.named_parameters()} == names | {"wo.bias"}


def test_bias_of_the_output_is_added_last():
    config, layer = build(o_bias=True)
    x = torch.randn(5, 24, dtype=torch.float64)
    have, bias = run(config, layer, x)[0], layer.wo.bias.detach().clone()
    layer.wo.bias.data.zero_()
    torch.testing.assert_close(have - bias, run(config, layer, x)[0], rtol=1e-10, atol=1e-10)


def test_queries_and_keys_are_normed_head_by_head_before_rope():
    """RMSNorm by hand: x / √(mean x² + ε) times a weight that all heads share."""
    config, layer = build(qk_norm=True, norm_eps=0.5)
    x = torch.randn(5, 24, dtype=torch.float64)
    cis = freqs_cis(config, torch.arange(5))
    q, k, v = layer.project(x, cis)
    for have, w, norm, heads in ((q, layer.wq, layer.q_head_norm, 6), (k, layer.wk, layer.k_head_norm, 2)):
        assert norm.weight.shape == (8,)
        plain = w(x).view(5, heads, 8)
        want = plain / (plain.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
        torch.testing.assert_close(have, rotate(want, cis, interleaved=False), rtol=1e-6, atol=1e-6)
    assert torch.equal(v.flatten(1), layer.wv(x))


def test_attention_scale_replaces_the_root():
    """Queries twice as large, or a scale twice as large: the same scores."""
    config, layer = build(qkv_bias=False)
    _, scaled = build(qkv_bias=False, attention_scale=2 * 8**-0.5)
    x = torch.randn(5, 24, dtype=torch.float64)
    plain, have = run(config, layer, x)[0], run(config, scaled, x)[0]
    layer.wq.weight.data *= 2
    torch.testing.assert_close(have, run(config, layer, x)[0], rtol=1e-6, atol=1e-8)
    assert not torch.allclose(have, plain, atol=1e-3)

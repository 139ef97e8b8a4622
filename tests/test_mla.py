"""mla.py: absorbed equals expanded, and the cache holds only the latent and the RoPE key."""
import pytest
import torch

from minir1.model.cache import Cache
from minir1.model.config import ModelConfig
from minir1.model.mla import MLA
from minir1.model.packing import packing
from minir1.model.rope import rope_freqs_cis, rotate

SMALL = {"dim": 20, "heads": 3, "kv_lora": 10, "nope": 6, "rope": 4, "v_dim": 5, "layers": 2}
CONFIGS = [
    ModelConfig(**SMALL),
    ModelConfig(**SMALL | {"q_lora": 7}),
    ModelConfig(**SMALL | {"v_dim": 16}),  # wider than the keys
]
EACH = pytest.mark.parametrize("config", CONFIGS, ids=["full queries", "q_lora", "wide values"])


def build(config, dtype=torch.float64):
    torch.manual_seed(1)
    layer = MLA(config)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer.to(dtype)


def freqs_cis(config, positions):
    return rope_freqs_cis(config.rope, positions, config.rope_theta)


def by_the_equations(layer, config, x):
    """The equations of MLA's docstring, head by head. x: [T, D]."""
    T = len(x)
    cis = freqs_cis(config, torch.arange(T))
    norm = lambda x, weight: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    turned = lambda x: rotate(x.unsqueeze(1), cis, interleaved=True).squeeze(1)
    w_dkv, w_kr = layer.wkv_a.weight.split((config.kv_lora, config.rope))
    c, k_rope = norm(x @ w_dkv.T, layer.kv_norm.weight), turned(x @ w_kr.T)
    q_in, w_q = x, getattr(layer, "wq", None)
    if config.q_lora:
        q_in, w_q = norm(x @ layer.wq_a.weight.T, layer.q_norm.weight), layer.wq_b
    heads = []
    for w_qi, w_kvi in zip(w_q.weight.chunk(config.heads), layer.wkv_b.weight.chunk(config.heads)):
        w_uq, w_qr = w_qi.split((config.nope, config.rope))
        w_uk, w_uv = w_kvi.split((config.nope, config.v_dim))
        scores = (q_in @ w_uq.T) @ (c @ w_uk.T).T + turned(q_in @ w_qr.T) @ k_rope.T
        scores = scores / (config.nope + config.rope) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ (c @ w_uv.T))
    return torch.cat(heads, -1) @ layer.wo.weight.T


@EACH
def test_expanded_against_the_equations(config):
    layer, x = build(config), torch.randn(7, config.dim, dtype=torch.float64)
    layout = packing(1, 7, None, x.device)
    have, entry = layer(x, freqs_cis(config, layout.positions()), layout)
    torch.testing.assert_close(have, by_the_equations(layer, config, x), rtol=1e-6, atol=1e-8)
    assert entry.shape == (7, config.kv_lora + config.rope)


@EACH
def test_absorbed_equals_expanded(config):
    """Two rows of six tokens, decoded at once, one by one, and in chunks of four."""
    layer, x = build(config), torch.randn(2, 6, config.dim, dtype=torch.float64)
    layout = packing(2, 6, None, x.device)
    want, entry = layer(x.flatten(0, 1), freqs_cis(config, layout.positions()), layout)
    want = want.view_as(x)
    for chunk in (6, 1, 4):
        cache = Cache(config, rows=2, slots=6, dtype=torch.float64)
        for t in range(0, 6, chunk):
            part = x[:, t : t + chunk]
            positions = cache.positions(part.shape[1])
            step = part, freqs_cis(config, positions), cache, 1, positions, cache.bias(positions)
            plain, out = layer.decode(*step), layer.decode(*step, layer.fuse())  # the second one writes the same entry
            assert (layer.fuse() is None) == (config.q_lora is not None)
            cache.advance(part.shape[1], part.shape[1])
            torch.testing.assert_close(plain, want[:, t : t + chunk], rtol=1e-5, atol=1e-5)  # softmax in fp32
            torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(cache.layers[1], entry.view(2, 6, -1), rtol=1e-10, atol=1e-10)


def test_many_small_heads_are_not_fused():
    """W_in and W_out would have (9·36 + 8·32)·24 = 13,920 numbers; the layer has 24·48 + 24·36 + 32 + 32·40 + 24·24."""
    layer = build(ModelConfig(dim=24, heads=8, kv_lora=32, nope=2, rope=4, v_dim=3, experts=0))
    assert sum(p.numel() for p in layer.parameters()) == 3904 and layer.fuse() is None


def test_the_cache_holds_kv_lora_and_rope_numbers_per_token_and_layer():
    config = ModelConfig(**SMALL)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = Cache(config, rows=3, slots=11, dtype=dtype)
        bytes_ = sum(layer.untyped_storage().nbytes() for layer in cache.layers)
        assert bytes_ == config.layers * 3 * 11 * (config.kv_lora + config.rope) * size


def test_only_the_rope_part_depends_on_position():
    """With the rope columns of the queries at zero the positions have no effect."""
    config = ModelConfig(**SMALL)
    layer = build(config)
    with torch.no_grad():
        layer.wq.weight.unflatten(0, (config.heads, -1))[:, config.nope :] = 0
    x = torch.randn(5, config.dim, dtype=torch.float64)
    layout = packing(1, 5, None, x.device)
    here, _ = layer(x, freqs_cis(config, torch.arange(5)), layout)
    there, _ = layer(x, freqs_cis(config, torch.tensor([9, 2, 77, 5, 31])), layout)
    torch.testing.assert_close(here, there)


@torch.no_grad()
def test_decoding_in_fp16_overflows_no_earlier_than_prefill():
    """Queries of 8,000: W^UKᵀ q_nope and q·k exceed 65,504, the largest number in fp16, unless scaled first."""
    config = ModelConfig(**SMALL | {"nope": 64, "rope": 64})
    layer, x = build(config, torch.float32), torch.randn(6, config.dim)
    layer.wq.weight *= 8000 / layer.wq(x).std()
    layer.wkv_b.weight *= 2.5
    layer.kv_norm.weight.fill_(0.01)
    q_nope, _, c, _ = layer.project(x, freqs_cis(config, torch.arange(6)))
    w_uk = layer.wkv_b.weight.unflatten(0, (config.heads, -1))[:, : config.nope]
    assert torch.einsum("thn,hnc->thc", q_nope, w_uk).abs().max() > 65504 and q_nope.abs().max() < 65504
    layout = packing(1, 6, None, x.device)
    want = layer(x, freqs_cis(config, layout.positions()), layout)[0]
    layer, x = layer.half(), x.half().unsqueeze(0)
    cache = Cache(config, rows=1, slots=6, dtype=torch.float16)
    positions = cache.positions(6)
    out = layer.decode(x, freqs_cis(config, positions), cache, 0, positions, cache.bias(positions))
    prefill = layer(x[0], freqs_cis(config, layout.positions()), layout)[0]
    for have in (out[0], prefill):
        torch.testing.assert_close(have.float(), want, rtol=0, atol=0.02 * want.abs().max().item())

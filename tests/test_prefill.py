"""Transformer.prefill: states and cache as from one call of hidden, in memory that does not grow with the prompt."""
from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minir1.model.config import ModelConfig, dense
from minir1.model.rope import RopeScaling
from minir1.model.transformer import Transformer
from minir1.sample import PREFILL_CHUNK, generate, stream

YARN = RopeScaling("yarn", factor=4.0, original=16, mscale=1.0, mscale_all=0.5)
MLA = ModelConfig(
    vocab=50, dim=32, layers=3, heads=2, kv_lora=16, nope=8, rope=8, v_dim=12, ffn=48, experts=4, expert_ffn=16
)
GQA = dense(vocab=50, dim=32, layers=3, heads=4, kv_heads=2, ffn=48, qk_norm=True)
CONFIGS = {"mla-moe": MLA, "gqa": GQA, "mla-yarn": replace(MLA, rope_scaling=YARN, q_lora=12)}
CONFIGS["gqa-yarn"] = replace(GQA, rope_scaling=YARN)
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LENGTHS = torch.tensor([70, 2, 64, 33, 7])  # shorter than a chunk, at its edge, past it


def build(config):
    torch.manual_seed(0)
    return Transformer(replace(config, init_std=0.2)).requires_grad_(False)


def prompts():
    return torch.randint(0, 50, (5, 70), generator=torch.Generator().manual_seed(1))


def at_once(model, tokens, lengths, slots):
    """What prefill must equal: one call of hidden."""
    cache = model.cache(len(tokens), slots)
    hidden = model.hidden(tokens, lengths=lengths, cache=cache)
    last = torch.full((len(tokens),), tokens.shape[1] - 1) if lengths is None else lengths - 1
    return hidden[torch.arange(len(tokens)), last], cache


@EACH
@pytest.mark.parametrize("chunk", [1, 3, 7, 64, 70, 100])
@pytest.mark.parametrize("ragged", [False, True])
def test_chunks_equal_one_call(config, chunk, ragged, monkeypatch):
    """In fp64, where a chunk that saw too much or too little could not hide in rounding."""
    monkeypatch.setattr("minir1.model.mla.KEY_BLOCK", 10)  # several blocks of the past, the last one smaller
    monkeypatch.setattr("minir1.model.gqa.KEY_BLOCK", 10)
    model, tokens, lengths = build(config).double(), prompts(), LENGTHS if ragged else None
    want, want_cache = at_once(model, tokens, lengths, 80)
    cache = model.cache(5, 80)
    have = model.prefill(tokens, lengths=lengths, cache=cache, chunk=chunk)
    torch.testing.assert_close(have, want, rtol=0, atol=1e-6)
    assert torch.equal(cache.length, want_cache.length) and cache.used == want_cache.used == 70
    torch.testing.assert_close(cache.layers, want_cache.layers, rtol=0, atol=1e-6)
    new = torch.tensor([[3, 1], [4, 1], [5, 9], [2, 6], [5, 3]])
    after, want_after = (model.hidden(new, cache=c) for c in (cache, want_cache))
    torch.testing.assert_close(after, want_after, rtol=0, atol=1e-6)


@EACH
def test_one_chunk_is_the_same_to_the_bit(config):
    model, tokens = build(config), prompts()
    want, want_cache = at_once(model, tokens, LENGTHS, 70)
    cache = model.cache(5, 70)
    assert torch.equal(model.prefill(tokens, lengths=LENGTHS, cache=cache, chunk=70), want)
    assert all(torch.equal(a, b) for a, b in zip(cache.layers, want_cache.layers))


@EACH
def test_padding_has_no_effect(config):
    model, tokens = build(config), prompts()
    changed = torch.where(torch.arange(70) < LENGTHS.unsqueeze(1), tokens, 49 - tokens)
    have, want = (model.prefill(x, lengths=LENGTHS, cache=model.cache(5, 70), chunk=8) for x in (changed, tokens))
    assert torch.equal(have, want)


def test_columns_that_no_row_reaches():
    model, tokens = build(MLA), prompts()
    lengths = torch.tensor([3, 9, 1, 5, 2])
    have = model.prefill(tokens, lengths=lengths, cache=model.cache(5, 70), chunk=8)
    torch.testing.assert_close(have, at_once(model, tokens, lengths, 70)[0], rtol=0, atol=1e-5)


def test_half_precision_and_double():
    for dtype, atol in ((torch.bfloat16, 0.1), (torch.float64, 1e-12)):
        model, tokens = build(GQA).to(dtype), prompts()
        have = model.prefill(tokens, lengths=LENGTHS, cache=model.cache(5, 70), chunk=9)
        assert have.dtype == dtype
        torch.testing.assert_close(have, at_once(model, tokens, LENGTHS, 70)[0], rtol=0, atol=atol)


def test_errors():
    model, tokens = build(GQA), prompts()
    cache = model.cache(5, 70)
    for arguments, error in [
        ({"chunk": 0}, "chunk = 0"),
        ({"lengths": torch.tensor([70, 0, 1, 1, 1])}, "lengths must be 5 numbers in 1 to 70, got .70, 0"),
        ({"lengths": torch.tensor([71, 1, 1, 1, 1])}, "lengths must be 5 numbers in 1 to 70, got .71"),
        ({"lengths": torch.tensor([3])}, "lengths must be 5 numbers in 1 to 70, got .3."),
        ({"cache": model.cache(5, 60), "chunk": 32}, "64 tokens do not fit into a cache of 60 slots"),
    ]:
        with pytest.raises(ValueError, match=error):
            model.prefill(tokens, **{"cache": cache, **arguments})
    model.prefill(tokens, cache=cache)
    with pytest.raises(ValueError, match="already holds 70 columns"):
        model.prefill(tokens, cache=cache)


@EACH
def test_the_sampler_reads_long_prompts_in_chunks(config, monkeypatch):
    """The same greedy tokens for any chunk; a prompt below the default is one chunk."""
    assert PREFILL_CHUNK >= 2048
    model, rows = build(config), [row[:n] for row, n in zip(prompts().tolist(), LENGTHS.tolist())]
    columns, prefill = [], Transformer._prefill

    def spy(self, tokens, positions, layout, *more):
        columns.append(layout.columns)
        return prefill(self, tokens, positions, layout, *more)

    monkeypatch.setattr(Transformer, "_prefill", spy)
    want = generate(model, rows, max_tokens=6, temperature=0).tokens
    assert columns == [70]
    monkeypatch.setattr("minir1.sample.PREFILL_CHUNK", 32)
    assert torch.equal(generate(model, rows, max_tokens=6, temperature=0).tokens, want)
    assert list(stream(model, rows[0], max_tokens=6, temperature=0)) == want[0].tolist()
    assert columns == [70, *2 * [32, 32, 6]]


class LiveBytes(TorchDispatchMode):
    """The peak of bytes in storages allocated inside; a storage counts until its last tensor is freed."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.peak = WeakKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        arguments = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in arguments:
                self.sizes[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.live = sum(self.sizes.values())
        self.peak = max(self.peak, self.live)
        return out


@pytest.mark.parametrize("config", [MLA, GQA], ids=["mla-moe", "gqa"])
def test_activations_do_not_grow_with_the_prompt(config):
    model = build(replace(config, layers=1, dense_layers=0))

    def peak(work, length: int) -> int:
        tokens, cache = torch.zeros(1, length, dtype=torch.int64), model.cache(1, length)
        with LiveBytes() as bytes_:
            work(tokens, cache=cache)
        return bytes_.peak

    short, long = (peak(model.prefill, length) for length in (8192, 16384))
    assert long <= 1.1 * short
    assert peak(model.hidden, 8192) > 5 * short  # the measure sees what one call needs

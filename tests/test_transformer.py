"""transformer.py: cached = uncached, rows are independent of the batch and of padding, causal; logprob's contract."""
import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.model import block as blocks
from minir1.model.config import ModelConfig, dense
from minir1.model.heads import ValueHead
from minir1.model.lora import add_adapters
from minir1.model.moe import MoE, balance_step, expert_load, rerouted, routes_of, sequence_balance_loss
from minir1.model.transformer import Transformer, on_meta
from minir1.sample import generate

V = 23
SHAPE = {"vocab": V, "dim": 24, "layers": 3, "heads": 4, "ffn": 20, "init_std": 0.3}
LATENT = {"kv_lora": 12, "nope": 6, "rope": 4, "v_dim": 8}
MIX = {"experts": 6, "experts_per_token": 2, "expert_ffn": 8}
CONFIGS = {
    "mla moe": ModelConfig(**SHAPE, **LATENT, **MIX),
    "mla moe groups q_lora": ModelConfig(
        **SHAPE, **LATENT, **MIX, q_lora=10, groups=3, groups_kept=2, shared_experts=2, route_scale=2.5,
        dense_layers=0,
    ),
    "mla dense": ModelConfig(**SHAPE, **LATENT, experts=0),
    "gqa moe softmax": ModelConfig(**SHAPE, **MIX, attention="gqa", score="softmax", shared_experts=0),
    "gqa dense": dense(**SHAPE),
    "gqa tied capped": dense(**SHAPE, kv_heads=1, qkv_bias=False, tied=True, softcap=2.0, logit_scale=0.6),
}
CLOSE = {"rtol": 0, "atol": 1e-5}


def build(config):
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for p in model.parameters():  # norm weights and biases that do something
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    for module in model.modules():
        if isinstance(module, MoE):
            module.bias.normal_(std=0.2)
    return model


MODELS = {name: build(config) for name, config in CONFIGS.items()}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(1)
    return MODELS[request.param]


def tokens(*shape, seed=0):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def real(lengths, T):
    return torch.arange(T) < lengths.unsqueeze(1)


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_autocast_rounds_neither_router_scores_nor_logits(model, dtype):
    """What is promised in fp32 is the same computation of the layer's input as without autocast, to the bit."""
    model, x, inputs, record = copy.deepcopy(model).to(dtype), tokens(4, 9), [], []
    for module in model.modules():
        if isinstance(module, MoE):
            module.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0])))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(x, record=record)
        logits = model.logits(hidden)
        logp, entropy = model.logprob(x, entropy=True)
        sampled = generate(model, x[:, :3].tolist(), max_tokens=6)
        assert model.freqs_cis(x).dtype == torch.complex64
    assert not torch.equal(hidden, model.hidden(x)) or dtype == torch.bfloat16  # autocast was on
    assert len(record) == model.config.moe_layers
    for (module, entered), routing in zip(inputs, record):
        scores, chosen = module.route(entered.flatten(0, -2))
        assert routing.scores.dtype == torch.float32 and torch.equal(routing.scores, scores)
        assert torch.equal(routing.chosen, chosen)
    assert logits.dtype == logp.dtype == entropy.dtype == sampled.logp.dtype == torch.float32
    assert torch.equal(logits, model.logits(hidden))
    want = logits[:, :-1].log_softmax(-1).gather(-1, x[:, 1:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logp[:, 1:], want, rtol=0, atol=1e-5)


def test_autocast_with_recomputed_blocks(model):
    """The second pass routes as the first, and gradients are the same."""
    model = copy.deepcopy(model)
    results = []
    for recompute in (False, True):
        model.recompute(recompute)
        record = []
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.logprob(tokens(3, 9), record=record).sum()
        loss.backward()
        results.append([*(p.grad for p in model.parameters()), *(routing.scores for routing in record)])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_and_on_the_meta_device_autocast_is_no_obstacle():
    model = MODELS["mla moe"]
    x, router = torch.randn(5, 24), model.blocks[1].ffn.route
    logits, route = (torch.compile(f, backend="eager", fullgraph=True) for f in (model.logits, router))
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            assert torch.equal(logits(x), model.logits(x)) and logits(x).dtype == torch.float32
            assert torch.equal(route(x).scores, router(x).scores)
    there = on_meta(CONFIGS["mla moe"])
    assert there.logits(x.to("meta")).shape == (5, V) and there.blocks[1].ffn.route(x.to("meta")).chosen.shape == (5, 2)


# ---------------------------------------------------------------- recomputing


def gradients(model, routes=None):
    """[loss, gradients of a loss that uses everything], the record, and the bytes that autograd saved."""
    x, lengths, record, storages = tokens(3, 9), torch.tensor([9, 4, 6]), [], {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model.logprob(x, lengths=lengths, routes=routes, record=record).sum()
        loss = loss + sum(sequence_balance_loss(routing, lengths) for routing in record)
        loss = loss + sum(logp.sum() for logp in model.mtp_logprob(x, lengths=lengths, record=record))
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return [loss, *grads], record, sum(n for pointer, n in storages.items() if pointer not in weights)


@pytest.mark.parametrize("variant", ["plain", "mtp", "lora", "routes"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputing_changes_no_gradient_keeps_the_record_and_saves_memory(name, variant):
    config = dataclasses.replace(CONFIGS[name], mtp_depth=2 * (variant == "mtp"))
    model, routes = build(config), None
    if variant == "lora":
        for adapter in add_adapters(model, 4, 8.0):
            adapter.data += 0.1 * torch.randn_like(adapter)
    if variant == "routes" and config.moe_layers:
        chosen = [torch.randperm(config.experts)[: config.experts_per_token] for _ in range(27 * config.moe_layers)]
        routes = torch.stack(chosen).view(3, 9, config.moe_layers, -1)
    want, recorded, memory = gradients(model, routes)
    model.recompute()
    have, again, less = gradients(model, routes)
    assert all(torch.equal(a, b) for a, b in zip(want, have, strict=True) if a is not None)
    assert len(recorded) == len(again) == config.moe_layers * 2 + (config.mtp_depth if config.experts else 0)
    assert all(torch.equal(a.scores, b.scores) and torch.equal(a.chosen, b.chosen) for a, b in zip(recorded, again))
    assert less < memory / 2
    model.recompute(False)
    assert gradients(model, routes)[2] == memory


# ---------------------------------------------------------------- hidden


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 3, 2], [1, 5, 3], [9]])
def test_cached_equals_uncached(model, chunks):
    x = tokens(2, 9)
    want = model.hidden(x)
    cache, have = model.cache(2, 9), []
    for part in x.split(chunks, dim=1):
        have.append(model.hidden(part, cache=cache))
    torch.testing.assert_close(torch.cat(have, 1), want, **CLOSE)
    assert cache.length.tolist() == [9, 9]


@torch.no_grad()
def test_cached_equals_uncached_for_ragged_chunks(model):
    """Three rows that take 3+2+1+2, 1+4+2+1 and 4+0+3+3 tokens; the padding of a chunk does not matter."""
    takes = torch.tensor([[3, 2, 1, 2], [1, 4, 2, 1], [4, 0, 3, 3]])
    totals = takes.sum(1)
    x = tokens(3, 10)
    want = model.hidden(x, lengths=totals)
    for junk in (0, V - 1):
        cache, done = model.cache(3, 16), torch.zeros(3, dtype=torch.int64)
        for take in takes.T:
            T = int(take.max())
            part = torch.full((3, T), junk)
            for b in range(3):
                part[b, : take[b]] = x[b, done[b] : done[b] + take[b]]
            out = model.hidden(part, lengths=take, cache=cache)
            for b in range(3):
                torch.testing.assert_close(out[b, : take[b]], want[b, done[b] : done[b] + take[b]], **CLOSE)
            done += take
            assert torch.equal(cache.length, done)


@torch.no_grad()
def test_fused_matrices_are_made_once_a_cache_and_only_where_they_are_exact(model, monkeypatch):
    x, made = tokens(3, 9), []
    for module in {type(m) for b in model.blocks for m in (b.attention, b.ffn)}:
        fuse = module.fuse
        monkeypatch.setattr(module, "fuse", lambda self, fuse=fuse: made.append(self) or fuse(self))

    def decoded():
        cache = model.cache(3, 9)
        model.hidden(x[:, :4], cache=cache)
        return torch.cat([model.hidden(x[:, t : t + 1], cache=cache) for t in range(4, 9)], dim=1)

    fused = decoded()
    assert len(made) == len({id(module) for module in made}) == 2 * len(model.blocks)
    monkeypatch.setattr(blocks, "SMALL", 0)
    torch.testing.assert_close(decoded(), fused, rtol=0, atol=2e-5)  # sums in another order
    half, adapted = copy.deepcopy(model).bfloat16(), copy.deepcopy(model)
    monkeypatch.undo()
    add_adapters(adapted, 2, 4.0)
    with torch.enable_grad():
        assert model.blocks[0].fused_matrices(model.cache(3, 9)) == [None, None]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].fused_matrices(model.cache(3, 9)) == [None, None]
    assert half.blocks[0].fused_matrices(half.cache(3, 9)) == [None, None]
    assert adapted.blocks[0].fused_matrices(adapted.cache(3, 9))[0] is None


@torch.no_grad()
def test_a_new_cache_decodes_with_the_weights_of_now(model):
    model, x = copy.deepcopy(model), tokens(2, 6)
    for _ in range(2):
        cache = model.cache(2, 6)
        model.hidden(x[:, :5], cache=cache)
        torch.testing.assert_close(model.hidden(x[:, 5:], cache=cache), model.hidden(x)[:, 5:], **CLOSE)
        for p in model.parameters():
            p *= 1.1


@torch.no_grad()
def test_one_head_and_odd_sizes():
    """A slice of one token begins at an odd number there, which complex numbers cannot."""
    model = build(ModelConfig(vocab=V, dim=20, layers=2, heads=1, kv_lora=13, nope=5, rope=6, v_dim=7, experts=0))
    x, cache = tokens(1, 3), model.cache(1, 3)
    have = torch.cat([model.hidden(x[:, t : t + 1], cache=cache) for t in range(3)], dim=1)
    torch.testing.assert_close(have, model.hidden(x), **CLOSE)


@torch.no_grad()
def test_a_large_head_is_laid_out_for_onednn_and_gives_the_same_logits():
    """fp32 on the CPU: 2^22 numbers and more; the logits of one token, of some, and of none."""
    large = Transformer(dense(vocab=2**16 + 16, dim=64, layers=1, logit_scale=0.5)).eval()
    matrix = large.head_matrix()
    assert matrix.is_mkldnn == torch.backends.mkldnn.is_available() and not MODELS["mla moe"].head_matrix().is_mkldnn
    for shape in ((3, 64), (2, 3, 64), (1, 64), (0, 64)):
        hidden = torch.randn(*shape)
        torch.testing.assert_close(large.logits(hidden, matrix), large.logits(hidden), rtol=0, atol=1e-5)
    assert not large.double().head_matrix().is_mkldnn


@torch.no_grad()
def test_decoding_over_a_cache_that_was_repeated_and_lost_rows(model):
    prompt, lengths, more = tokens(2, 5), torch.tensor([5, 3]), tokens(4, 4, seed=1)
    prompt_cache = model.cache(2, 5)
    model.hidden(prompt, lengths=lengths, cache=prompt_cache)
    cache = prompt_cache.repeat(2, 9)
    model.hidden(more[:, :2], cache=cache)
    keep = [2, 1]
    cache.keep(keep)
    have = model.hidden(more[keep, 2:], cache=cache)
    for out, row in zip(have, keep):
        whole = torch.cat((prompt[row // 2, : lengths[row // 2]], more[row]))
        torch.testing.assert_close(out, model.hidden(whole[None])[0, -2:], **CLOSE)


@torch.no_grad()
def test_causal_by_perturbation(model):
    x = tokens(1, 8)
    want, logp = model.hidden(x), model.logprob(x)
    for t in range(8):
        y = x.clone()
        y[0, t] = (x[0, t] + 1) % V
        have = model.hidden(y)
        torch.testing.assert_close(have[:, :t], want[:, :t], **CLOSE)
        assert ((have - want)[0, t:].abs().amax(-1) > 1e-4).all()  # and all later states change
        torch.testing.assert_close(model.logprob(y)[:, :t], logp[:, :t], **CLOSE)


@torch.no_grad()
def test_padding_changes_no_bit(model):
    """Other tokens at every padding position change no output, load or cache."""
    lengths, x = torch.tensor([3, 7, 1, 5]), tokens(4, 7)
    y = torch.where(real(lengths, 7), x, (x + 1 + tokens(4, 7, seed=1) % (V - 1)) % V)
    assert (x != y).sum() == 4 * 7 - 16
    outputs = []
    for z in (x, y):
        cache, record = model.cache(4, 8), []
        hidden = model.hidden(z, lengths=lengths, cache=cache, record=record)
        logp, entropy = model.logprob(z, lengths=lengths, entropy=True)
        step = model.hidden(tokens(4, 1, seed=2), cache=cache)
        outputs.append([hidden, logp, entropy, step, *cache.layers, *(t for r in record for t in r)])
    for a, b in zip(*outputs):
        assert torch.equal(a, b)
    assert not outputs[0][0][~real(lengths, 7)].any()  # padding gives zeros
    assert not outputs[0][1][~real(lengths, 7)].any() and not outputs[0][2][~real(lengths, 7)].any()


@torch.no_grad()
@pytest.mark.parametrize("widen", [0, 3])
def test_a_row_is_independent_of_the_batch(model, widen):
    lengths, x = torch.tensor([3, 7, 1, 5]), tokens(4, 7 + widen)
    hidden, logp = model.hidden(x, lengths=lengths), model.logprob(x, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(hidden[b, :n], model.hidden(x[b : b + 1, :n])[0], **CLOSE)
        torch.testing.assert_close(logp[b, :n], model.logprob(x[b : b + 1, :n])[0], **CLOSE)


@torch.no_grad()
def test_packed_equals_padded(model):
    lengths, x = torch.tensor([3, 0, 7, 1]), tokens(4, 7)
    cu = torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32)
    inside = real(lengths, 7)
    have = model.hidden(x[inside], cu_seqlens=cu)
    torch.testing.assert_close(have, model.hidden(x, lengths=lengths)[inside], **CLOSE)


@torch.no_grad()
def test_packed_log_probs_are_those_of_padded_rows(model):
    lengths = torch.tensor([5, 1, 9])
    x, inside = tokens(3, 9), real(lengths, 9)
    cu = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    mask = torch.rand(3, 9) < 0.5
    value = ValueHead(model.config.dim).to(model.embedding.weight.dtype)
    more = {"temperature": 0.7, "entropy": True, "value": value}
    want = model.logprob(x, lengths=lengths, mask=mask, **more)
    have = model.logprob(x[inside], cu_seqlens=cu, mask=mask[inside], **more)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b[inside])
    logp = model.logprob(x[inside], cu_seqlens=cu)
    torch.testing.assert_close(logp, model.logprob(x, lengths=lengths)[inside])
    assert logp[0] == logp[5] == logp[6] == 0


def test_full_lengths_are_no_lengths(model):
    x = tokens(2, 6)
    torch.testing.assert_close(model.hidden(x, lengths=torch.tensor([6, 6])), model.hidden(x), **CLOSE)


@torch.no_grad()
def test_explicit_positions(model):
    """Counted from the row's start by default; a common shift changes nothing, another spacing does."""
    x, lengths = tokens(2, 6), torch.tensor([6, 4])
    want = model.hidden(x, lengths=lengths)
    at = torch.arange(6).expand(2, 6)
    assert torch.equal(model.hidden(x, lengths=lengths, positions=at), want)
    torch.testing.assert_close(model.hidden(x, lengths=lengths, positions=at + 50), want, rtol=0, atol=1e-4)
    assert (model.hidden(x, lengths=lengths, positions=at * 3) - want)[:, 2:4].abs().max() > 1e-3
    packed = model.hidden(x[0], cu_seqlens=torch.tensor([0, 6], dtype=torch.int32), positions=at[0] * 3)
    torch.testing.assert_close(packed, model.hidden(x[:1], positions=at[:1] * 3)[0], **CLOSE)
    cache = model.cache(2, 6)
    model.hidden(x[:, :4], positions=at[:, :4] * 3, cache=cache)
    step = model.hidden(x[:, 4:], positions=at[:, 4:] * 3, cache=cache)
    torch.testing.assert_close(step, model.hidden(x, positions=at * 3)[:, 4:], **CLOSE)


def test_positions_of_another_shape_are_refused(model):
    """[1, 1] would give every token one position, [B, 1] both tokens of a decoding step."""
    x, cache = tokens(2, 6), model.cache(2, 8)
    model.hidden(x, cache=cache)
    for row, at in ((x, x[:1, :1]), (x, x[0]), (x[0], x)):
        packed = {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)} if row.ndim == 1 else {}
        with pytest.raises(ValueError, match=r"positions \(.*: expected the tokens' shape"):
            model.hidden(row, positions=at, **packed)
    with pytest.raises(ValueError, match=r"positions \(2, 1\): expected the tokens' shape, \(2, 2\)"):
        model.hidden(x[:, :2], positions=x[:, :1], cache=cache)


@torch.no_grad()
def test_empty_batches(model):
    assert model(tokens(2, 0)).shape == (2, 0, V)
    assert not model.hidden(tokens(2, 3), lengths=torch.tensor([0, 0])).any()
    assert model.logprob(tokens(2, 3), lengths=torch.tensor([0, 0])).tolist() == [[0.0] * 3] * 2


def test_gradients_reach_every_parameter(model):
    model, x = build(model.config), tokens(8, 20)
    for _ in range(60):  # until every expert has tokens
        record = []
        model.hidden(x, record=record)
        for block, routing in zip([b for b in model.blocks if isinstance(b.ffn, MoE)], record):
            balance_step(block.ffn.bias, expert_load(routing), 0.02)
    record = []
    logp, entropy = model.logprob(x, entropy=True, record=record)
    assert all(expert_load(routing).min() > 0 for routing in record)
    (logp.sum() + 0.1 * entropy.sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        parts = p.grad if p.ndim == 3 else [p.grad]  # stacked experts one by one
        assert all(part.any() for part in parts), name
    names = {name for name, _ in model.named_parameters()}
    buffers = {name for name, _ in model.named_buffers()}
    biases = {f"blocks.{i}.ffn.bias" for i in range(3) if model.config.is_moe(i)}
    assert buffers == biases and not names & biases


# ---------------------------------------------------------------- logits and logprob


@torch.no_grad()
def test_logprob_is_the_log_softmax_of_the_logits_before_it(model):
    x, lengths = tokens(3, 7), torch.tensor([7, 2, 5])
    for temperature in (1.0, 0.6, 1.7):
        table = (model(x, lengths=lengths) / temperature).log_softmax(-1)
        logp, entropy = model.logprob(x, lengths=lengths, temperature=temperature, entropy=True)
        want = table[:, :-1].gather(-1, x[:, 1:, None]).squeeze(-1)
        spread = -(table.exp() * table).sum(-1)[:, :-1]
        inside = real(lengths, 7)[:, 1:]
        torch.testing.assert_close(logp[:, 1:], want * inside, **CLOSE)
        torch.testing.assert_close(entropy[:, 1:], spread * inside, **CLOSE)
        assert not logp[:, 0].any() and not entropy[:, 0].any()  # column 0 describes nothing
        assert logp.dtype == torch.float32 and logp.shape == x.shape
        assert torch.equal(model.logprob(x, lengths=lengths, temperature=temperature), logp)


@torch.no_grad()
def test_mask(model):
    """Wanted tokens have the same values, all others zero; column 0 and padding cannot be asked for."""
    x, lengths = tokens(3, 7), torch.tensor([7, 2, 5])
    mask = torch.rand(3, 7) < 0.5
    mask[:, 0] = True
    mask[1, 6] = True
    want, spread = model.logprob(x, lengths=lengths, entropy=True)
    logp, entropy = model.logprob(x, lengths=lengths, mask=mask, entropy=True)
    torch.testing.assert_close(logp, want * mask, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, spread * mask, rtol=0, atol=1e-6)
    assert not model.logprob(x, mask=torch.zeros(3, 7, dtype=torch.bool)).any()


def test_logprob_and_logits_have_the_same_gradient(model):
    x, lengths = tokens(3, 7), torch.tensor([7, 2, 5])
    g = torch.randn(3, 6) * real(lengths, 7)[:, 1:]
    grads = []
    for through in ("logprob", "logits"):
        model.zero_grad()
        if through == "logprob":
            logp = model.logprob(x, lengths=lengths, temperature=0.8)[:, 1:]
        else:
            table = (model(x, lengths=lengths) / 0.8).log_softmax(-1)
            logp = table[:, :-1].gather(-1, x[:, 1:, None]).squeeze(-1)
        (logp * g).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scale_then_cap_then_temperature():
    """z = softcap(logit_scale · h·wᵀ) / temperature, on a hidden state of our choosing."""
    model = MODELS["gqa tied capped"]
    assert model.head.weight is model.embedding.weight
    h = torch.randn(4, 24)
    raw = h @ model.head.weight.T
    torch.testing.assert_close(model.logits(h), 2.0 * torch.tanh(0.6 * raw / 2.0))
    assert model.logits(h * 100).abs().max() <= 2.0
    x = tokens(2, 5)
    z = 2.0 * torch.tanh(0.6 * (model.hidden(x) @ model.head.weight.T) / 2.0) / 0.5
    want = z.log_softmax(-1)[:, :-1].gather(-1, x[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(model.logprob(x, temperature=0.5)[:, 1:], want, **CLOSE)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 99))
@torch.no_grad()
def test_any_lengths_logprob_sums_to_the_likelihood_of_each_row(lengths, seed):
    model, T = MODELS["mla moe"], max(max(lengths), 1)
    x = tokens(len(lengths), T, seed=seed)
    logp = model.logprob(x, lengths=torch.tensor(lengths))
    for row, n, have in zip(x, lengths, logp.sum(1).tolist()):
        table = model(row[None]).log_softmax(-1)[0]
        assert have == pytest.approx(sum(table[t - 1, row[t]].item() for t in range(1, n)), abs=1e-4)


def test_a_uniform_model():
    model = build(dense(**SHAPE))
    model.head.weight.data.zero_()
    logp, entropy = model.logprob(tokens(2, 5), entropy=True)
    torch.testing.assert_close(logp[:, 1:], torch.full((2, 4), -math.log(V)))
    torch.testing.assert_close(entropy[:, 1:], torch.full((2, 4), math.log(V)))


# ---------------------------------------------------------------- routes


@torch.no_grad()
@pytest.mark.parametrize("name", ["mla moe", "mla moe groups q_lora", "gqa moe softmax"])
def test_routes_replace_the_choice_of_the_router(name):
    """Each token and layer has its own, in any position of the grid; routes of padding do not matter."""
    model, x, lengths = MODELS[name], tokens(3, 7), torch.tensor([7, 2, 5])
    torch.manual_seed(0)
    routes = torch.rand(3, 7, model.config.moe_layers, 6).argsort(-1)[..., :2].to(torch.int16)
    inside, record = real(lengths, 7), []
    have = model.logprob(x, lengths=lengths, routes=routes, record=record)
    assert torch.equal(routes_of(record), routes[inside])
    assert torch.equal(model.logprob(x, lengths=lengths, routes=routes.masked_fill(~inside[..., None, None], 99)), have)
    for b, n in enumerate(lengths.tolist()):
        alone = model.logprob(x[b : b + 1, :n], routes=routes[b : b + 1, :n])
        torch.testing.assert_close(have[b, :n], alone[0], **CLOSE)
    free = model.logprob(x, lengths=lengths)
    assert (have - free).abs().max() > 1e-2
    assert torch.equal(model.logprob(x, lengths=lengths, routes=torch.full_like(routes, -1)), free)


@torch.no_grad()
def test_replay_keeps_the_choice_when_the_router_moves():
    model, x, before = build(CONFIGS["mla moe"]), tokens(4, 12), []
    want = model.logprob(x, record=before)
    routes = routes_of(before).view(4, 12, 2, 2)
    torch.testing.assert_close(model.logprob(x, routes=routes), want, rtol=0, atol=1e-6)
    for block in model.blocks[1:]:
        block.ffn.router.weight += 0.1 * torch.randn_like(block.ffn.router.weight)
    free, replayed = [], []
    moved, replay = model.logprob(x, record=free), model.logprob(x, routes=routes, record=replayed)
    assert not rerouted(routes_of(replayed), routes.flatten(0, 1)).any()
    assert 0.02 < rerouted(routes_of(free), routes.flatten(0, 1)).float().mean() < 0.8
    assert not torch.equal(replayed[0].scores, before[0].scores)  # the gates are those of the current router
    assert 0 < (replay - want).abs().mean() < (moved - want).abs().mean()


def test_gradients_reach_the_router_through_replayed_routes():
    """Against differences of the loss, with routes the router would not choose; it runs in fp32 even in fp64."""
    model, x = build(CONFIGS["mla moe"]).double(), tokens(2, 6)
    routes = torch.rand(2, 6, 2, 6).argsort(-1)[..., :2]
    weight = model.blocks[1].ffn.router.weight
    (grad,) = torch.autograd.grad(model.logprob(x, routes=routes).sum(), weight)
    for index in ((0, 3), (4, 7), (5, 0)):
        sums = []
        for step in (5e-3, -5e-3):
            with torch.no_grad():
                weight[index] += step
                sums.append(model.logprob(x, routes=routes).sum().item())
                weight[index] -= step
        assert grad[index].item() == pytest.approx((sums[0] - sums[1]) / 1e-2, rel=2e-3, abs=1e-4)
    assert grad.abs().max() > 0.05


# ---------------------------------------------------------------- the rest


def test_init():
    """Matrices from N(0, init_std²), stacked experts too; norm weights one, biases zero; tied means one tensor."""
    torch.manual_seed(0)
    for config in (ModelConfig(init_std=0.05, q_lora=64), dense(init_std=0.05)):
        for name, p in Transformer(config).named_parameters():
            if p.ndim >= 2:
                error = 6 / (2 * p.numel()) ** 0.5  # six deviations of the deviation of a sample
                assert p.std().item() == pytest.approx(0.05, rel=error), name
                assert abs(p.mean().item()) < 6 * 0.05 / p.numel() ** 0.5, name
            else:
                assert (p == (0 if name.endswith("bias") else 1)).all(), name
    assert not any(b.any() for b in Transformer(ModelConfig()).buffers())
    tied = Transformer(ModelConfig(tied=True))
    assert tied.head.weight is tied.embedding.weight


def test_a_seed_gives_one_model():
    a, b = build(CONFIGS["mla moe"]), build(CONFIGS["mla moe"])
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mla moe", "gqa dense"])
def test_bf16_is_close_and_fp64_is_possible(name):
    x = tokens(2, 6)
    want = MODELS[name].logprob(x)
    half = build(CONFIGS[name]).bfloat16()
    have, cache = half.logprob(x), half.cache(2, 6)
    assert have.dtype == torch.float32 and cache.layers[0].dtype == torch.bfloat16
    assert (have - want).abs().median() < 0.1
    half.hidden(x, cache=cache)
    twice = build(CONFIGS[name]).double()
    torch.testing.assert_close(twice.logprob(x).float(), want, rtol=0, atol=1e-4)


CU = torch.tensor([0, 5], dtype=torch.int32)
BAD = {
    "tokens has shape (5,), expected [B, T]": lambda m: m.hidden(tokens(5)),
    "tokens has shape (1, 2, 3), expected [B, T]": lambda m: m.hidden(tokens(1, 2, 3)),
    "lengths has shape (3,), expected (2,)": lambda m: m.hidden(tokens(2, 4), lengths=torch.ones(3)),
    "lengths must lie in 0 to 4, got [1, 5]": lambda m: m.hidden(tokens(2, 4), lengths=torch.tensor([1, 5])),
    "cu_seqlens must rise from 0 to 4, got [0, 5]": lambda m: m.hidden(tokens(4), cu_seqlens=CU),
    "tokens (1, 5), mask None: expected [N] both with cu_seqlens": lambda m: m.logprob(tokens(1, 5), cu_seqlens=CU),
    "without lengths or routes": lambda m: m.logprob(tokens(5), cu_seqlens=CU, lengths=torch.tensor([5])),
    "cu_seqlens goes with packed": lambda m: m.hidden(tokens(1, 5), cu_seqlens=CU),
    "without lengths or cache": lambda m: m.hidden(tokens(5), cu_seqlens=CU, cache=m.cache(1, 9)),
    "5 tokens do not fit into a cache of 4 slots": lambda m: m.hidden(tokens(1, 5), cache=m.cache(1, 4)),
    "3 + 2 tokens do not fit into a cache of 4 slots": lambda m: overfull(m),
    "expected [B, T] both": lambda m: m.logprob(tokens(2, 4), mask=torch.ones(4, dtype=torch.bool)),
    "tokens (4,)": lambda m: m.logprob(tokens(4)),
    "temperature=0: must be above 0": lambda m: m.logprob(tokens(2, 4), temperature=0),
    "routes (2, 4, 3, 2): expected (2, 4, 2, 2)": lambda m: m.logprob(tokens(2, 4), routes=torch.zeros(2, 4, 3, 2)),
    "expected 2 of the experts 0 to 5": lambda m: m.logprob(tokens(1, 1), routes=torch.tensor([[[[0, 1], [2, 6]]]])),
    "or -1 alone": lambda m: m.logprob(tokens(1, 1), routes=torch.tensor([[[[0, 1], [2, -1]]]])),
    "a dense model has none": lambda m: MODELS["gqa dense"].logprob(tokens(1, 1), routes=torch.zeros(1, 1, 3, 2)),
}


def overfull(model):
    cache = model.cache(1, 4)
    model.hidden(tokens(1, 3), cache=cache)
    model.hidden(tokens(1, 2), cache=cache)


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError) as error:
        BAD[message](MODELS["mla moe"])
    assert message in str(error.value)

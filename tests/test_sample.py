"""sample.py: a row is independent of the batch, and its tokens have the reported distribution."""

import copy
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from minir1 import sample
from minir1.model.cache import Cache
from minir1.model.config import ModelConfig, dense
from minir1.model.moe import routes_of
from minir1.model.transformer import Transformer
from minir1.rollout import collect
from minir1.sample import (
    BUDGET,
    EOS,
    STOP,
    bucket,
    choose,
    draw,
    generate,
    rows_to_keep,
    stream,
    truncate,
    uniform,
)
from minir1.speculative import speculate

V = 48
SHAPE = {"vocab": V, "dim": 32, "layers": 2, "heads": 4, "init_std": 0.25}
MOE = {"kv_lora": 16, "nope": 8, "rope": 8, "v_dim": 12, "ffn": 48, "experts": 4, "expert_ffn": 16}
PROMPTS = [[3, 1, 4], [15, 9, 2, 6, 5, 35, 8], [9], [7, 9, 3, 2, 3]]
STOPS = [5, 11, 40, 17, 29]  # a tenth of the vocabulary, so that rows end at all times
LAST = 1 - 2.0**-53  # the largest noise there is


def build(kind: str) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(**SHAPE, **MOE) if kind == "mla+moe" else dense(**SHAPE, kv_heads=2, ffn=48)
    return Transformer(config).eval()


@pytest.fixture(scope="module", params=["mla+moe", "gqa dense"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def small():
    return build("gqa dense")


def same(a, b, **tolerance):
    """Two results row by row, whatever the width of their grids."""
    assert torch.equal(a.count, b.count) and torch.equal(a.stop, b.stop)
    for row, n in enumerate(a.count.tolist()):
        assert a.tokens[row, :n].tolist() == b.tokens[row, :n].tolist()
        torch.testing.assert_close(a.logp[row, :n], b.logp[row, :n], **tolerance)
        torch.testing.assert_close(a.entropy[row, :n], b.entropy[row, :n], **tolerance)


CLOSE = {"atol": 1e-5, "rtol": 0.0}


def test_a_row_is_independent_of_the_batch(model):
    settings = {"max_tokens": 24, "stop": STOPS, "seed": 3, "temperature": 1.3}
    whole = generate(model, PROMPTS, answers=4, **settings)
    assert len(set(whole.count.tolist())) >= 6 and whole.count.min() < 8 and whole.count.max() == 24

    def rows(which):
        return type(whole)(*(getattr(whole, name)[which] for name in ("tokens", "logp", "entropy", "count", "stop")))

    for row in range(16):
        alone = generate(model, [PROMPTS[row // 4]], rows=torch.tensor([row]), **settings)
        same(alone, rows([row]), **CLOSE)
    order = [13, 2, 7, 5, 8]  # other neighbours in another order
    mixed = generate(model, [PROMPTS[row // 4] for row in order], rows=torch.tensor(order), **settings)
    same(mixed, rows(order), **CLOSE)
    assert whole.tokens[0].tolist() != whole.tokens[1].tolist()  # the rows of a prompt differ


@pytest.fixture(scope="module")
def routed():
    """Two of three layers route their tokens to two of eight experts."""
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SHAPE | {"layers": 3}, **MOE | {"experts": 8})).eval()


@torch.no_grad()
@pytest.mark.parametrize("check_every, chunk", [(1, 3), (8, 2048), (50, 5)])
def test_recorded_routes_are_those_of_each_row_alone(routed, check_every, chunk, monkeypatch):
    """For any dropping and any chunks; the last token of an answer, which never enters the model, has -1."""
    monkeypatch.setattr("minir1.sample.PREFILL_CHUNK", chunk)
    settings = {"answers": 4, "max_tokens": 24, "stop": STOPS, "seed": 3, "temperature": 1.3}
    sampled = generate(routed, PROMPTS, record_routes=True, check_every=check_every, **settings)
    assert sampled.routes.shape == (16, 7 + 24, 2, 2) and sampled.routes.dtype == torch.int16
    assert sampled.count.min() < 8 and sampled.count.max() == 24
    for row, n in enumerate(sampled.count.tolist()):
        prompt, record = PROMPTS[row // 4], []
        routed.hidden(torch.tensor([prompt + sampled.tokens[row, : n - 1].tolist()]), record=record)
        known = len(prompt) + n - 1
        assert torch.equal(sampled.routes[row, :known].sort(-1).values, routes_of(record).sort(-1).values)
        assert (sampled.routes[row, known:] == -1).all()
    plain = generate(routed, PROMPTS, check_every=check_every, **settings)
    assert plain.routes is None and torch.equal(plain.tokens, sampled.tokens)
    assert torch.equal(plain.logp, sampled.logp) and torch.equal(plain.entropy, sampled.entropy)


def test_one_token_leaves_the_routes_of_the_prompts(routed):
    sampled = generate(routed, PROMPTS, max_tokens=1, record_routes=True)
    known = (sampled.routes >= 0).all(-1).all(-1)
    assert known.tolist() == [[column < len(prompt) for column in range(8)] for prompt in PROMPTS]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_and_entropy_are_those_of_the_model(model, temperature):
    sampled = generate(model, PROMPTS, answers=3, max_tokens=16, stop=STOPS, seed=5, temperature=temperature)
    for row, n in enumerate(sampled.count.tolist()):
        prompt = PROMPTS[row // 3]
        tokens = torch.tensor([prompt + sampled.tokens[row, :n].tolist()])
        with torch.no_grad():
            logp, entropy = model.logprob(tokens, temperature=temperature, entropy=True)
        torch.testing.assert_close(sampled.logp[row, :n], logp[0, len(prompt) :], **CLOSE)
        torch.testing.assert_close(sampled.entropy[row, :n], entropy[0, len(prompt) :], **CLOSE)
        for values in (sampled.tokens, sampled.logp, sampled.entropy):
            assert not values[row, n:].any()
    assert sampled.tokens.shape == sampled.logp.shape == (12, sampled.count.max())


def truncated(logits: list[float], top_k: int, top_p: float) -> dict[int, float]:
    """The reference: token -> probability after truncation, in plain Python."""
    best = sorted(range(len(logits)), key=lambda v: -logits[v])[: top_k or None]
    weight = {v: math.exp(logits[v]) for v in best}
    nucleus, mass = [], 0.0
    for v in best:
        if mass >= top_p * sum(weight.values()):
            break
        nucleus.append(v)
        mass += weight[v]
    return {v: weight[v] / mass for v in nucleus}


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (3, 1.0), (0, 0.6), (0, 1e-9), (5, 0.7), (100, 0.9)])
def test_truncation_against_a_plain_reference(top_k, top_p):
    logits = 2 * torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(50)
    tokens, logp, entropy = draw(truncate(logits, top_k, top_p), uniform(0, rows, rows))
    probs = truncate(logits, top_k, top_p).softmax(-1)
    for row in range(50):
        want = truncated(logits[row].double().tolist(), top_k, top_p)
        assert set(probs[row].nonzero().flatten().tolist()) == set(want)
        token = tokens[row].item()
        assert logp[row].item() == pytest.approx(math.log(want[token]), abs=1e-5)
        assert entropy[row].item() == pytest.approx(-sum(p * math.log(p) for p in want.values()), abs=1e-5)


def test_truncation_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert truncate(torch.zeros(1, 2), top_p=0.5).isfinite().tolist() == [[True, False]]  # a half is enough
    assert truncate(logits, top_p=0.49).isfinite().tolist() == [[True, False, False, False]]
    assert truncate(logits, top_p=0.51).isfinite().tolist() == [[True, True, False, False]]
    assert truncate(logits, top_k=2).isfinite().tolist() == [[True, True, False, False]]
    assert truncate(logits[:, [2, 0, 1, 3]], top_k=2, top_p=0.6).isfinite().tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    "probs, top_p, kept",
    [
        ([0.5, 0.3, 0.1, 0.1], 0.8, 2),
        ([0.5, 0.3, 0.1, 0.1], 0.80001, 3),
        ([0.5, 0.3, 0.1, 0.1], 0.79999, 2),
        ([0.1] * 10, 0.6, 6),
        ([0.1] * 10, 0.60001, 7),
        ([0.1] * 10, 0.3, 3),
        ([0.05] * 20, 0.95, 19),
        ([0.7, 0.2, 0.1], 0.9, 2),
        ([0.4, 0.4, 0.2], 0.4, 1),
        ([0.9, 0.1], 5e-324, 1),  # the best stays, whatever p is
        ([1e-5] * 1000 + [0.99], 0.99, 1),
        ([1e-5] * 1000 + [0.99], 0.992, 201),
    ],
)
def test_the_nucleus_reaches_p_up_to_rounding(probs, top_p, kept):
    """Sums such as .5 + .3 are not exact in fp32: no token may follow only because of that."""
    exact = torch.tensor([probs], dtype=torch.float64).log()
    for logits in (exact, exact.float(), exact.float() + 4.0):
        assert truncate(logits, top_p=top_p).isfinite().sum() == kept


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.floats(1e-6, 1.0, exclude_max=True), st.data())
def test_the_nucleus_is_the_smallest_set(weights, top_p, data):
    weights = torch.tensor(sorted(weights, reverse=True), dtype=torch.float64)
    p = weights / weights.sum()
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(len(p)))
    kept = truncate(p[order].log().float().unsqueeze(0), top_p=top_p).isfinite()[0]
    mass = p[order][kept].sum().item()
    assert mass >= top_p * (1 - 3e-6) and mass - p[order][kept].min().item() < top_p
    k = data.draw(st.integers(1, len(p)))  # and where p is the mass of k tokens, these are k
    share = p[:k].sum().item()
    if share < 1:
        assert truncate(p.log().float().unsqueeze(0), top_p=share).isfinite().sum() == k


def test_generation_reports_the_truncated_distribution(small):
    sampled = generate(small, PROMPTS, answers=2, max_tokens=8, temperature=1.5, top_k=6, top_p=0.8, seed=1)
    for row in range(8):
        prompt = PROMPTS[row // 2]
        tokens = prompt + sampled.tokens[row].tolist()
        with torch.no_grad():
            logits = (small(torch.tensor([tokens]))[0] / 1.5).double().tolist()
        for step, token in enumerate(tokens[len(prompt) :]):
            want = truncated(logits[len(prompt) + step - 1], 6, 0.8)
            assert sampled.logp[row, step].item() == pytest.approx(math.log(want[token]), abs=1e-5)


def test_min_tokens_excludes_stops_from_the_distribution(small):
    stops = list(range(0, V, 2))
    sampled = generate(small, PROMPTS, answers=8, max_tokens=12, min_tokens=5, stop=stops, seed=2)
    assert (sampled.tokens[:, :5] % 2 == 1).all()
    assert sampled.count.min() == 6  # a stop may be the token after them
    with torch.no_grad():
        logits = small(torch.tensor([PROMPTS[2]]))[0, -1]
    want = logits[1::2].log_softmax(-1)
    for row in range(16, 24):
        token = sampled.tokens[row, 0].item()
        assert sampled.logp[row, 0].item() == pytest.approx(want[token // 2].item(), abs=1e-5)


def test_stop_codes(model):
    sampled = generate(model, PROMPTS, answers=12, max_tokens=20, stop=STOPS, seed=7, temperature=1.2)
    assert set(sampled.stop.tolist()) == {EOS, STOP, BUDGET}
    for tokens, n, why, logp in zip(*(x.tolist() for x in (sampled.tokens, sampled.count, sampled.stop, sampled.logp))):
        assert not set(tokens[: n - 1]) & set(STOPS)  # it stops at the first
        if why == BUDGET:
            assert n == 20 and tokens[n - 1] not in STOPS
        else:  # the stop token is counted, and has a log-prob
            assert (tokens[n - 1] == STOPS[0]) == (why == EOS) and tokens[n - 1] in STOPS
            assert logp[n - 1] < 0
        assert all(value < 0 for value in logp[:n])
    assert (sampled.count[sampled.stop == EOS] < 20).any()


def test_a_stop_token_at_the_end_of_the_budget_is_no_budget_stop(small):
    settings = {"stop": STOPS, "seed": 3, "temperature": 1.3}
    long = generate(small, PROMPTS, answers=4, max_tokens=24, **settings)
    row = int(((long.count > 1) & (long.count < 24)).nonzero()[0])
    n = int(long.count[row])
    short = generate(small, PROMPTS, answers=4, max_tokens=n, **settings)
    assert short.count[row] == n and short.stop[row] == long.stop[row] != BUDGET
    one_less = generate(small, PROMPTS, answers=4, max_tokens=n - 1, **settings)
    assert one_less.count[row] == n - 1 and one_less.stop[row] == BUDGET
    assert one_less.tokens[row].tolist() == long.tokens[row, : n - 1].tolist()


def test_one_stop_token_may_be_given_as_a_number(small):
    settings = {"answers": 4, "max_tokens": 16, "seed": 3, "temperature": 1.3}
    same(generate(small, PROMPTS, stop=5, **settings), generate(small, PROMPTS, stop=[5], **settings))
    assert set(generate(small, PROMPTS, **settings).stop.tolist()) == {BUDGET}  # no stop token, no stop


def test_greedy_is_the_argmax_loop(model):
    sampled = generate(model, PROMPTS, max_tokens=12, temperature=0, seed=9)
    for row, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for step in range(12):
            with torch.no_grad():
                logp = model(torch.tensor([tokens]))[0, -1].log_softmax(-1)
            tokens.append(logp.argmax().item())
            assert sampled.logp[row, step].item() == pytest.approx(logp.max().item(), abs=1e-5)
            assert sampled.entropy[row, step].item() == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-5)
        assert sampled.tokens[row].tolist() == tokens[len(prompt) :]
    again = generate(model, PROMPTS, max_tokens=12, temperature=0, seed=10)
    assert torch.equal(again.tokens, sampled.tokens)


# ---- the noise


def splitmix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_uniform_is_splitmix_in_64_bits():
    golden = 0x9E3779B97F4A7C15
    for seed, row, position in [(0, 0, 0), (1, 2, 3), (987654321, 100_000, 4095), (2**40, 2**33, 7)]:
        key = splitmix((seed + 1) * 0x9E3779B9 % 2**63)
        bits = splitmix((splitmix((splitmix((key + row * golden) % 2**64) + position) % 2**64) + golden) % 2**64)
        assert uniform(seed, torch.tensor(row), torch.tensor(position)).item() == (bits >> 11) / 2**53


def test_uniform_is_uniform_and_neighbours_are_unrelated():
    rows, positions = torch.arange(500).unsqueeze(1), torch.arange(400)
    grid = uniform(0, rows, positions)
    n = grid.numel()
    assert grid.shape == (500, 400) and grid.dtype == torch.float64
    assert 0 <= grid.min() and grid.max() < 1 and grid.unique().numel() == n
    assert grid.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / n))
    assert grid.var().item() == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / n))
    counts = (grid * 100).long().flatten().bincount()
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 148  # χ² with 99 degrees of freedom, 99.9 %
    pairs = {
        "rows": (grid[1:], grid[:-1]),
        "positions": (grid[:, 1:], grid[:, :-1]),
        "diagonal": (grid[1:, :-1], grid[:-1, 1:]),  # row + position is the same
        "seeds": (grid, uniform(1, rows, positions)),
        "steps of a run": (uniform(1_000_003, rows, positions), uniform(1_000_004, rows, positions)),
    }
    for name, (a, b) in pairs.items():
        both = torch.stack((a.flatten(), b.flatten())).corrcoef()[0, 1].item()
        assert abs(both) < 4 / math.sqrt(a.numel()), name


def test_drawn_frequencies_fit_the_distribution():
    inf = float("inf")
    logits = torch.tensor([-inf, 1.0, -1.0, 2.0, -inf, -inf, 0.0, 0.5, -2.5, 1.5, -inf])
    n = 40_000
    tokens, logp, entropy = draw(logits.expand(n, -1), uniform(11, torch.arange(n), torch.tensor(7)))
    p = logits.softmax(-1)
    counts = tokens.bincount(minlength=len(p))
    assert not counts[p == 0].any()
    expected = n * p[p > 0]
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 22.5  # 6 degrees of freedom, 99.9 %
    torch.testing.assert_close(logp, p.log()[tokens])
    assert entropy[0].item() == pytest.approx(-(p[p > 0] * p[p > 0].log()).sum().item(), abs=1e-6)


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log()
    noise = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, LAST], dtype=torch.float64)
    assert draw(logits.expand(6, -1), noise)[0].tolist() == [0, 0, 2, 2, 3, 3]
    rare = torch.tensor([[0.0, math.log(1e-9)]])  # below what fp32 can add to 1
    assert draw(rare, torch.tensor([1 - 5e-10], dtype=torch.float64))[0].item() == 1


def test_tokens_of_probability_zero_are_never_drawn():
    generator = torch.Generator().manual_seed(0)
    for size in (2, 7, 4096):
        logits = 8 * torch.randn(200, size, generator=generator)
        closed = torch.rand(200, size, generator=generator) < 0.6
        closed[:100, 0] = closed[100:, -1] = True  # at either end too
        row = torch.arange(200)
        closed[row, torch.randint(1, size, (200,), generator=generator) - (row >= 100).long()] = False
        logits.masked_fill_(closed, float("-inf"))
        for noise in (0.0, 2.0**-53, 0.5, LAST):
            tokens, logp, _ = draw(logits, torch.full((200,), noise, dtype=torch.float64))
            assert logits.gather(1, tokens.unsqueeze(1)).isfinite().all() and logp.isfinite().all()
    only = torch.full((1, 5), float("-inf"))
    only[0, 3] = -90.0
    assert [draw(only, torch.tensor([u], dtype=torch.float64))[0].item() for u in (0.0, LAST)] == [3, 3]
    assert choose(only, torch.zeros(1, dtype=torch.float64), 0, 0, 1.0)[2].item() == 0  # and its entropy is 0


# ---- the batch


def test_bucket():
    sizes = [1, 2, 3, 4, 6, 6, 8, 8, *[12] * 4, *[16] * 4, *[24] * 8, 32]
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [bucket(n, gpu) for n in range(1, 26)] == sizes
    assert bucket(1025, gpu) == 1536 and bucket(1025, cpu) == 1025


def test_only_rows_at_the_end_move():
    """Of seven rows 1, 3 and 4 have ended: 6 and 5 take the places of 1 and 3."""
    ended = torch.tensor([0, 1, 0, 1, 1, 0, 0]).bool()
    assert rows_to_keep(ended) == [0, 6, 2, 5]
    assert rows_to_keep(torch.tensor([1, 0, 1]).bool()) == [1] and rows_to_keep(ended[1:2]) == []


def test_rows_fill_a_bucket(monkeypatch):
    """Five of eight rows run: a batch of six keeps one that has ended."""
    monkeypatch.setattr(sample, "bucket", lambda running, device: 6)
    assert rows_to_keep(torch.tensor([0, 1, 1, 0, 0, 1, 0, 0]).bool()) == [0, 7, 6, 3, 4, 5]
    assert rows_to_keep(torch.tensor([0, 0, 1, 0, 0]).bool()) == [0, 1, 2, 3, 4]  # the bucket exceeds the batch


def test_dropping_finished_rows_changes_nothing(model, monkeypatch):
    sizes, keep = [], Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda cache, rows: sizes.append(len(rows)) or keep(cache, rows))
    settings = {"answers": 5, "max_tokens": 30, "stop": STOPS, "seed": 4}
    never = generate(model, PROMPTS, check_every=1000, **settings)
    assert sizes == []
    always = generate(model, PROMPTS, check_every=1, **settings)
    assert len(sizes) >= 4 and sizes == sorted(set(sizes), reverse=True)
    same(always, never, **CLOSE)
    assert always.tokens.shape == never.tokens.shape == (20, never.count.max())
    settings |= {"max_tokens": 13, "min_tokens": 9, "record_routes": model.config.moe_layers > 0}  # not multiples of 8
    parts = [generate(model, PROMPTS, check_every=n, **settings) for n in (1, 3, 8, 100)]
    for part in parts[1:]:
        same(part, parts[0], **CLOSE)
        assert torch.equal(part.stop, parts[0].stop) and torch.equal(part.count, parts[0].count)
        assert part.routes is None or torch.equal(part.routes, parts[0].routes)


def test_it_ends_when_every_row_has(small, monkeypatch):
    calls, hidden = [], Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda *args, **kw: calls.append(1) or hidden(*args, **kw))
    sampled = generate(small, PROMPTS, max_tokens=64, stop=list(range(V)), check_every=8)
    assert len(calls) == 7  # steps after the prefill, not sixty-three
    assert sampled.count.tolist() == [1] * 4 and sampled.tokens.shape == (4, 1)


class Waits(TorchDispatchMode):
    """Counts the operators for which the host waits for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_to_copy", "is_nonzero", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        moved = name == "_to_copy" and "device" in (kwargs or {})
        if name in self.WAITING and (name != "_to_copy" or moved):
            self.calls[name] += 1
        if name == "index":  # by a mask, which is counted first
            self.calls["mask"] += any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


def test_the_decode_step_does_not_wait_for_the_device(model, monkeypatch):
    record, lists, tolist = model.config.moe_layers > 0, [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(1) or tolist(self))

    def waits(max_tokens, check_every):
        settings = {"min_tokens": 64, "stop": 5, "check_every": check_every, "record_routes": record}
        with Waits() as mode:
            generate(model, PROMPTS, answers=2, max_tokens=max_tokens, **settings)
        return mode.calls

    few, many = waits(4, 100), waits(24, 100)
    assert few == many  # twenty more steps do not wait once
    assert 1 <= many["_local_scalar_dense"] <= 4 and lists == []  # two of the prefill and two at the end
    assert waits(24, 8) == many and len(lists) == 2  # after steps 8 and 16


class Upcasts(TorchDispatchMode):
    """Counts copies of a matrix [V, D] in another dtype."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_to_copy" and args[0].shape == (V, SHAPE["dim"])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["mla+moe", "gqa dense"])
def test_the_head_of_a_bf16_model_is_upcast_once_per_call(kind):
    """And its logits are products of its weights in fp32, not rounded to bf16."""
    model = build(kind).bfloat16()
    for call in (lambda: generate(model, PROMPTS, max_tokens=9), lambda: [*stream(model, PROMPTS[0], max_tokens=9)]):
        with Upcasts() as mode:
            call()
        assert mode.count == 1
    hidden = torch.randn(3, SHAPE["dim"]).bfloat16()
    want = hidden.float() @ model.head.weight.float().T
    assert torch.equal(model.logits(hidden, model.head_matrix()), want) and torch.equal(model.logits(hidden), want)
    full = build(kind)
    assert full.head_matrix().data_ptr() == full.head.weight.data_ptr()  # an fp32 model's is no copy


def test_fp64_models_are_sampled_in_fp64(model):
    exact = copy.deepcopy(model).double()
    sampled = generate(exact, PROMPTS, max_tokens=6, seed=3)
    assert sampled.logp.dtype == sampled.entropy.dtype == torch.float64
    tokens = torch.tensor([PROMPTS[1] + sampled.tokens[1].tolist()])
    with torch.no_grad():
        logp = exact.logprob(tokens)[0, len(PROMPTS[1]) :]
    torch.testing.assert_close(sampled.logp[1], logp, atol=1e-6, rtol=0)  # the router runs in fp32
    assert list(stream(exact, PROMPTS[0], max_tokens=6, seed=3)) == sampled.tokens[0].tolist()
    rollout = collect(exact, PROMPTS, answers=1, max_tokens=6, stop=(), seed=3, top_p=0.9, top_k=7)
    assert rollout.logp.dtype == rollout.entropy.dtype == torch.float64 and rollout.logp.isfinite().all()


def test_stream_is_the_first_row(model):
    for settings in ({}, {"temperature": 0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_tokens": 3}):
        for seed in range(3):
            settings = {"max_tokens": 16, "stop": STOPS, "seed": seed} | settings
            whole = generate(model, PROMPTS[:1], **settings)
            assert list(stream(model, PROMPTS[0], **settings)) == whole.tokens[0, : whole.count[0]].tolist()
    assert len(list(stream(model, PROMPTS[1], max_tokens=7))) == 7


# ---- logits without a distribution


def poisoned(model: Transformer, call: int, row: int, value: float, monkeypatch) -> None:
    """The logits of one call of the model: of this row one token, or with -inf all tokens, get the value."""
    logits, calls = Transformer.logits, []

    def wrong(self, *args):
        z = logits(self, *args)
        if len(calls) == call:
            z[row, slice(None) if value == -math.inf else 7] = value
        calls.append(call)
        return z

    monkeypatch.setattr(Transformer, "logits", wrong)


RULES = [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.9, "temperature": 0.7}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_without_a_distribution_are_an_error_that_names_the_row(small, value, rule, monkeypatch):
    poisoned(small, 3, 5, value, monkeypatch)
    with pytest.raises(ValueError, match="row 5, an answer to prompt 1: the logits of its token 3 hold NaN"):
        generate(small, PROMPTS, answers=3, max_tokens=12, **rule)
    poisoned(small, 2, 0, value, monkeypatch)
    drawn = stream(small, PROMPTS[0], max_tokens=12, **rule)
    assert len([next(drawn), next(drawn)]) == 2
    with pytest.raises(ValueError, match="row 0, an answer to prompt 0: the logits of its token 2"):
        next(drawn)


def test_some_logits_of_minus_infinity_are_legal(small, monkeypatch):
    logits = Transformer.logits
    closed = torch.arange(V) % 3 > 0
    monkeypatch.setattr(Transformer, "logits", lambda *args: logits(*args).masked_fill(closed, -math.inf))
    for rule in RULES:
        sampled = generate(small, PROMPTS, answers=3, max_tokens=12, **rule)
        assert not (sampled.tokens % 3).any() and sampled.logp.isfinite().all() and sampled.entropy.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_of_nan_end_at_the_next_check(drafting, temperature, monkeypatch):
    """Not after the whole budget; and no answer of NaN is ever returned."""
    broken, calls, hidden = copy.deepcopy(drafting), [], Transformer.hidden
    with torch.no_grad():
        broken.blocks[1].ffn.up.weight[3, 4] = math.nan
    monkeypatch.setattr(Transformer, "hidden", lambda *args, **kw: calls.append(1) or hidden(*args, **kw))
    settings = {"max_tokens": 500, "temperature": temperature}
    for sampler in (generate, speculate):
        calls.clear()
        with pytest.raises(ValueError, match="row 0, an answer to prompt 0: the logits of its token 0 hold NaN"):
            sampler(broken, PROMPTS, answers=2, check_every=4, **settings)
        assert len(calls) <= 5
    with pytest.raises(ValueError, match="row 0, .* token 0 hold NaN"):
        collect(broken, PROMPTS, answers=2, stop=(), seed=0, **settings)
    with pytest.raises(ValueError, match="row 0, .* token 0 hold NaN"):
        next(stream(broken, PROMPTS[0], **settings))


def test_draw_has_no_log_prob_without_a_distribution():
    logits = torch.zeros(5, 4)
    logits[1, 2], logits[2, 0], logits[3], logits[4, 1] = math.nan, math.inf, -math.inf, -math.inf
    for rule in ((1.0, 0, 1.0), (0, 0, 1.0), (0.5, 2, 0.9)):
        assert choose(logits, torch.full((5,), 0.3, dtype=torch.float64), *rule)[1].isnan().tolist() == [
            False,
            True,
            True,
            True,
            False,
        ]


# ---- arguments


@pytest.fixture(scope="module")
def drafting():
    """With an MTP module, for `speculate`."""
    torch.manual_seed(0)
    return Transformer(dense(**SHAPE, kv_heads=2, ffn=48, mtp_depth=1)).eval()


WRONG = [
    ({"prompts": []}, "prompts"),
    ({"prompts": [[1], []]}, "prompts"),
    ({"prompts": [[1, V]]}, f"^token {V}: "),
    ({"prompts": [[-1]]}, "^token -1"),
    ({"prompts": [[1.5]]}, "^token 1.5"),
    ({"stop": V}, f"^token {V}: "),
    ({"stop": [3, -1]}, "^token -1"),
    ({"answers": 0}, "answers = 0: an integer of at least 1"),
    ({"answers": -2}, "answers = -2"),
    ({"answers": 1.0}, "answers = 1.0"),
    ({"max_tokens": 0}, "max_tokens = 0: an integer of at least 1"),
    ({"max_tokens": -3}, "max_tokens = -3"),
    ({"max_tokens": True}, "max_tokens = True"),
    ({"min_tokens": -1}, "min_tokens = -1: an integer of at least 0"),
    ({"min_tokens": 1, "stop": list(range(V))}, f"min_tokens = 1: must be 0 where all {V} tokens .* are stops"),
    ({"temperature": -0.1}, "temperature = -0.1: 0"),
    ({"temperature": math.nan}, "temperature = nan"),
    ({"temperature": math.inf}, "temperature = inf"),
    ({"temperature": 1e-40}, "temperature = 1e-40: 0 .greedy., or finite and at least 1e-6"),
    ({"temperature": 5e-324}, "temperature = 5e-324"),
    ({"top_k": -1}, "top_k = -1: an integer of at least 0"),
    ({"top_k": True}, "top_k = True"),
    ({"top_k": 2.5}, "top_k = 2.5"),
    ({"top_p": 0.0}, "top_p = 0.0: above 0, at most 1"),
    ({"top_p": -0.5}, "top_p = -0.5"),
    ({"top_p": 1.1}, "top_p = 1.1"),
    ({"top_p": math.nan}, "top_p = nan"),
    ({"seed": -1}, "seed = -1: an integer of at least 0, below 2.63"),
    ({"seed": 2**63}, f"seed = {2**63}"),
    ({"seed": 0.5}, "seed = 0.5"),
    ({"check_every": 0}, "check_every = 0: an integer of at least 1"),
    ({"check_every": -8}, "check_every = -8"),
    ({"rows": torch.arange(3)}, r"rows torch.int64 \(3,\): must be int64 \[1\]"),
    ({"rows": torch.zeros(1)}, r"rows torch.float32 \(1,\): must be int64 \[1\]"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_wrong_input_is_refused_wherever_sampling_begins(drafting, change, message):
    settings = {"prompts": [[1, 2]], "max_tokens": 4} | change
    for sampler in (generate, speculate):
        with pytest.raises(ValueError, match=message):
            sampler(drafting, **settings)
    if "check_every" not in change:
        with pytest.raises(ValueError, match=message):
            collect(drafting, **{"answers": 1, "stop": (), "seed": 0} | settings)
    if set(change).isdisjoint({"answers", "rows", "check_every"}) and len(settings["prompts"]) == 1:
        with pytest.raises(ValueError, match=message):
            next(stream(drafting, settings.pop("prompts")[0], **settings))


def test_a_dense_model_has_no_routes(small):
    with pytest.raises(ValueError, match="a dense model has no routes"):
        generate(small, PROMPTS, max_tokens=4, record_routes=True)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6, 1e300])
def test_extreme_temperatures_that_are_allowed(drafting, temperature):
    for sampled in (f(drafting, PROMPTS, max_tokens=9, temperature=temperature) for f in (generate, speculate)):
        sampled = sampled[0] if isinstance(sampled, tuple) else sampled
        assert sampled.logp.isfinite().all() and sampled.entropy.isfinite().all()
        if temperature == 1e-6:
            assert torch.equal(sampled.tokens, generate(drafting, PROMPTS, max_tokens=9, temperature=0).tokens)
        if temperature > 1:
            torch.testing.assert_close(sampled.entropy, torch.full((4, 9), math.log(V)), atol=1e-4, rtol=0)


def test_the_largest_seed(small):
    a, b = (generate(small, PROMPTS, max_tokens=9, seed=seed).tokens for seed in (0, 2**63 - 1))
    assert not torch.equal(a, b)

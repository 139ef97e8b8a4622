"""engine.py: every answer is that of its request alone, whoever joins, leaves, is cancelled or fails beside it."""

import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.engine import BUDGET, CANCELLED, EOS, STOP, Engine, Full, Request, choose_each, most_likely
from minir1.model.config import ModelConfig, dense
from minir1.model.transformer import Transformer
from minir1.sample import choose, generate, truncate, uniform

V = 48
SHAPE = {"vocab": V, "dim": 32, "layers": 2, "heads": 4, "init_std": 0.25}
MOE = {"kv_lora": 16, "nope": 8, "rope": 8, "v_dim": 12, "ffn": 48, "experts": 4, "expert_ffn": 16}
STOPS = (5, 11, 40)


def build(kind: str, dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(**SHAPE, **MOE) if kind == "mla+moe" else dense(**SHAPE, kv_heads=2, ffn=48)
    return Transformer(config).to(dtype).eval()


@pytest.fixture(scope="module", params=["mla+moe", "gqa dense"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def small():
    return build("gqa dense")


def requests_of(count: int, seed: int = 0) -> list[Request]:
    """Different prompts, budgets and settings; a few prompts occur twice."""
    rng = random.Random(seed)
    ways = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (1.0, 9, 0.6), (2.0, 100, 0.99), (0.0, 3, 0.5)]
    prompts = [[rng.randrange(V) for _ in range(rng.randint(1, 12))] for _ in range(count)]
    return [
        Request(prompts[number // 2 * 2 if number % 8 < 2 else number], rng.randint(1, 24), *rng.choice(ways), STOPS,
                rng.randrange(2**63), rng.choice([0, 0, 3]), rng.choice([0, 0, 5]))
        for number in range(count)
    ]  # fmt: skip


def alone(model, request: Request):
    """(tokens, log-probs, why) of `sample.generate` for this request by itself."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "stop", "seed")
    rows = torch.tensor([request.row])
    sampled = generate(model, [request.prompt], rows=rows, **{name: getattr(request, name) for name in names})
    return sampled.tokens[0].tolist(), sampled.logp[0].tolist(), int(sampled.stop[0])


def read(answer):
    tokens = list(answer)
    return [token.id for token in tokens], [token.logp for token in tokens], answer.why


def check(model, request, answer):
    tokens, logp, why = read(answer)
    expected = alone(model, request)
    assert tokens == expected[0] and why == expected[2]
    assert logp == pytest.approx(expected[1], abs=1e-6)  # RoPE and router are fp32


# ---- the same answers in every batch -----------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 7])
def test_64_requests_together_are_each_alone(model, rows):
    asked = requests_of(64)
    with Engine(model, rows=rows, slots=40) as engine:
        answers = [engine.submit(request) for request in asked]
        for request, answer in zip(asked, answers):
            check(model, request, answer)
        assert {answer.why for answer in answers} == {EOS, STOP, BUDGET} and engine.load() == (0, 0)


def test_requests_that_come_and_go_at_any_time(model):
    """Some at once, some while others run, some cancelled: the others do not notice."""
    asked, rng = requests_of(60, seed=1), random.Random(2)
    with Engine(model, rows=5, slots=40) as engine:
        answers, cancelled = [], set()
        for number, request in enumerate(asked):
            answers.append(engine.submit(request))
            if rng.random() < 0.3:
                cancelled.add(number)
                if rng.random() < 0.5:
                    next(iter(answers[-1]))
                answers[-1].cancel()
            time.sleep(rng.choice([0, 0, 0.003]))
        for number, (request, answer) in enumerate(zip(asked, answers)):
            if number not in cancelled:
                check(model, request, answer)
            else:
                assert set(read(answer)[0]) <= set(alone(model, request)[0]) and answer.why is not None


def test_the_answers_of_a_prompt_are_the_rows_of_generate(model):
    """row: several answers to one prompt with one seed."""
    prompt, settings_ = [3, 1, 4, 1, 5], {"max_tokens": 20, "temperature": 1.2, "stop": STOPS, "seed": 9}
    whole = generate(model, [prompt], answers=6, **settings_)
    with Engine(model, rows=4, slots=30) as engine:
        answers = [engine.submit(Request(prompt, **settings_, row=row)) for row in range(6)]
        for row, answer in enumerate(answers):
            assert read(answer)[0] == whole.tokens[row, : whole.count[row]].tolist()


def test_fp32_differs_from_the_request_alone_by_rounding_only():
    """Log-probs agree to the rounding of fp32; a token may differ only where a draw is that close (here none is)."""
    model = build("mla+moe", torch.float32)
    asked = requests_of(48, seed=3)
    with Engine(model, rows=48, slots=40) as engine:
        for request, answer in zip(asked, [engine.submit(request) for request in asked]):
            tokens, logp, why = read(answer)
            expected = alone(model, request)
            assert tokens == expected[0] and why == expected[2] and logp == pytest.approx(expected[1], abs=1e-5)


def test_a_prompt_that_is_asked_several_times_is_prefilled_once(small, monkeypatch):
    sizes, prefill = [], Transformer.prefill

    def counted(self, grid, **others):
        sizes.append(tuple(grid.shape))
        return prefill(self, grid, **others)

    monkeypatch.setattr(Transformer, "prefill", counted)
    engine = Engine(small, rows=8, slots=12)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [1, 2, 3], [9] * 9, [1, 2, 3]]
    answers = queued(engine, [Request(prompt, 3, seed=n) for n, prompt in enumerate(prompts)])
    with engine:
        tokens = [read(answer)[0] for answer in answers]
    assert sizes == [(2, 5), (1, 9)]  # a cache for a prefill is never larger than one row
    assert tokens == [alone(small, answer.request)[0] for answer in answers]


def queued(engine: Engine, requests: list[Request]) -> list:
    """The answers of requests that are all there when the engine opens."""
    engine._open = True
    return [engine.submit(request) for request in requests]


def test_a_step_computes_the_running_rows_alone(small, monkeypatch):
    steps, hidden = [], Transformer.hidden

    def counted(self, new, cache):
        steps.append((len(new), cache.used))
        return hidden(self, new, cache=cache)

    monkeypatch.setattr(Transformer, "hidden", counted)
    engine = Engine(small, rows=64, slots=40)
    answers = queued(engine, [Request([1, 2], 3), Request([1, 2, 3], 2), Request([7], 5)])
    with engine:
        assert [read(answer)[2] for answer in answers] == [BUDGET] * 3
    assert steps == [(3, 3), (2, 3), (1, 3), (1, 4)]  # rows, and the cache's longest


def test_unused_rows_fill_a_batch_on_cuda(model, monkeypatch):
    """They change nothing, also when a row ends beside them and another takes its place."""
    monkeypatch.setattr("minir1.engine.bucket", lambda running, device: -(-running // 4) * 4)
    asked = requests_of(30, seed=6)
    with Engine(model, rows=10, slots=40) as engine:
        for request, answer in zip(asked, [engine.submit(request) for request in asked]):
            check(model, request, answer)


# ---- the end -----------------------------------------------------------------------------------


def test_cancel_frees_the_row_within_a_step(small):
    with Engine(small, rows=1, slots=4096) as engine:
        first, second = engine.submit(Request([1], 4000)), engine.submit(Request([2], 5, seed=4))
        stream = iter(first)
        next(stream), next(stream)
        first.cancel()
        check(small, second.request, second)
        assert first.why == CANCELLED and len(list(stream)) < 1000 and list(first) == []


def test_a_request_that_waits_can_be_cancelled(small):
    with Engine(small, rows=1, slots=4096) as engine:
        running, waiting = engine.submit(Request([1], 4000)), engine.submit(Request([2], 5))
        next(iter(running))
        waiting.cancel()
        assert list(waiting) == [] and waiting.why == CANCELLED and running.why is None
        running.cancel()


def test_full(small):
    with Engine(small, rows=1, slots=4096, waiting=2) as engine:
        running = engine.submit(Request([1], 4000))
        next(iter(running))
        waiting = [engine.submit(Request([2], 2, seed=seed)) for seed in range(2)]
        with pytest.raises(Full, match="^2 requests wait already$"):
            engine.submit(Request([3], 2))
        assert engine.load() == (1, 2)
        running.cancel()
        assert [len(list(answer)) for answer in waiting] == [2, 2]
        engine.submit(Request([3], 2))


def test_as_many_requests_as_there_are_rows_and_turns(small):
    """Before the engine takes the first of them from the queue."""
    engine = Engine(small, rows=2, slots=40, waiting=3)
    answers = queued(engine, [Request([1], 2)] * 5)
    with pytest.raises(Full):
        engine.submit(Request([1], 2))
    with engine:
        assert [len(list(answer)) for answer in answers] == [2] * 5


def test_an_error_in_the_loop_is_raised_in_every_answer(small, monkeypatch):
    def broken(*_, **__):
        raise MemoryError("no memory left")

    engine = Engine(small, rows=2, slots=40)
    answers = queued(engine, [Request([1, n], 30) for n in range(4)])
    monkeypatch.setattr(Transformer, "hidden", broken)
    with engine:
        for answer in answers:
            with pytest.raises(MemoryError, match="no memory left"):
                list(answer)
            assert answer.why is None
        with pytest.raises(MemoryError):
            answers[0].arrived()
        with pytest.raises(RuntimeError, match="the engine has failed: no memory left"):
            engine.submit(Request([1], 3))


def test_an_error_in_a_prefill_is_raised_in_its_answers_alone(small, monkeypatch):
    prefill = Transformer.prefill

    def broken(self, grid, **others):
        if grid.shape[1] > 20:
            raise MemoryError("no memory left")
        return prefill(self, grid, **others)

    monkeypatch.setattr(Transformer, "prefill", broken)
    asked = [Request([1, 2], 30), Request([3] * 25, 9), Request([3] * 25, 9), Request([4, 5], 9, seed=1)]
    engine = Engine(small, rows=4, slots=40)
    answers = queued(engine, asked)
    with engine:
        for answer in answers[1:3]:
            with pytest.raises(MemoryError, match="no memory left"):
                list(answer)
        check(small, asked[0], answers[0])
        check(small, asked[3], answers[3])
        check(small, asked[0], engine.submit(asked[0]))
        assert engine.error is None


def test_the_rows_that_run_draw_between_two_prefills(small, monkeypatch):
    """Also cancel is looked at there, and a request that does not fit into one prefill comes before newer ones."""
    calls, prefill, hidden = [], Transformer.prefill, Transformer.hidden

    def prefilled(self, grid, **others):
        calls.append(tuple(grid.shape))
        if len(calls) == 1:
            answers[4].cancel()
        return prefill(self, grid, **others)

    def step(self, new, cache):
        calls.append(len(new))
        return hidden(self, new, cache=cache)

    engine = Engine(small, rows=8, slots=12)
    answers = queued(engine, [Request([n] * count, 2) for n, count in enumerate([3, 9, 4, 10, 8])])
    monkeypatch.setattr(Transformer, "prefill", prefilled)
    monkeypatch.setattr(Transformer, "hidden", step)
    with engine:
        tokens = [read(answer)[0] for answer in answers]
    assert calls == [(2, 4), 2, (1, 9), 1, (1, 10), 1] and tokens[4] == [] and answers[4].why == CANCELLED
    monkeypatch.undo()
    assert tokens[:4] == [alone(small, answer.request)[0] for answer in answers[:4]]


def test_logits_that_are_nan_end_the_answer_alone(small, monkeypatch):
    logits, calls = Transformer.logits, iter(range(100))

    def damaged(self, hidden, matrix):
        z = logits(self, hidden, matrix)
        if len(z) == 2 and next(calls) == 3:
            z[1, 7] = float("nan")
        return z

    asked = [Request([1, 2], 12), Request([3, 4], 12, seed=1)]
    expected = alone(small, asked[0])[0]
    monkeypatch.setattr(Transformer, "logits", damaged)
    engine = Engine(small, rows=2, slots=40)
    answers = queued(engine, asked)
    with engine:
        with pytest.raises(ValueError, match=r"the logits of token 3 hold NaN or \+inf, or only -inf"):
            list(answers[1])
        assert read(answers[0])[0] == expected


def test_closing_ends_what_runs_and_what_waits(small):
    with Engine(small, rows=1, slots=4096) as engine:
        answers = [engine.submit(Request([1], 4000)), engine.submit(Request([2], 5))]
        next(iter(answers[0]))
    assert [read(answer)[2] for answer in answers] == [CANCELLED, CANCELLED]
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(Request([1], 3))
    with engine:  # and it opens again
        assert len(list(engine.submit(Request([1], 3)))) == 3


def test_a_cache_that_does_not_fit_names_what_to_lower(small):
    most = 2**31 - 1
    said = f"^a cache of {most} rows of {most} tokens: lower --rows, or the tokens of a row"
    with pytest.raises(MemoryError, match=said):
        Engine(small, rows=most, slots=most)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": []}, "prompts: need at least one"),
        ({"prompt": [V]}, "^token 48: the model's vocabulary is 0 to 47"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"max_tokens": 38}, "3 tokens of the prompt and max_tokens = 38 do not fit into the 40 tokens of a row"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"stop": (99,)}, "^token 99: "), ({"prompt": [3, -1]}, "^token -1: "), ({"prompt": [0.5]}, "^token 0.5: "),
        ({"seed": -1}, "seed = -1"),
        ({"top_logprobs": 49}, "top_logprobs = 49: an integer, 0 to 48"),
        ({"row": -1}, "row = -1"),
    ],
)
def test_senseless_requests_are_refused(small, changes, message):
    with Engine(small, rows=2, slots=40) as engine:
        with pytest.raises(ValueError, match=message):
            engine.submit(Request([1, 2, 3], 5)._replace(**changes))


@pytest.mark.parametrize("name", ["rows", "slots", "waiting"])
def test_sizes_are_checked(small, name):
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"^{name} = {value}: an integer of at least 1, below 2.31$"):
            Engine(small, **{name: value})
    assert Engine(small, rows=1).slots == small.config.max_positions


def test_many_threads_ask_at_once(small):
    """Each reads its own answer; the wake function is called for every token."""
    asked, results, woken = requests_of(24, seed=5), {}, [0] * 24

    def ask(number: int) -> None:
        def wake():
            woken[number] += 1

        answer = engine.submit(asked[number], wake)
        results[number] = read(answer)

    with Engine(small, rows=6, slots=40) as engine:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, request in enumerate(asked):
        expected = alone(small, request)
        assert results[number][0] == expected[0] and results[number][2] == expected[2]
        assert woken[number] == len(expected[0])


def test_what_has_arrived_is_read_without_waiting(small):
    arrival = threading.Event()
    with Engine(small, rows=1, slots=40) as engine:
        answer = engine.submit(Request([1, 2], 9, seed=3), arrival.set)
        tokens, last = [], False
        while not last:
            assert arrival.wait(10)
            arrival.clear()
            new, last = answer.arrived()
            tokens += new
        assert [token.id for token in tokens] == alone(small, answer.request)[0]
        assert answer.arrived() == ([], True) and list(answer) == []


# ---- drawing -----------------------------------------------------------------------------------

WAYS = st.tuples(st.sampled_from([0.0, 0.3, 1.0, 1.7, 1e-6, 1e300]), st.sampled_from([0, 1, 3, 20, 99]),
                 st.sampled_from([1.0, 0.9, 0.5, 1e-9]))  # fmt: skip


@settings(deadline=None)
@given(st.lists(WAYS, min_size=1, max_size=9), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_rows_of_different_settings_are_drawn_as_each_alone(ways, seed, dtype):
    """To the bit, with equal logits among them, so that the k-th best is one of several."""
    logits = torch.randn(len(ways), 20, generator=torch.Generator().manual_seed(seed), dtype=dtype).mul(4).round() / 2
    noise = uniform(seed, torch.arange(len(ways)), torch.tensor(7))
    tokens, logp, z = choose_each(logits.clone(), noise, ways)
    for row, way in enumerate(ways):
        one = slice(row, row + 1)
        expected, expected_logp, _ = choose(logits[one], noise[one], *way)
        assert tokens[row] == expected and logp[row] == expected_logp
        drawn_from = truncate(logits[one] / way[0], *way[1:]) if way[0] else logits[one]
        assert torch.equal(z[one], drawn_from)


def test_the_most_likely_tokens():
    z = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0, 0.5, 0.0, 0.5]]).log()
    first, second = most_likely(z, [2, 3])
    assert [token for token, _ in first] == [0, 1] and [token for token, _ in second] == [1, 3]  # the others are out
    assert [logp for _, logp in first] == pytest.approx([-0.6931472, -1.3862944])
    assert most_likely(z, [0, 0]) == [[], []] and len(most_likely(z, [0, 4])[1]) == 2


def test_top_logprobs_are_those_of_the_distribution_drawn_from(small):
    with Engine(small, rows=2, slots=40) as engine:
        answers = [engine.submit(Request([1, 2, 3], 6, 0.8, 4, top_logprobs=k, seed=2)) for k in (9, 2)]
        wide, narrow = (list(answer) for answer in answers)
    text = [1, 2, 3]
    for token, few in zip(wide, narrow):
        with torch.no_grad():
            logp = truncate(small(torch.tensor([text]))[:, -1] / 0.8, 4).log_softmax(-1)[0]
        values, best = logp.topk(4)
        assert [number for number, _ in token.top] == best.tolist() and few.top == token.top[:2]
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-9)
        assert dict(token.top)[token.id] == pytest.approx(token.logp, abs=1e-12)
        text.append(token.id)

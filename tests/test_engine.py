"""engine.py: every answer is that of its request alone, whoever joins, leaves, is cancelled or fails beside it."""

import random
import time

import pytest
import torch
from engine_requests import STOPS, alone, build, check, queued, read, requests_of
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.engine import BUDGET, EOS, STOP, Engine, Request, choose_each, most_likely
from minir1.model.transformer import Transformer
from minir1.sample import choose, generate, truncate, uniform


@pytest.fixture(scope="module", params=["mla+moe", "gqa dense"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def small():
    return build("gqa dense")


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
        for top in (token.top, few.top):  # the two rows of a batch are not computed equal to the last bit
            assert [number for number, _ in top] == best[: len(top)].tolist()
            assert [value for _, value in top] == pytest.approx(values[: len(top)].tolist(), abs=1e-9)
        assert (len(token.top), len(few.top)) == (4, 2)
        assert dict(token.top)[token.id] == pytest.approx(token.logp, abs=1e-12)
        text.append(token.id)

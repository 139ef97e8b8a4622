"""engine.py: how answers and the engine end: cancelled, failed, full, closed; what is refused."""

import threading

import pytest
from engine_requests import V, alone, build, check, queued, read, requests_of

from minir1.engine import CANCELLED, Engine, Full, Request
from minir1.model.transformer import Transformer


@pytest.fixture(scope="module")
def small():
    return build("gqa dense")


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

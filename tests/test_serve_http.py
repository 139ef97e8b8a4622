"""serve_http.py: limits, clients who leave, and the end."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
import httpx  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from served import PROMPT, Running, answers_of, wait_for  # noqa: E402

from experiments import serve_api  # noqa: E402
from experiments.benchmarks import serving  # noqa: E402
from minir1.engine import CANCELLED  # noqa: E402
from minir1.model.transformer import Transformer  # noqa: E402


@pytest.fixture
def slow_steps(monkeypatch):
    hidden = Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda *args, **more: time.sleep(0.05) or hidden(*args, **more))


@pytest.fixture
def talking(endless, monkeypatch):
    """One row, one request that may wait, and answers that never end; `answers` are the engine's."""
    running = Running(endless, rows=1, waiting=1, slots=100_000, grace=0.3)
    running.answers, submit = [], running.engine.submit

    def recorded(*asked):
        running.answers.append(submit(*asked))
        return running.answers[-1]

    monkeypatch.setattr(running.engine, "submit", recorded)
    yield running
    running.stop()


def test_a_full_queue_is_429(talking):
    streams = [talking.complete(max_tokens=90_000, stream=True) for _ in range(2)]
    next(iter(streams[0]))
    assert talking.engine.load() == (1, 1)
    with pytest.raises(openai.RateLimitError) as caught:
        talking.complete(max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded" and caught.value.response.headers["Retry-After"] == "1"
    streams[1].close()
    assert wait_for(lambda: talking.engine.load() == (1, 0))
    with pytest.raises(openai.RateLimitError):
        talking.complete(max_tokens=2, n=2)  # one of them fits, but not both
    assert wait_for(lambda: talking.engine.load() == (1, 0))  # so none is left
    streams[0].close()
    assert talking.idle() and len(talking.complete(max_tokens=2, n=2).choices) == 2


def test_more_answers_than_the_server_ever_takes_are_400(server):
    """Not 429, after which a client tries again; and at once, however many there are."""
    for prompts, n in ((["a"] * 81, 1), (["a"], 81), ([[1]] * 100_000, 128)):
        status, error = server.error(prompt=prompts, n=n)
        assert (status, error["param"]) == (400, "n") and "this server takes at most 80." in error["message"]
    assert len(server.complete("a", n=80, max_tokens=1).choices) == 80


def test_an_answer_that_takes_too_long_is_503(endless, slow_steps):
    impatient = Running(endless, rows=1, waiting=1, timeout=0.3)
    try:
        with pytest.raises(openai.InternalServerError, match="No answer within 0.3 seconds") as caught:
            impatient.complete(max_tokens=400, seed=5)
        assert caught.value.status_code == 503 and caught.value.code == "timeout" and impatient.idle()
        with pytest.raises(openai.APIError, match="No answer within 0.3 seconds"):
            list(impatient.complete(max_tokens=400, seed=5, stream=True))
        assert impatient.idle()
    finally:
        impatient.stop()


def test_a_client_who_leaves_frees_its_row(talking):
    stream = talking.complete(max_tokens=90_000, stream=True)
    next(iter(stream))
    assert talking.engine.load() == (1, 0)
    stream.close()
    assert talking.idle() and [answer.why for answer in talking.answers] == [CANCELLED]
    with pytest.raises(httpx.ReadTimeout):  # an answer that is not streamed
        body = {"model": "toy", "prompt": PROMPT, "max_tokens": 90_000}
        httpx.post(f"{talking.url}/v1/completions", json=body, timeout=0.3)
    assert talking.idle() and [answer.why for answer in talking.answers] == [CANCELLED] * 2


def test_a_client_who_leaves_while_waiting_gives_up_its_turn(talking):
    stream = talking.complete(max_tokens=90_000, stream=True)
    next(iter(stream))
    body = {"model": "toy", "prompt": PROMPT, "max_tokens": 90_000, "stream": True}
    with httpx.stream("POST", f"{talking.url}/v1/completions", json=body, timeout=5):
        assert wait_for(lambda: talking.engine.load() == (1, 1))
    assert wait_for(lambda: talking.engine.load() == (1, 0))
    assert [answer.why for answer in talking.answers] == [None, CANCELLED]
    stream.close()


def test_stopping_ends_the_answers_that_run(talking):
    """As errors in OpenAI's shape, whether streamed or not, when they have had their time."""
    stream = iter(talking.complete(max_tokens=90_000, stream=True))
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(talking.complete, max_tokens=90_000)
        assert wait_for(lambda: talking.engine.load() == (1, 1))
        talking.server.should_exit, began = True, time.monotonic()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the server is shutting down") as caught:
            whole.result()
    assert caught.value.status_code == 503 and caught.value.code == "shutting_down"
    assert 0.3 < time.monotonic() - began < 5
    talking.thread.join(5)
    assert not talking.thread.is_alive() and talking.engine.load() == (0, 0)


def test_a_name_of_another_machine_is_refused(server):
    """Of a page elsewhere whose name resolves to this machine (DNS rebinding)."""
    for host, status in (("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:1", 200), ("evil.example", 400)):
        reply = server.http.get("/v1/models", headers={"Host": host})
        assert reply.status_code == status and ("error" in reply.json()) == (status == 400)
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["code"] == "invalid_host"
    assert error["message"].startswith("The server is not called 'evil.example': it answers to localhost, 127.0.0.1")
    open_to_all = TestClient(serve_api.create(server.service, "0.0.0.0"), base_url="http://example.org")
    assert open_to_all.get("/v1/models").status_code == 200


def test_a_long_body_is_413(server):
    """In chunks when it has become too long, else before it is read."""
    long = b"[" + b"1," * serve_api.MOST_BYTES
    for content in (long, iter([long])):
        status, error = server.error(content=content)
        assert status == 413 and error["message"] == "The body of the request has more than 8388608 bytes."
    status, head = raw(server, f"Content-Length: {serve_api.MOST_BYTES + 1}")
    assert status == 413 and b"connection: close" in head.lower()


def test_a_body_that_does_not_arrive_is_408(endless, monkeypatch):
    monkeypatch.setattr(serve_api, "MOST_SECONDS", 0.2)
    running = Running(endless, rows=1, waiting=1)
    try:
        for start in (b"", b"{"):
            status, head = raw(running, "Content-Length: 9", start)
            assert status == 408 and b"connection: close" in head.lower() and b'"error":{"message"' in head
        time.sleep(0.3)
        stream = running.complete(max_tokens=400, seed=5, stream=True)  # whose answer may take longer
        assert len(list(stream)) > 100
    finally:
        running.stop()


def raw(server, headers: str, start: bytes = b"") -> tuple[int, bytes]:
    """The status, and all that the server sends until it closes, after a request whose body does not end."""
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as connection:
        lines = "POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", headers, "", ""
        connection.sendall("\r\n".join(lines).encode() + start)
        said = b""
        while part := connection.recv(2**16):
            said += part
    return int(said.split()[1]), said


def test_connections_stay_open_for_longer_than_clients_keep_them(server):
    """Else a request may be sent while the server closes."""
    assert server.server.config.timeout_keep_alive > 2 * httpx.Limits().keepalive_expiry


def test_random_disconnects_lose_and_mix_nothing(server):
    rng = random.Random(0)
    prompts = [f"User:make {20 + i} from {i + 1},3\nAssistant:" for i in range(8)]
    expected = [answers_of(server, prompt, seed=i)[0] for i, prompt in enumerate(prompts)]

    def ask(job: tuple[int, int | None]) -> tuple[str, str | None]:
        which, leave = job
        stream, text, finish = server.complete(prompts[which], seed=which, max_tokens=48, stream=True), "", None
        for number, chunk in enumerate(stream):
            if number == leave:
                stream.close()
                break
            text, finish = text + chunk.choices[0].text, chunk.choices[0].finish_reason
        return text, finish

    jobs = [(rng.randrange(8), rng.choice([None, rng.randrange(12)])) for _ in range(48)]
    with ThreadPoolExecutor(24) as pool:
        for (which, leave), (text, finish) in zip(jobs, pool.map(ask, jobs)):
            assert expected[which].startswith(text)
            assert leave is not None or (text == expected[which] and finish is not None)
    assert server.idle()


def test_a_failing_engine_is_reported(endless, monkeypatch):
    running = Running(endless, rows=2, waiting=2)
    hidden, broken = Transformer.hidden, threading.Event()

    def fails(*args, **more):
        if broken.is_set():
            raise MemoryError("no memory left")
        return hidden(*args, **more)

    monkeypatch.setattr(Transformer, "hidden", fails)
    try:
        stream = iter(running.complete(max_tokens=400, seed=3, stream=True))
        next(stream)
        broken.set()
        with pytest.raises(openai.APIError, match="The server failed: MemoryError: no memory left"):
            list(stream)
        running.thread.join(5)  # it does not live on without an engine
        assert not running.thread.is_alive()
    finally:
        running.stop()


def test_the_load_test(server):
    """At toy size, with this server; its figures are those of the page."""
    config = serving.Config(Path("x"), clients=4, rounds=2, requests=12, max_completion_length=24, repeats=1)
    prompts = [server.tokenizer.encode(f"User:make {20 + i} from {i + 1},3\nAssistant:") for i in range(4)]
    bodies = [{"model": "toy", "prompt": prompt, "seed": i, "max_tokens": 24} for i, prompt in enumerate(prompts)]
    figures = serving.with_server(int(server.url.rpartition(":")[2]), bodies, config)
    assert figures["equal"] == figures["answers"] == 8 and figures["one/tok_s"] > 0 and figures["many/first_ms"] > 0
    assert 0 <= figures["leaving/left"] <= 12 and figures["leaving/stayed_equal"] == figures["leaving/stayed"] > 0
    assert figures["leaving/begun_equal"] == 12 - figures["leaving/stayed"]
    assert figures["leaving/running"] == figures["leaving/waiting"] == 0
    others = {f"{way}/{how}/tok_s": 7.0 for way in ("engine", "generate", "transformers") for how in ("one", "many")}
    page = serving.page(figures | others | {"clients": 4})
    assert "| transformers | 7 | 7 | 1.0 |" in page and "Of 8 answers to 4 clients at once 8 are equal" in page

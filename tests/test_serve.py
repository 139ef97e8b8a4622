"""serve.py: the server over HTTP, asked by the official client, with a toy model."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
import httpx  # noqa: E402
import uvicorn  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from talker import saved  # noqa: E402
from test_four_bit import CONFIGS, plain, quantised  # noqa: E402

from experiments import serve, serve_api, serve_body, serve_http  # noqa: E402
from experiments.benchmarks import serving  # noqa: E402
from minir1 import checkpoint, conversation  # noqa: E402
from minir1.engine import CANCELLED, Engine, Request  # noqa: E402
from minir1.model import hf  # noqa: E402
from minir1.model.packed_linear import packed_layers  # noqa: E402
from minir1.model.transformer import Transformer  # noqa: E402
from minir1.sample import generate  # noqa: E402

ROOT = Path(__file__).parent.parent
ASKED = [{"role": "user", "content": "make 24 from 11,3,3"}]
JSON = {"Content-Type": "application/json"}


class Running:
    """A server in a thread: its model, and clients for it."""

    seed = 0  # of an answer with thinking

    def __init__(self, folder: Path, rows: int, waiting: int, slots: int = 512, grace: float = 5.0, **limits):
        self.model, self.tokenizer = hf.load(folder)
        self.model.double()
        self.engine = Engine(self.model, rows, slots, waiting)
        self.service = serve_api.Service(self.engine, self.tokenizer, "toy", **limits)
        self.socket = serve.listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = serve_api.create(self.service, "127.0.0.1")
        self.server = serve_http.server(app, self.engine, grace, log_level="critical")
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def stop(self):
        self.server.should_exit = True
        self.thread.join()
        self.client.close()
        self.http.close()

    def chat(self, messages=ASKED, **settings):
        return self.client.chat.completions.create(model="toy", messages=messages, **settings)

    def complete(self, prompt="User:make 24 from 11,3,3\nAssistant:", **settings):
        return self.client.completions.create(model="toy", prompt=prompt, **settings)

    def error(self, path="/v1/completions", content=None, **body):
        """Status and error of a request, whose shape is OpenAI's."""
        content = json.dumps({"model": "toy", "prompt": "a", "max_tokens": 2} | body) if content is None else content
        reply = self.http.post(path, content=content, headers=JSON)
        (error,) = reply.json().values()
        assert error.keys() == {"message", "type", "param", "code"} and reply.json().keys() == {"error"}
        return reply.status_code, error

    def idle(self):
        """Wait until no row is taken; fails after a while."""
        for _ in range(200):
            if self.engine.load() == (0, 0):
                return True
            time.sleep(0.02)
        return False


@pytest.fixture(scope="module")
def folder(toy_base):
    return checkpoint.resolve(toy_base("moe"))


@pytest.fixture(scope="module")
def server(folder):
    running = Running(folder, rows=16, waiting=64, max_tokens=48)
    running.seed = next(seed for seed in range(99) if thinks(answers_of(running, PROMPT, seed=seed)[0]))
    yield running
    running.stop()


@pytest.fixture
def narrow(folder):
    """One row, and one request that may wait."""
    running = Running(folder, rows=1, waiting=1)
    yield running
    running.stop()


def thinks(text: str) -> bool:
    """Whether an answer has thinking, and an end."""
    return text.startswith("<think>") and text.find("</think>") > 12 and text.endswith("</answer>")


def answers_of(server, prompt: str, count: int = 1, **ways) -> list[str]:
    """The whole texts that `sample.generate` gives, without the end token."""
    sampled = generate(
        server.model, [server.tokenizer.encode(prompt)], answers=count, stop=server.tokenizer.stops,
        **{"max_tokens": 48, "seed": server.seed, **ways},
    )  # fmt: skip
    rows = [row[:n] for row, n in zip(sampled.tokens.tolist(), sampled.count.tolist())]
    return [server.tokenizer.decode([t for t in row if t not in server.tokenizer.stops]) for row in rows]


PROMPT = "User:make 24 from 11,3,3\nAssistant:"


# ---- answers -----------------------------------------------------------------------------------


def test_a_chat_is_what_generate_samples_with_its_thinking_apart(server):
    reply = server.chat(seed=server.seed)
    (text,) = answers_of(server, PROMPT)
    message = reply.choices[0].message
    assert text.startswith("<think>") and "</think>" in text
    assert f"<think>{message.reasoning_content}</think>{message.content}" == text
    assert reply.choices[0].finish_reason == "stop" and message.role == "assistant"
    tokens = len(server.tokenizer.encode(text)) + 1  # the end token
    thinking = len(server.tokenizer.encode(text.partition("</think>")[0])) + 1
    assert reply.usage.prompt_tokens == len(server.tokenizer.encode(PROMPT)) and reply.model == "toy"
    assert reply.usage.completion_tokens == tokens and reply.usage.total_tokens == reply.usage.prompt_tokens + tokens
    assert reply.usage.completion_tokens_details.reasoning_tokens == thinking


def test_a_streamed_chat_is_the_same(server):
    whole = server.chat(seed=server.seed).choices[0]
    chunks = list(server.chat(seed=server.seed, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    without = list(server.chat(seed=server.seed, stream=True, stream_options={"include_obfuscation": False}))
    assert without and not any("usage" in chunk.model_fields_set for chunk in without)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(chunks) - 1) and len(chunks) > 5
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == whole.message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == whole.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.id for chunk in chunks} == {last.id} and {chunk.object for chunk in chunks} == {last.object}
    assert last.choices == [] and last.usage.completion_tokens > 5 and last.object == "chat.completion.chunk"
    assert deltas[0].content or getattr(deltas[0], "reasoning_content", "")  # no empty first chunk


def test_a_completion_is_the_text_as_it_is(server):
    reply = server.complete(seed=server.seed, max_tokens=48)
    assert reply.choices[0].text == answers_of(server, PROMPT)[0] and reply.object == "text_completion"
    chunks = list(server.complete(seed=server.seed, max_tokens=48, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text
    assert chunks[-1].choices[0].finish_reason == reply.choices[0].finish_reason == "stop"


def test_several_answers_are_the_rows_of_generate(server):
    expected = answers_of(server, PROMPT, 4)
    assert len(set(expected)) > 1
    reply = server.complete(seed=server.seed, n=4, max_tokens=48)
    assert [choice.text for choice in reply.choices] == expected
    texts = [""] * 4
    for chunk in server.complete(seed=server.seed, n=4, max_tokens=48, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    second = "User:make 10 from 5,1\nAssistant:"
    tokens = server.tokenizer.encode(second)
    reply = server.complete([tokens, server.tokenizer.encode(PROMPT)], seed=server.seed, n=2, max_tokens=48)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices[:2]] == answers_of(server, second, 2)
    assert server.complete(tokens, seed=server.seed, max_tokens=48).choices[0].text == answers_of(server, second)[0]


def test_seeds(server):
    texts = [server.complete(max_tokens=48, seed=seed).choices[0].text for seed in (1, 1, -1, 2**63 - 1)]
    assert texts[0] == texts[1] and texts[2] == texts[3]  # modulo 2^63
    assert len({server.complete(max_tokens=48).choices[0].text for _ in range(4)}) > 1  # none: another each time
    greedy = {server.complete(max_tokens=48, temperature=0).choices[0].text for _ in range(2)}
    assert greedy == {answers_of(server, PROMPT, temperature=0)[0]}


def test_recommended_settings_are_those_of_generation_config(server, monkeypatch):
    """As in the chat; the fields of a request come before them."""
    sampled = lambda **ways: server.complete(seed=5, max_tokens=48, n=4, **ways).choices
    texts = lambda **ways: [choice.text for choice in sampled(**ways)]
    plain, narrow = texts(), texts(temperature=0.5, top_p=0.3)
    assert plain == texts(temperature=1, top_p=1) != narrow
    monkeypatch.setattr(server.tokenizer, "generation", {"temperature": 0.5, "top_p": 0.3})
    assert texts() == narrow and texts(temperature=1, top_p=1) == plain
    monkeypatch.setattr(server.tokenizer, "generation", {"temperature": 0.5, "top_p": 0.3, "do_sample": False})
    assert texts() == plain
    assert set(texts(top_p=0)) == set(texts(temperature=0))  # both: the most likely token


def test_many_at_once_are_each_alone(server):
    """More than there are rows, with settings of their own."""
    ways = [{"seed": i, "temperature": t, "top_p": p, "max_tokens": 8 + i} for i, (t, p) in
            enumerate([(1.0, 1.0), (0.0, 1.0), (0.7, 0.9), (1.5, 0.5)] * 10)]  # fmt: skip
    prompts = [f"User:make {20 + i} from {i + 1},3\nAssistant:" for i in range(40)]
    with ThreadPoolExecutor(40) as pool:
        texts = list(pool.map(lambda one: server.complete(one[0], **one[1]).choices[0].text, zip(prompts, ways)))
    assert texts == [answers_of(server, prompt, **way)[0] for prompt, way in zip(prompts, ways)]


# ---- the end of an answer ----------------------------------------------------------------------


def test_length(server):
    reply = server.chat(seed=server.seed, max_tokens=5).choices[0]
    assert reply.finish_reason == "length" and reply.message.content == "" and reply.message.reasoning_content
    assert server.chat(seed=server.seed, max_completion_tokens=5).usage.completion_tokens == 5
    assert server.chat(seed=server.seed, max_completion_tokens=6, max_tokens=5).usage.completion_tokens == 6
    chunks = list(server.complete(seed=server.seed, max_tokens=5, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"
    whole = len(server.tokenizer.encode(answers_of(server, PROMPT)[0]))
    assert server.complete(seed=server.seed, max_tokens=whole).choices[0].finish_reason == "length"
    assert server.complete(seed=server.seed, max_tokens=whole + 1).choices[0].finish_reason == "stop"


def test_stop_strings_end_the_text_also_across_tokens(server):
    (text,) = answers_of(server, PROMPT)
    for start, length in ((9, 1), (10, 3), (12, 6), (len(text) - 1, 1)):
        stop = text[start : start + length]
        expected = text[: text.find(stop)]
        reply = server.complete(seed=server.seed, max_tokens=48, stop=stop)
        assert reply.choices[0].text == expected and reply.choices[0].finish_reason == "stop"
        shorter = server.tokenizer.encode(text[: text.find(stop) + length])
        assert reply.usage.completion_tokens == len(shorter)
        stream = server.complete(seed=server.seed, max_tokens=48, stop=["never", stop], stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
    assert server.complete(seed=server.seed, max_tokens=48, stop=["never"]).choices[0].text == text
    beginning = server.complete(seed=server.seed, max_tokens=9, stop=[text[5:9] + "never"]).choices[0]
    assert beginning.text == server.tokenizer.decode(server.tokenizer.encode(text)[:9])  # what was held back comes
    assert server.idle()


def test_thinking_that_the_template_has_opened(server, monkeypatch):
    """As R1's later templates do: the answer begins with thinking, without the tag."""
    template = server.tokenizer.template + "{% if add_generation_prompt %}<think>{% endif %}"
    monkeypatch.setattr(server.tokenizer, "template", template)
    (text,) = answers_of(server, PROMPT + "<think>")
    message = server.chat(seed=server.seed).choices[0].message
    thinking, _, rest = text.removeprefix("<think>").partition("</think>")
    assert (message.reasoning_content or "", message.content) == (thinking, rest)


def test_a_stop_string_within_the_thinking(server):
    reply = server.chat(seed=server.seed, stop="</think>").choices[0]
    assert reply.finish_reason == "stop" and reply.message.content == "" and reply.message.reasoning_content


# ---- log-probs ---------------------------------------------------------------------------------


def test_logprobs_of_a_chat(server):
    reply = server.chat(seed=server.seed, logprobs=True, top_logprobs=3).choices[0]
    thinking, content = reply.logprobs.reasoning_content, reply.logprobs.content
    texts = [one["token"] for one in thinking]
    assert "".join(texts) == f"<think>{reply.message.reasoning_content}</think>"
    assert "".join(one.token for one in content) == reply.message.content
    prompt = server.tokenizer.encode(PROMPT)
    tokens = server.tokenizer.encode("".join(texts) + reply.message.content)
    with torch.no_grad():
        logp = server.model(torch.tensor([prompt + tokens])).log_softmax(-1)[0, len(prompt) - 1 : -1]
    for row, token, one in zip(logp, tokens, [*thinking, *(one.model_dump() for one in content)]):
        assert one["logprob"] == pytest.approx(row[token].item(), abs=1e-5)
        assert bytes(one["bytes"]).decode() == one["token"] and len(one["top_logprobs"]) == 3
        values = [top["logprob"] for top in one["top_logprobs"]]
        assert values == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)
    streamed = list(server.chat(seed=server.seed, logprobs=True, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [t.token for part in parts for t in part.content] == [one.token for one in content]
    assert server.chat(seed=server.seed).choices[0].logprobs is None


def test_logprobs_of_a_completion(server):
    reply = server.complete(seed=server.seed, max_tokens=12, logprobs=2).choices[0]
    assert "".join(reply.logprobs.tokens) == reply.text and len(reply.logprobs.token_logprobs) == 12
    starts = [reply.text[offset:].startswith(token) for offset, token in
              zip(reply.logprobs.text_offset, reply.logprobs.tokens)]  # fmt: skip
    assert all(starts)
    for token, logp, top in zip(reply.logprobs.tokens, reply.logprobs.token_logprobs, reply.logprobs.top_logprobs):
        assert top[token] == logp and 2 <= len(top) <= 3
    chunks = server.complete(seed=server.seed, max_tokens=12, logprobs=0, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [offset for part in parts for offset in part.text_offset] == reply.logprobs.text_offset


# ---- what is refused ---------------------------------------------------------------------------


def test_models(server):
    (model,) = server.client.models.list().data
    assert model.id == "toy" and server.client.models.retrieve("toy").object == "model"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; 'toy' is"):
        server.client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model="gpt-4", messages=ASKED)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize(
    "body, code, param",
    [
        ({"nonsense": 1}, "unknown_parameter", "nonsense"),
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "1"}, "invalid_value", "temperature"),
        ({"top_p": 1.5}, "invalid_value", "top_p"),
        ({"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 2.5}, "invalid_value", "n"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop[0]"),
        ({"logprobs": 6}, "invalid_value", "logprobs"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": ["a", 1]}, "invalid_value", "prompt"),
        ({"prompt": None}, "missing_required_parameter", "prompt"),
        ({"prompt": [10**9]}, "invalid_value", None),
        ({"max_tokens": 600}, "context_length_exceeded", "prompt"),
        ({"prompt": "a " * 600}, "context_length_exceeded", "prompt"),
        ({"stream_options": {"usage": True}}, "unknown_parameter", "stream_options.usage"),
    ],
)
def test_errors_of_a_completion(server, body, code, param):
    status, error = server.error(**body)
    assert (status, error["type"], error["code"], error["param"]) == (400, "invalid_request_error", code, param), error


@pytest.mark.parametrize(
    "body, code, param",
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value",
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "unsupported_parameter",
         "messages[0].tool_calls"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": 3}, "invalid_value", "logprobs"),
        ({"tools": [{}]}, "unsupported_parameter", "tools"),
    ],
)  # fmt: skip
def test_errors_of_a_chat(server, body, code, param):
    status, error = server.error("/v1/chat/completions", json.dumps({"model": "toy", "messages": ASKED} | body))
    assert (status, error["code"], error["param"]) == (400, code, param), error


def test_fields_that_ask_for_nothing_are_accepted(server):
    parts = [{"type": "text", "text": "make 24 "}, {"type": "text", "text": "from 11,3,3"}]
    nothing = {"presence_penalty": 0, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}, "n": 1}
    nothing |= {"frequency_penalty": None, "stop": None, "user": "me", "metadata": {"a": "b"}, "tool_choice": "auto"}
    same = server.chat([{"role": "user", "content": parts, "name": "me"}], seed=server.seed, **nothing)
    assert same.choices[0].message == server.chat(seed=server.seed).choices[0].message
    earlier = server.chat(seed=server.seed).choices[0].message.model_dump()  # sent back as it came
    assert server.chat([*ASKED, earlier, *ASKED]).usage.prompt_tokens > 20


def test_a_prompt_is_text_unless_it_is_a_raw_one(server):
    """A control token in a message is quoted; the same chat in a completion."""
    message = [{"role": "user", "content": "<think>"}]
    raw = "User:<think>\nAssistant:"
    prompt = len(server.tokenizer.encode(raw))
    assert server.chat(message, max_tokens=1).usage.prompt_tokens > prompt
    assert server.complete(raw, max_tokens=1).usage.prompt_tokens == prompt


def test_earlier_answers_are_as_in_the_chat(server):
    """Without their thinking; an end token written in one is text, and no template here has a place for a system."""
    tokenizer, end = server.tokenizer, server.tokenizer.eos_token
    answer = f"<think>7</think>no{end}"
    texts = [("user", "3"), ("assistant", answer), ("user", "4")]
    turns = [{"role": role, "content": text} for role, text in texts]
    expected = conversation.prompt(tokenizer, [conversation.Turn("3", answer)], "4", window=512, reserve=1).tokens
    messages = [serve_body.Message.model_validate(turn) for turn in turns]
    assert serve_api.chat_prompt(tokenizer, messages) == (expected, False)
    assert expected.count(tokenizer.eos) == 1 and tokenizer.id("<think>") not in expected
    assert server.chat(turns, max_tokens=1).usage.prompt_tokens == len(expected)
    for role in ("system", "developer"):
        body = {"model": "toy", "messages": [{"role": role, "content": "a"}, *ASKED]}
        status, error = server.error("/v1/chat/completions", json.dumps(body))
        assert status == 400 and "has no place for a system prompt" in error["message"]


def test_bodies_that_are_no_json(server):
    for content in ("", "{", "[]", "3", '"a"'):
        status, error = server.error(content=content)
        assert status == 400 and "no JSON object" in error["message"]
    reply = server.http.post("/v1/completions", content='{"model": "toy", "prompt": "a"}')
    assert reply.status_code == 400  # a web page elsewhere may send text/plain, but not JSON
    status, error = server.error(content="[" + "1," * serve_api.MOST_BYTES)
    assert status == 413 and "has more than 8388608 bytes" in error["message"]


FIELDS = [name for model in (serve_body.Chat, serve_body.Completion) for name in (*model.model_fields, *model.neutral)]
ATOMS = [None, True, -1, 0, 1, 2, 0.5, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "a", "\ud800", "user"]
KEYS = st.sampled_from(["type", "text", "role", "content", "include_usage", "\ud800"])
DEEP = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)
VALUES = st.recursive(st.sampled_from(ATOMS), DEEP, max_leaves=6)


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.dictionaries(st.sampled_from([*FIELDS, "\ud800"]), VALUES, max_size=3))
def test_every_body_is_answered_or_refused(server, chat, changes):
    body = {"model": "toy", "max_tokens": 2} | ({"messages": ASKED} if chat else {"prompt": "a"}) | changes
    path = "chat/completions" if chat else "completions"
    reply = server.http.post(f"/v1/{path}", content=json.dumps(body), headers=JSON)
    assert reply.status_code in (200, 400, 404), reply.text
    assert reply.status_code == 200 or reply.json()["error"]["message"]


def test_other_paths_and_methods(server):
    assert server.error("/v1/embeddings")[0] == 404
    reply = server.http.get("/v1/completions")
    assert reply.status_code == 405 and reply.json()["error"]["type"] == "invalid_request_error"
    assert server.http.get("/health").json() == {"running": 0, "waiting": 0}


# ---- limits, and clients who leave -------------------------------------------------------------


def wait_for(condition, seconds: float = 10.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The folder of a model whose answers never end."""
    return saved(tmp_path_factory.mktemp("endless"), {"\nAssistant:": "7", "7": "8", "8": "7"}, window=100_000)


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


@pytest.fixture
def slow_steps(monkeypatch):
    hidden = Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda *args, **more: time.sleep(0.05) or hidden(*args, **more))


def test_an_answer_that_takes_too_long_is_503(folder, slow_steps):
    impatient = Running(folder, rows=1, waiting=1, timeout=0.3)
    try:
        with pytest.raises(openai.InternalServerError, match="No answer within 0.3 seconds") as caught:
            impatient.complete("User:make", max_tokens=400, seed=5)
        assert caught.value.status_code == 503 and caught.value.code == "timeout" and impatient.idle()
        with pytest.raises(openai.APIError, match="No answer within 0.3 seconds"):
            list(impatient.complete("User:make", max_tokens=400, seed=5, stream=True))
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
        assert server.http.get("/v1/models", headers={"Host": host}).status_code == status
    open_to_all = TestClient(serve_api.create(server.service, "0.0.0.0"), base_url="http://example.org")
    assert open_to_all.get("/v1/models").status_code == 200


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


def test_a_failing_engine_is_reported(folder, monkeypatch):
    running = Running(folder, rows=2, waiting=2)
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


# ---- the process -------------------------------------------------------------------------------


def test_a_signal_ends_the_server_cleanly(endless):
    """While it answers: each client gets an error, and nothing is printed."""
    command = [sys.executable, "-m", "experiments.serve", str(endless), "--port", "0", "--grace", "0.5"]
    command += ["--name", "toy", "--rows", "2", "--max-length", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    expected = {signal.SIGTERM: (0, "", ""), signal.SIGINT: (130, "", "interrupted\n")}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in expected]  # they start at the same time
    for process, number in zip(processes, expected):
        line = process.stdout.readline()
        assert line.startswith("toy at http://127.0.0.1:") and line.endswith("/v1\n")
        client = openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0)
        with client, ThreadPoolExecutor(1) as pool:
            asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 99_000}
            stream = iter(client.completions.create(**asked, stream=True))
            next(stream)
            whole = pool.submit(client.completions.create, **asked)
            health = line.split()[-1].replace("/v1", "/health")
            assert wait_for(lambda: httpx.get(health).json()["running"] == 2)
            process.send_signal(number)
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="the server is shutting down"):
                whole.result()
            said = process.communicate(timeout=20)
        assert (process.returncode, *said) == expected[number]


def test_addresses(folder, monkeypatch, capsys):
    with serve.listening("127.0.0.1", 0) as free:
        assert free.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("", "nosuch.invalid", "☃" * 80, "127.0.0.1"):
            with pytest.raises(ValueError, match=f"^host = '{host}', port = {port}: cannot listen there: "):
                serve.listening(host, port)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: sockets[0].close())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    config = serve.Config(folder, host="0.0.0.0", port=0, rows=1)
    serve.main(config)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("toy-moe") and "warning: 0.0.0.0 can be reached from other machines" in out[1]
    serve.main(replace(config, host="127.0.0.1", name="other"))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["other"]


def test_the_cache_has_8192_slots_a_row_unless_others_are_asked_for(endless, monkeypatch):
    """The model has positions for 100,000: 64 rows of these would not fit into a machine's memory."""
    made = []
    monkeypatch.setattr(serve, "Engine", lambda *sizes: made.append(Engine(*sizes)) or made[-1])
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    for length, slots in ((None, 8192), (9000, 9000)):
        serve.main(serve.Config(endless, port=0, rows=1, max_length=length))
        assert made[-1].slots == slots


def test_packed_weights_are_served_as_they_are(tmp_path, monkeypatch):
    made = []
    folder = quantised(plain(tmp_path / "plain", CONFIGS["llama"]), tmp_path / "nf4")
    monkeypatch.setattr(serve, "Engine", lambda *sizes: made.append(Engine(*sizes)) or made[-1])
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    for packed in (False, True):
        serve.main(serve.Config(folder, port=0, rows=1, max_length=9, packed=packed))
        assert bool(packed_layers(made[-1].model)) == packed


def test_a_failed_engine_ends_the_process(endless, monkeypatch):
    """With exit code 1, by `cli.run`; until then the server says that it is not well."""

    def fails(self, sockets):
        with self.engine, monkeypatch.context() as broken:
            broken.setattr(Transformer, "hidden", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                list(self.engine.submit(Request([1], 9)))
        assert TestClient(self.config.app, base_url="http://localhost").get("/health").status_code == 503

    monkeypatch.setattr(uvicorn.Server, "run", fails)
    monkeypatch.setattr(Transformer, "prefill", lambda self, grid, **_: torch.zeros(len(grid), self.config.dim))
    with pytest.raises(RuntimeError, match="^the engine has failed: division by zero$"):
        serve.main(serve.Config(endless, port=0, rows=1, max_length=99))


def test_without_the_extra_one_line_names_it(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "experiments.serve_http")
    monkeypatch.delattr("experiments.serve_http")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"extra `chat`: pip install -c constraints.txt -e '.\[chat\]'"):
        serve.main(serve.Config(folder))


def test_names():
    assert serve.name_of(Path("/a/runs/demo/checkpoint/step-000120")) == serve.name_of(Path("/a/runs/demo")) == "demo"
    assert serve.name_of(Path("/a/runs/demo/checkpoint")) == "demo"
    assert serve.name_of(Path("/checkpoints/Qwen2.5-0.5B")) == "Qwen2.5-0.5B"

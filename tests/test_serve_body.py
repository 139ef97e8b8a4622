"""serve_body.py: what is refused, what is ignored, and prompts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from served import ASKED, JSON  # noqa: E402

from experiments import serve_api, serve_body  # noqa: E402
from minir1 import conversation  # noqa: E402


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
        ({"verbosity": "low"}, "unsupported_parameter", "verbosity"),
        ({"prediction": {"type": "content", "content": "a"}}, "unsupported_parameter", "prediction"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"audio": {"voice": "ash", "format": "wav"}}, "unsupported_parameter", "audio"),
        ({"moderation": {"model": "a"}}, "unsupported_parameter", "moderation"),
        ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "a"}}]}, "unsupported_parameter",
         "messages[0].audio"),
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


def test_newer_fields_that_ask_for_nothing_are_accepted(server):
    nothing = {"verbosity": "medium", "modalities": ["text"], "prediction": None, "audio": None, "moderation": None}
    nothing |= {"prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"}}
    part = {"type": "text", "text": ASKED[0]["content"], "prompt_cache_breakpoint": {"mode": "explicit"}}
    same = server.chat([{"role": "user", "content": [part]}], seed=server.seed, extra_body=nothing)
    assert same.choices[0].message == server.chat(seed=server.seed).choices[0].message


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


def test_a_chat_with_a_model_without_a_chat_template_is_sent_to_completions(server, monkeypatch):
    monkeypatch.setattr(server.tokenizer, "template", None)
    status, error = server.error("/v1/chat/completions", json.dumps({"model": "toy", "messages": ASKED}))
    assert (status, error["code"], error["param"]) == (400, "invalid_value", "messages")
    assert error["message"] == "This model has no chat template: send the whole prompt to /v1/completions instead."
    assert server.complete(max_tokens=1).usage.completion_tokens == 1


def test_bodies_that_are_no_json(server):
    for content in ("", "{", "[]", "3", '"a"'):
        status, error = server.error(content=content)
        assert status == 400 and error["message"] == "The body of the request is no JSON object."
    for content, why in ((b'{"model": "toy\xff"}', "not UTF-8"), ("[" * 200_000, "nested too deeply")):
        status, error = server.error(content=content)
        assert status == 400 and error["message"] == f"The body of the request is {why}."
    for headers in ({}, {"Content-Type": "text/plain"}):  # a web page elsewhere may send the latter, but not JSON
        reply = server.http.post("/v1/completions", content='{"model": "toy", "prompt": "a"}', headers=headers)
        assert reply.status_code == 400 and "Content-Type of the request must be" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("chat/", {"messages": [{"role": "user", "content": 3}]},
         "'messages[0].content': expected a text, or a list of parts such as {'type': 'text', 'text': '…'}."),
        ("chat/", {"messages": [3]}, "'messages[0]': expected an object."),
        ("chat/", {"messages": 3}, "'messages': expected a list."),
        ("chat/", {"messages": [{"role": "user", "content": "a\ud800"}]},
         "'messages[0].content[0].text': expected Unicode text; half of a surrogate pair is none."),
        ("", {"prompt": "a\ud800"}, "'prompt': expected Unicode text; half of a surrogate pair is none."),
        ("", {"stop": "a\ud800"}, "'stop[0]': expected Unicode text; half of a surrogate pair is none."),
        ("", {"stop": 3}, "'stop': expected a text, or a list of texts."),
        ("", {"stop": [3]}, "'stop[0]': expected a text."),
        ("", {"stop": ""}, "'stop[0]': expected at least 1 character."),
        ("", {"temperature": 1e-9}, "'temperature': expected 0 (the most likely token), or at least 1e-6."),
        ("", {"stream_options": 3}, "'stream_options': expected an object."),
    ],
)  # fmt: skip
def test_what_is_expected_is_said_in_words_of_the_api(server, path, body, message):
    body = {"model": "toy"} | ({"messages": ASKED} if path else {"prompt": "a"}) | body
    status, error = server.error(f"/v1/{path}completions", json.dumps(body))
    assert (status, error["message"]) == (400, f"Invalid value for {message}")


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

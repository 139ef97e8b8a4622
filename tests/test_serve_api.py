"""serve_api.py: answers over HTTP to the official client, with a toy model."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
from served import PROMPT, answers_of  # noqa: E402

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

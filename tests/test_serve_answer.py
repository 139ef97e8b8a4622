"""serve_answer.py: the text of a choice is the same however its tokens arrive."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_answer_text import cut, whole
from test_tokenizer import KINDS

from experiments.serve_answer import Choice, Closed, chat_logprobs, chat_message, completion_logprobs, usage
from minir1.answer_text import ANSWER, THINKING
from minir1.engine import BUDGET, CANCELLED, EOS, Token
from minir1.tokenizer import train_bpe

BPE = train_bpe(["What is 17 · 23? 你好 🤖 "] * 9, 280)
END = BPE.eos


class Scripted:
    """An answer whose tokens arrive in groups of these sizes, then all at once."""

    def __init__(self, tokens: list[int], sizes: list[int], why: int, prompt: list[int] = ()):
        self.request, self.why, self.cancelled = SimpleNamespace(stop=(END,), prompt=prompt), why, False
        self.tokens, self.sizes = [Token(token, -0.5, []) for token in tokens], sizes

    def arrived(self):
        size = self.sizes.pop(0) if self.sizes else len(self.tokens)
        tokens, self.tokens = self.tokens[:size], self.tokens[size:]
        return tokens, not self.tokens

    def cancel(self):
        self.cancelled = True


def read(choice: Choice) -> tuple[str, str, list, str]:
    """Thinking, text, tokens and finish of a whole answer."""
    thinking, text, drawn = "", "", []
    while choice.finish is None:
        if delta := choice.advance():
            assert delta.index == 3 and (delta.thinking or delta.text or delta.finish)
            thinking, text, drawn = thinking + delta.thinking, text + delta.text, drawn + delta.drawn
    return thinking, text, drawn, choice.finish


PIECES = st.lists(st.sampled_from(["<think>", "</think>", "你好", "🤖", "a", " <", "think", ">", "\n"]), max_size=8)


@settings(deadline=None)
@given(PIECES.map("".join), st.lists(st.sampled_from(["a", "好", "<think", "</think>", "🤖\n", "a<"]), max_size=2),
       st.lists(st.integers(0, 5), max_size=12), st.sampled_from([None, False, True]), st.booleans())  # fmt: skip
def test_thinking_and_text_for_every_arrival(text, stops, sizes, opened, ends):
    """The characters of several bytes are several tokens here."""
    tokens = [token for char in text for token in BPE.encode(char, special=False)]
    answer = Scripted([*tokens, END] if ends else tokens, list(sizes), EOS if ends else BUDGET)
    choice = Choice(3, answer, BPE, stops, opened)
    thinking, rest, drawn, finish = read(choice)
    kept, found = cut(text, stops)
    assert (thinking, rest) == (("", kept) if opened is None else whole(kept, opened))
    assert answer.cancelled == found and finish == ("stop" if found or ends else "length")
    assert [one.token.id for one in drawn] == tokens[: len(drawn)] and (found or len(drawn) == len(tokens))
    assert choice.tokens == len(drawn) + (ends and not found)
    if found:
        assert BPE.decode([one.token.id for one in drawn]).startswith(kept)
    assert choice.thinking_tokens == sum(one.kind == THINKING for one in drawn)
    assert opened is not None or choice.thinking_tokens == 0


def test_the_kinds_of_tokens():
    tokens = BPE.encode("<think>a</think>a")
    _, _, drawn, _ = read(Choice(3, Scripted([*tokens, END], [1] * 9, EOS), BPE, [], False))
    assert [one.kind for one in drawn] == [THINKING, THINKING, THINKING, ANSWER]


def test_an_answer_that_was_cut_off_by_the_end_of_the_engine():
    choice = Choice(3, Scripted(BPE.encode("a"), [], CANCELLED), BPE, [], None)
    with pytest.raises(Closed, match="the server is shutting down"):
        choice.advance()


def test_nothing_is_shown_before_it_is_certain():
    world = BPE.encode("界")
    assert len(world) == 3
    choice = Choice(3, Scripted([*world, *BPE.encode("a"), END], [1] * 20, EOS), BPE, ["ab"], None)
    shown = []
    while choice.finish is None:
        delta = choice.advance()
        shown.append(delta and (delta.text, len(delta.drawn), delta.finish))
    assert shown == [None, None, ("界", 3, None), None, ("a", 1, "stop")]


def test_openai_objects():
    letter, part = BPE.encode("a")[0], BPE.encode("🤖")[0]
    first, second = Token(letter, -0.25, [(letter, -0.25)]), Token(part, -1.0, [])
    drawn = [(THINKING, first), (ANSWER, second)]
    found = chat_logprobs(drawn, BPE)
    entry = {"token": "a", "logprob": -0.25, "bytes": [97]}
    assert found["reasoning_content"] == [entry | {"top_logprobs": [entry]}]
    begun = {"token": "bytes:\\xf0\\x9f", "logprob": -1.0, "bytes": [0xF0, 0x9F], "top_logprobs": []}
    assert found["content"] == [begun] and found["refusal"] is None
    assert completion_logprobs(drawn, BPE, 7) == {
        "tokens": ["a", "bytes:\\xf0\\x9f"], "token_logprobs": [-0.25, -1.0], "text_offset": [7, 8],
        "top_logprobs": [{"a": -0.25}, {"bytes:\\xf0\\x9f": -1.0}],
    }  # fmt: skip


def test_spaces_that_sentencepiece_writes_between_tokens():
    """The text of a completion continues its prompt, a chat's begins anew; a token's log-prob has its space."""
    for kind, text in (("llama", "the cat"), ("metaspace", "the cat")):
        tokenizer = KINDS[kind]
        tokens = tokenizer.encode("the cat the cat")
        half = len(tokens) // 2
        assert tokenizer.decode(tokens[half:]) == text
        answer = lambda: Scripted(tokens[half:], [1] * 99, BUDGET, prompt=tokens[:half])
        assert read(Choice(3, answer(), tokenizer, [], None))[1] == " " + text
        _, chat, drawn, _ = read(Choice(3, answer(), tokenizer, [], False))
        assert chat == text
        probs = completion_logprobs(drawn, tokenizer, 7)
        assert "".join(probs["tokens"]) == " " + text and probs["text_offset"][0] == 7
        for offset, token in zip(probs["text_offset"], probs["tokens"]):
            assert " the cat"[offset - 7 :].startswith(token)
        data = bytes(byte for one in chat_logprobs(drawn, tokenizer)["content"] for byte in one["bytes"])
        assert data.decode() == " " + text
    llama = KINDS["llama"]
    spaced, plain = llama.id("▁t"), llama.id("t")
    both = Token(plain, -1.0, [(spaced, -0.5), (plain, -1.0)])
    assert completion_logprobs([(ANSWER, both)], llama, 0)["top_logprobs"] == [{" t": -0.5, "t": -1.0}]


@pytest.mark.parametrize("kind", ["bpe", "llama"])
def test_the_part_of_a_character_at_the_end_of_the_budget_is_not_sent(kind):
    tokenizer = KINDS[kind]
    for char in ("\U0001f995", "ꙮ"):
        whole, begun = tokenizer.encode("a你"), tokenizer.encode("a你" + char)
        assert len(begun) > len(whole) + 1 and begun[: len(whole)] == whole
        for end in range(len(whole), len(begun)):
            assert read(Choice(3, Scripted(begun[:end], [1] * 99, BUDGET), tokenizer, [], None))[1] == "a你"
        assert read(Choice(3, Scripted(begun, [1] * 99, BUDGET), tokenizer, [], None))[1] == "a你" + char


def test_counts():
    assert chat_message("", "") == {} and chat_message("a", "") == {"reasoning_content": "a"}
    choices = [SimpleNamespace(tokens=3, thinking_tokens=1), SimpleNamespace(tokens=4, thinking_tokens=2)]
    assert usage(5, choices) == {
        "prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12,
        "completion_tokens_details": {"reasoning_tokens": 3},
    }  # fmt: skip

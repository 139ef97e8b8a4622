"""serve_answer.py: the text of a choice is the same however its tokens arrive."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_answer_text import cut, whole

from experiments.serve_answer import Choice, Closed, chat_logprobs, chat_message, completion_logprobs, usage
from minir1.answer_text import ANSWER, THINKING
from minir1.engine import BUDGET, CANCELLED, EOS, Token
from minir1.tokenizer import train_bpe

BPE = train_bpe(["What is 17 · 23? 你好 🤖 "] * 9, 280)
END = BPE.eos


class Scripted:
    """An answer whose tokens arrive in groups of these sizes, then all at once."""

    def __init__(self, tokens: list[int], sizes: list[int], why: int):
        self.request, self.why, self.cancelled = SimpleNamespace(stop=(END,)), why, False
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
    unknown = {"token": "\ufffd", "logprob": -1.0, "bytes": None, "top_logprobs": []}  # bytes of a part are not known
    assert found["content"] == [unknown] and found["refusal"] is None
    assert completion_logprobs(drawn, BPE, 7) == {
        "tokens": ["a", "\ufffd"], "token_logprobs": [-0.25, -1.0], "text_offset": [7, 8],
        "top_logprobs": [{"a": -0.25}, {"\ufffd": -1.0}],
    }  # fmt: skip
    assert chat_message("", "") == {} and chat_message("a", "") == {"reasoning_content": "a"}
    choices = [SimpleNamespace(tokens=3, thinking_tokens=1), SimpleNamespace(tokens=4, thinking_tokens=2)]
    assert usage(5, choices) == {
        "prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12,
        "completion_tokens_details": {"reasoning_tokens": 3},
    }  # fmt: skip

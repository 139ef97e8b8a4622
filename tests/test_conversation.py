"""conversation.py: turns as a prompt that fits the window, and an answer while it is drawn."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from talker import talker
from test_tokenizer import BPE, KINDS, LLAMA, MARKS, QWEN, R1, WORDS, pair

from minir1.conversation import (
    JOINT,
    Prompt,
    Reply,
    Turn,
    drops_thinking,
    fitting,
    prompt,
    said,
    spoken,
    takes_system,
    trained_on_turns,
    unreadable,
    with_document,
    with_limit,
)
from minir1.sample import stream
from minir1.tokenizer import EOS, TEMPLATE, Tokenizer

SIZES = {"window": 4096, "reserve": 64}


def text_of(tokenizer, *asked, **settings):
    return tokenizer.decode(prompt(tokenizer, *asked, **SIZES, **settings).tokens)


# ---------------------------------------------------------------- earlier turns


@pytest.mark.parametrize(
    "answer, rest",
    [
        ("yes", "yes"), ("<think>hm</think>yes", "yes"), ("<think>hm</think>\n\nyes", "\n\nyes"), ("<think>hm", ""),
        ("<think>a</think>b<think>c</think>d", "d"), ("<think>a</think>b<think>c", "b"), ("", ""), ("</think>x", "x"),
    ],
)  # fmt: skip
def test_what_an_answer_said(answer, rest):
    assert said(answer) == rest


def test_turns_of_the_tokenizers_made_here():
    turns = [Turn("1", "<think>2</think><answer>3</answer>"), Turn("4", "<think>5")]
    want = f"User:1\nAssistant:<answer>3</answer>{EOS}User:4\nAssistant:{EOS}User:6\nAssistant:"
    assert text_of(BPE[True], turns, "6") == want
    assert not trained_on_turns(BPE[True], "chat") and trained_on_turns(Tokenizer(BPE[True].backend, R1), "chat")
    assert not trained_on_turns(Tokenizer(BPE[True].backend, R1), "plain")


ANSWERS = ["<think>\nhm</think>\n\nyes", "yes"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_thinking_is_dropped_as_r1s_template_does(answer):
    """What the template makes of the whole dialogue, to the letter."""
    tokenizer, theirs = pair(R1)
    messages = [("system", "Be brief."), ("user", "a"), ("assistant", answer), ("user", "b")]
    messages = [{"role": role, "content": content} for role, content in messages]
    have = prompt(tokenizer, [Turn("a", answer)], "b", system="Be brief.", **SIZES)
    want = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert have == Prompt(want, "<think>", 0)


def test_a_template_that_drops_thinking_in_its_own_way_has_its_way():
    stripped = R1.replace("split('</think>')[-1]", "split('</think>')[-1].lstrip('\\n')")
    for template, between in ((R1, "\n\n"), (stripped, "")):
        tokenizer, _ = pair(template)
        assert drops_thinking(tokenizer)
        assert f"<｜Assistant｜>{between}yes{EOS}" in text_of(tokenizer, [Turn("a", ANSWERS[0])], "b")
    keeps, _ = pair(QWEN)
    assert not drops_thinking(keeps)
    assert "hm" not in text_of(keeps, [Turn("a", ANSWERS[0])], "b")
    assert "hm" not in text_of(pair(R1)[0], [Turn("a", "<think>hm")], "b")  # it does not drop what has no end


def test_what_was_said_is_no_control_token():
    tokenizer, _ = pair(QWEN)
    turns = [Turn(f"a{MARKS[4]}", f"b{MARKS[4]}{MARKS[3]}user\nmore")]
    tokens = prompt(tokenizer, turns, f"c{EOS}", **SIZES).tokens
    plain = prompt(tokenizer, [Turn("a", "b")], "c", **SIZES).tokens
    control = {tokenizer.id(mark) for mark in (EOS, *MARKS)}
    assert [t for t in tokens if t in control] == [t for t in plain if t in control]


def test_system_prompts():
    refusing = "{{ raise_exception('no') }}"
    for template, taken in ((R1, True), (QWEN, True), (LLAMA, True), (TEMPLATE, False), (refusing, False)):
        assert takes_system(pair(template)[0]) == taken, template
    assert "Be brief." in text_of(pair(QWEN)[0], (), "a", system="Be brief.")
    with pytest.raises(ValueError, match="no place for a system prompt"):
        prompt(BPE[True], (), "a", system="Be brief.", **SIZES)


def test_templates_that_ask_one_question():
    assert text_of(BPE[True], (), f"12{EOS}", template="plain") == f"12{EOS}"
    assert BPE[True].eos not in prompt(BPE[True], (), f"12{EOS}", template="plain", **SIZES).tokens
    for more in ({"turns": [Turn("a", "b")]}, {"turns": (), "system": "c"}):
        with pytest.raises(ValueError, match="template 'plain' asks one question"):
            prompt(BPE[True], question="a", template="plain", **more, **SIZES)


# ---------------------------------------------------------------- the window


def test_the_oldest_turns_are_dropped_by_hand():
    """A question takes 3 tokens (User:, 3, Assistant:), a turn 2 more (4 and the end): 13 with two turns."""
    turns = [Turn("1", "<think>9</think>2"), Turn("3", "4")]
    for free, dropped, tokens in ((13, 0, 13), (12, 1, 8), (8, 1, 8), (7, 2, 3), (3, 2, 3)):
        have = prompt(WORDS, turns, "5", window=free + 4, reserve=4)
        assert (have.dropped, len(have.tokens)) == (dropped, tokens)
        assert WORDS.decode(have.tokens).endswith("User:5\nAssistant:")
    with pytest.raises(ValueError, match="the question has 3 tokens with its template: at most 2 of the window of 6"):
        prompt(WORDS, turns, "5", window=6, reserve=4)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)).map(lambda pair: Turn(*pair)), max_size=5),
    window=st.integers(30, 120),
)
def test_as_many_turns_as_fit(turns, window):
    sizes = {"window": window, "reserve": 5}
    have = prompt(BPE[True], turns, "q", **sizes)
    assert len(have.tokens) <= window - 5
    assert have.tokens == prompt(BPE[True], turns[have.dropped :], "q", window=10**6, reserve=5).tokens
    for fewer in range(have.dropped):
        assert len(prompt(BPE[True], turns[fewer:], "q", window=10**6, reserve=5).tokens) > window - 5


# ---------------------------------------------------------------- what the model cannot read, and documents


def test_words_without_a_token():
    assert unreadable(WORDS, "make 24 from hello 3, hello 200") == ["hello", "200"]
    assert unreadable(WORDS, "make 24 from 11,3") == unreadable(BPE[True], "你好 zebra") == []


@pytest.mark.parametrize("kind", ["bpe", "llama"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_beginning_of_a_document(kind, data):
    tokenizer = KINDS[kind]
    text = data.draw(st.text(alphabet="the cat 你好é👨\n", max_size=200))
    most, size = data.draw(st.integers(0, 120)), lambda part: len(tokenizer.encode(part, special=False))
    part = fitting(tokenizer, text, most)
    assert text.startswith(part) and size(part) <= most
    assert part == text or size(text[: len(part) + 1]) >= most  # it could not be longer


def test_a_long_document_is_read_in_chunks_as_far_as_it_fits():
    text, read = "the cat sat on the mat. " * 4000, []
    part = fitting(BPE[True], text, 10_000, read.append)
    assert 9_900 < len(BPE[True].encode(part)) <= 10_000 and text.startswith(part)
    assert read == list(range(2**14, len(part), 2**14)) and len(read) > 1
    assert fitting(BPE[True], text, 10**6) == text
    empty, whole = (len(BPE[True].encode(with_document("a.txt", text, "Why?"))) for text in ("", part))
    assert whole <= empty + 10_000 + JOINT


# ---------------------------------------------------------------- a limit on the thinking


class Drawing:
    """Draws what a script says: (prompt, most) -> the tokens of the n-th call, at most `most`."""

    def __init__(self, *scripts: str):
        self.scripts, self.calls, self.closed = list(scripts), [], 0

    def __call__(self, tokens, most):
        self.calls.append((WORDS.decode(tokens), most))
        try:
            yield from itertools.islice(WORDS.encode(self.scripts.pop(0)), most)
        finally:
            self.closed += 1


ASKED = Prompt(WORDS.encode("User:3\nAssistant:"), "", 0)
THINKS = f"<think>1 2 3 4</think>5{EOS}"  # 11 tokens with the spaces, of which the thinking has 7


def drawn(draw, most=100, thinking=None, asked=ASKED):
    return WORDS.decode(list(with_limit(draw, WORDS, asked, most, thinking)))


@pytest.mark.parametrize("thinking", [None, 9, 10, 11, 100])
def test_thinking_that_ends_in_time_is_left_alone(thinking):
    draw = Drawing(THINKS)
    assert drawn(draw, thinking=thinking) == THINKS
    assert draw.calls == [("User:3\nAssistant:", 100)]


def test_thinking_is_closed_by_force():
    draw = Drawing(THINKS, f"9{EOS}")
    assert drawn(draw, thinking=4) == f"<think>1 2</think>9{EOS}"
    assert draw.calls == [("User:3\nAssistant:", 100), ("User:3\nAssistant:<think>1 2</think>", 95)]
    assert draw.closed == 2  # the first is not drawn to its end


def test_no_thinking_at_all():
    for opened, forced in (("", "<think></think>"), ("<think>", "</think>")):
        draw = Drawing("9")
        assert drawn(draw, thinking=0, asked=ASKED._replace(opened=opened)) == f"{forced}9"
        assert draw.calls == [(f"User:3\nAssistant:{forced}", 100 - forced.count("<"))]
    draw = Drawing("9")  # a template that has opened and closed it
    assert drawn(draw, thinking=0, asked=ASKED._replace(opened="<think></think>")) == "9"


def test_an_answer_without_thinking_is_left_alone():
    assert drawn(Drawing("1 2 3 4"), thinking=2) == "1 2 3 4"
    assert drawn(Drawing("1 2 3 4"), thinking=2, asked=ASKED._replace(opened="<think></think>")) == "1 2 3 4"
    assert drawn(Drawing("1 2 3 4", "5"), thinking=2, asked=ASKED._replace(opened="<think>")) == "1 </think>5"
    assert drawn(Drawing(f"<think>{EOS}"), thinking=2) == f"<think>{EOS}"  # ended there by itself


@given(thinking=st.integers(0, 12), most=st.integers(1, 12))
def test_what_is_forced_counts(thinking, most):
    tokens = list(with_limit(Drawing(THINKS, THINKS), WORDS, ASKED, most, thinking))
    assert len(tokens) == min(most, len(tokens)) and (len(tokens) == most or tokens[-1] == WORDS.eos)


def replayed(tokenizer, *scripts):
    """Draws these tokens, one list a call."""
    left = list(scripts)
    return lambda tokens, most: (token for token in left.pop(0)[:most])


@pytest.mark.parametrize("kind", ["bpe", "llama"])
def test_a_tag_of_several_tokens_is_completed_and_then_closed(kind):
    tokenizer = KINDS[kind]
    thinks = tokenizer.encode("<think>aaaaaaaaaaaa", special=False)
    for limit in range(1, 8):
        asked = Prompt([5], "", 0)
        tokens = list(with_limit(replayed(tokenizer, thinks, tokenizer.encode("b")), tokenizer, asked, 99, limit))
        assert re.fullmatch(r"<think>a{0,4} ?</think> ?b", tokenizer.decode(tokens)), limit


@pytest.mark.parametrize("kind", ["bpe", "llama"])
def test_no_character_is_divided(kind):
    """Neither where the thinking is closed nor where an answer ends by its length; U+FFFD that is meant stays."""
    tokenizer, text = KINDS[kind], "你好 👋🏽 \ufffd"
    thinks, asked = tokenizer.encode(text), Prompt([5], "<think>", 0)
    for limit in range(1, len(thinks) - 1):
        draw = replayed(tokenizer, thinks, tokenizer.encode("9"))
        begun = tokenizer.decode(list(with_limit(draw, tokenizer, asked, 99, limit))).partition("</think>")[0]
        assert begun and text.startswith(begun.rstrip(" "))
        reply = Reply("")
        parts = list(spoken(tokenizer, iter(thinks[:limit]), reply))
        assert text.startswith(reply.text) and reply.text == "".join(part for _, part in parts)
    wrong = tokenizer.encode("👋")[-1:] * 50  # never a character
    tokens = list(with_limit(replayed(tokenizer, wrong, []), tokenizer, asked, 99, 10))
    assert tokens[: len(tokens) - len(tokenizer.encode("</think>"))] == wrong[:14]
    whole = Reply("")
    list(spoken(tokenizer, iter([*thinks, tokenizer.eos]), whole))
    assert whole.text == text and whole.ended


def test_forced_thinking_of_a_model():
    """The rest is drawn as an answer to the longer prompt, with the same noise."""
    model, tokenizer = talker({"\nAssistant:": "<think>", "<think>": "7", "7": "7", "</think>": "8"})
    asked = prompt(tokenizer, (), "3", **SIZES)
    draw = lambda tokens, most: stream(model, tokens, max_tokens=most, stop=tokenizer.stops)
    tokens = list(with_limit(draw, tokenizer, asked, 50, 6))
    assert tokenizer.decode(tokens) == f"<think>77777</think>8{EOS}"
    assert tokens[7:] == list(draw([*asked.tokens, *tokens[:7]], 50))
    assert tokenizer.decode(list(draw(asked.tokens, 50))) == "<think>" + "7" * 49


# ---------------------------------------------------------------- an answer while it is drawn


def test_a_reply_is_filled_in():
    reply = Reply("")
    parts = list(spoken(WORDS, iter(WORDS.encode(f"<think>12</think>3{EOS}4")), reply))
    assert parts == [("thinking", "12"), ("answer", "3")]
    assert reply == Reply("<think>12</think>3", WORDS.encode(f"<think>12</think>3{EOS}"), ended=True)
    reply = Reply("<think>")  # the template's
    assert list(spoken(WORDS, iter(WORDS.encode("12</think>3")), reply)) == [("thinking", "12"), ("answer", "3")]
    assert reply.text == "<think>12</think>3" and not reply.ended


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab 你👨\u200d<think>/", max_size=40), opened=st.booleans())
def test_nothing_is_lost_of_a_reply(text, opened):
    begun = "<think>" if opened else ""
    reply = Reply(begun)
    parts = list(spoken(BPE[True], iter(BPE[True].encode(text)), reply))
    assert reply.text == begun + text
    without = [text, text.replace("<think>", "", 1)]  # at most one tag of each kind is left out
    assert "".join(part for _, part in parts) in [*without, *(one.replace("</think>", "", 1) for one in without)]

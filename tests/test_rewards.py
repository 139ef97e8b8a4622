import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minir1.rewards import TAGS, answer, format_reward, overlong

# text, format reward, answer
TABLE = [
    ("<think>a</think><answer>8</answer>", 1, "8"),
    ("<think>a</think>\n<answer>8</answer>\n", 1, "8"),
    (" \n<think>\na\n</think> \t\n <answer>\n8\n</answer> ", 1, "8"),
    ("a</think><answer>8</answer>", 1, "8"),  # the template opened <think>
    ("<think>a < b > c</think><answer>x < y</answer>", 1, "x < y"),
    # thinking that is missing, blank or never closed
    ("<think></think><answer>8</answer>", 0, "8"),
    ("<think> \n</think><answer>8</answer>", 0, "8"),
    ("</think><answer>8</answer>", 0, "8"),
    ("<answer>8</answer>", 0, None),
    ("a<answer>8</answer>", 0, None),
    ("<think>a<answer>8</answer>", 0, None),
    # an answer inside the thinking
    ("<think>a<answer>8</answer></think>", 0, None),
    ("a<answer>8</answer></think>", 0, None),
    ("<think>a<answer>8</answer></think><answer>9</answer>", 0, None),
    ("<think>a</think><think>b<answer>8</answer>", 0, None),
    ("<think>a<think>b</think><answer>8</answer>", 0, None),
    ("<think><think>b</think><answer>8</answer>", 0, None),
    ("<think>a</think><answer>8</answer></think>", 0, None),
    ("<think>a</think><answer><think>8</think></answer>", 0, None),
    ("<think>a</think><answer>8<think></answer>", 0, None),
    # tags twice
    ("<think>a</think><think>b</think><answer>8</answer>", 0, "8"),
    ("<think>a</think></think><answer>8</answer>", 0, "8"),
    ("<think>a</think><answer>8</answer><answer>8</answer>", 0, None),
    ("<think>a</think><answer><answer>8</answer></answer>", 0, None),
    ("<think>a</think><answer><answer>8</answer>", 0, None),
    ("<think>a</think><answer>8</answer></answer>", 0, None),
    # tags missing, in the wrong order, or not quite tags
    ("<think>a</think><answer>8", 0, None),
    ("<think>a</think>8</answer>", 0, None),
    ("<think>a</think>8", 0, None),
    ("<think>a</think></answer>8<answer>", 0, None),
    ("</think>a<think><answer>8</answer>", 0, None),
    ("<answer>8</answer><think>a</think>", 0, None),
    ("<think>a</think><Answer>8</Answer>", 0, None),
    ("<think>a</think>< answer >8</ answer >", 0, None),
    ("<think>a</think>＜answer＞8＜/answer＞", 0, None),
    ("<think>a</think><аnswer>8</аnswer>", 0, None),  # Cyrillic а
    ("<think>a＜/think＞<answer>8</answer>", 0, None),
    # text outside the blocks costs the format reward only
    ("well <think>a</think><answer>8</answer>", 0, "8"),
    ("<think>a</think> so <answer>8</answer>", 0, "8"),
    ("<think>a</think><answer>8</answer> done", 0, "8"),
    # several lines of thinking, other line ends and tabs
    ("<think>a\nb\n\n\tc\n</think>\n<answer>\n8\n9\n</answer>", 1, "8\n9"),
    ("<think>a\r\nb\u2028c</think>\r\n<answer>8</answer>\r\n", 1, "8"),
    # nothing in it
    ("<think>a</think><answer></answer>", 0, None),
    ("<think>a</think><answer> \n\u00a0</answer>", 0, None),
    ("", 0, None),
    ("   ", 0, None),
]


@pytest.mark.parametrize("text, well_formed, content", TABLE)
def test_table(text, well_formed, content):
    assert format_reward(text) == well_formed
    assert answer(text) == content


def test_an_empty_think_is_well_formed_on_request_only():
    for text in ("<think></think><answer>8</answer>", "</think> <answer>8</answer>"):
        assert format_reward(text) == 0.0 and format_reward(text, allow_empty_think=True) == 1.0
    assert format_reward("<answer>8</answer>", allow_empty_think=True) == 0.0


INVISIBLE = ["\u200b", "\ufeff", "\u2060", "\u00ad", "\u200d\u200c", "\u3164",
             "\u115f\u1160", "\u2800", "\u180e", "\x00\x1b", "\ufe0f",
             "\u202e\u202c", "\U000e0041", "\u034f", "\u00a0\u2003", " \u200b\n\u200b "]  # fmt: skip


@pytest.mark.parametrize("blank", INVISIBLE, ids=ascii)
def test_invisible_characters_are_blank(blank):
    for text in (f"<think>{blank}</think><answer>8</answer>", f"<think>a</think><answer>{blank}</answer>"):
        assert format_reward(text) == 0.0
    assert format_reward(f"<think>{blank}</think><answer>8</answer>", allow_empty_think=True) == 1.0
    assert answer(f"<think>a</think><answer>{blank}</answer>") is None
    assert format_reward(f"<think>{blank}a</think><answer>8{blank}</answer>") == 1.0
    assert answer(f"<think>{blank}</think><answer>8</answer>") == "8"
    long = blank * (1_000_000 // len(blank))
    start = time.perf_counter()
    assert format_reward(f"<think>{long}</think><answer>8</answer>") == 0.0
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("visible", [".", "é", "é", "中", "مرحبا", "👍", "∞", "\ufffd", "_", "0"])
def test_other_characters_are_not(visible):
    assert format_reward(f"<think>{visible}</think><answer>{visible}</answer>") == 1.0


@given(st.lists(st.sampled_from([*TAGS, "a", " ", "\n", "8"]), max_size=9).map("".join))
def test_whatever_is_well_formed_has_an_answer(text):
    assert format_reward(text) in (0.0, 1.0)
    assert not format_reward(text) or answer(text)
    content = answer(text)
    assert content is None or not any(tag in content for tag in TAGS)


@pytest.mark.parametrize("piece", [*TAGS, "<", "<think", " ", "<answer>8</answer>"])
def test_long_texts_are_fast(piece):
    start = time.perf_counter()
    text = piece * 20_000
    assert format_reward(text) == 0.0 and answer(text) is None
    assert time.perf_counter() - start < 1


def test_overlong_by_hand():
    """A budget of 100 with a buffer of 20: free up to 80, then a twentieth per token."""
    penalties = [overlong(n, 100, 20) for n in (0, 80, 81, 90, 99, 100, 150)]
    assert penalties == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1, -1])
    assert overlong(5, 10, 10) == -0.5
    for length, budget, buffer in ((-1, 10, 5), (3, 10, 0), (3, 10, 11)):
        with pytest.raises(ValueError, match=f"length = {length}, budget = {budget}, buffer = {buffer}"):
            overlong(length, budget, buffer)

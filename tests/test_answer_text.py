"""answer_text.py: whatever the pieces are, the text is cut at the same stop and split at the same tags."""

import re
from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minir1.answer_text import ANSWER, THINKING, StopStrings, ThinkSplitter, beginning, parts

TAGS = st.sampled_from(["<think>", "</think>", "<", "</", "think>", "<think", " ", "\n", "a", "é", "</think", "x<"])
TEXTS = st.lists(TAGS, max_size=12).map("".join)


def divided(text: str, cuts: list[int]) -> list[str]:
    """The text in pieces that end at the cuts, some of them empty."""
    ends = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(ends, ends[1:])]


CUTS = st.lists(st.integers(0, 99), max_size=12)


# ---- thinking and answer -----------------------------------------------------------------------


def whole(text: str, opened: bool) -> tuple[str, str]:
    """Thinking and answer of a whole text."""
    begun = re.match(r"\s*<think>", text)
    if not (opened or begun):
        return "", text
    thinking, _, answer = text[begun.end() if begun else 0 :].partition("</think>")
    return thinking, answer


def joined(pairs) -> tuple[str, str]:
    pairs = list(pairs)
    assert all(text for _, text in pairs) and [kind for kind, _ in groupby(pairs, lambda pair: pair[0])] in (
        [], [THINKING], [ANSWER], [THINKING, ANSWER]
    )  # fmt: skip
    return tuple("".join(text for kind, text in pairs if kind == wanted) for wanted in (THINKING, ANSWER))


@given(TEXTS, CUTS, st.booleans())
@example("<think>a</think>b", list(range(17)), False)
def test_thinking_is_split_in_the_same_way_for_all_pieces(text, cuts, opened):
    assert joined(parts(divided(text, cuts), opened)) == whole(text, opened)


@pytest.mark.parametrize(
    "text, opened, thinking, answer",
    [
        ("<think>2+2</think>4", False, "2+2", "4"),
        ("2+2</think>4", True, "2+2", "4"),
        (" \n<think>\n2+2\n</think>\n\n4", False, "\n2+2\n", "\n\n4"),
        ("<think>2+2</think>4", True, "2+2", "4"),  # a model that repeats the tag of its prompt
        ("4", False, "", "4"),
        ("  4", False, "", "  4"),
        ("<think>never closed", False, "never closed", ""),
        ("never closed </thi", True, "never closed </thi", ""),
        ("<thi", False, "", "<thi"),
        ("the tag <think> opens, </think> closes", False, "", "the tag <think> opens, </think> closes"),
        ("<think></think>a<think>b</think>c", False, "", "a<think>b</think>c"),
        ("<think><think>a</think>b", False, "<think>a", "b"),
        ("", True, "", ""),
    ],
)
def test_thinking_by_hand(text, opened, thinking, answer):
    assert joined(parts([text], opened)) == joined(parts(text, opened)) == (thinking, answer)


def test_what_cannot_be_a_tag_comes_at_once():
    splitter = ThinkSplitter(False)
    fed = [splitter.feed(piece) for piece in ("<", "think>", "so", " <", "b>", "</th", "ink", ">4", "<")]
    thinking, answer = (lambda text: [(THINKING, text)]), (lambda text: [(ANSWER, text)])
    expected = [[], [], thinking("so"), thinking(" "), thinking("<b>"), [], [], answer("4"), answer("<")]
    assert fed == expected and splitter.rest() == [] and splitter.kind == ANSWER


# ---- stop strings ------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, of several the longest; read character by character."""
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ending))], True
    return text, False


def scanned(pieces, stops) -> tuple[str, bool]:
    scanner = StopStrings(stops)
    text = "".join([scanner.feed(piece) for piece in pieces]) + scanner.rest()
    return text, scanner.found


LETTERS = st.text("abc", max_size=16)


@given(LETTERS, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), CUTS)
@example("abcd", ["abcd", "bc"], [3])
@example("aab", ["ab"], [1, 2])
def test_a_stop_cuts_at_the_same_place_for_all_pieces(text, stops, cuts):
    assert scanned(divided(text, cuts), stops) == cut(text, stops)


@given(LETTERS, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), CUTS)
def test_no_character_of_a_stop_is_ever_shown(text, stops, cuts):
    """What has been sent is at every moment a beginning of the final text, and nothing is held back without need."""
    scanner, sent, read = StopStrings(stops), "", ""
    for piece in divided(text, cuts):
        sent, read = sent + scanner.feed(piece), read + piece
        assert cut(text, stops)[0].startswith(sent)
        if not scanner.found:
            assert read == sent + read[len(sent) :] and any(stop.startswith(read[len(sent) :]) for stop in [*stops, ""])


def test_stops_by_hand():
    assert scanned(["one\n", "\ntwo"], ["\n\n"]) == ("one", True)
    assert scanned(["one\n", "two\n"], ["\n\n"]) == ("one\ntwo\n", False)
    assert scanned(["a", "b", "c"], ["abcd", "bc"]) == ("a", True)
    assert scanned(["abc"], ["c", "bc"]) == ("a", True)
    assert scanned(["日本", "語です"], ["語で"]) == ("日本", True)
    scanner = StopStrings(["END"])
    assert [scanner.feed(piece) for piece in ("xE", "N", "E", "ND", "more")] == ["x", "", "EN", "", ""]
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(["a", ""])


def test_beginning():
    assert beginning("abc</thi", ["</think>"]) == 5 and beginning("</think>", ["</think>"]) == 0
    assert beginning("aab", ["ab", "bb", "aabb"]) == 3 and beginning("", ["a"]) == beginning("x", []) == 0

import unicodedata

import pytest
from clock import quickest
from hypothesis import given
from hypothesis import strategies as st

from minir1 import rewards
from minir1.rewards import (
    LANGUAGES,
    TAGS,
    answer,
    format_reward,
    language_consistency,
    overlong,
    reflections,
    repetition,
    thinking,
    tidiness,
    tokens,
)

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
    long = f"<think>{blank * (1_000_000 // len(blank))}</think><answer>8</answer>"
    assert format_reward(long) == 0.0
    assert quickest(format_reward, long) < 0.5


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
    text = piece * 20_000
    assert format_reward(text) == 0.0 and answer(text) is None
    assert quickest(format_reward, text) + quickest(answer, text) < 1


def test_overlong_by_hand():
    """A budget of 100 with a buffer of 20: free up to 80, then a twentieth per token."""
    penalties = [overlong(n, 100, 20) for n in (0, 80, 81, 90, 99, 100, 150)]
    assert penalties == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1, -1])
    assert overlong(5, 10, 10) == -0.5
    for length, budget, buffer in ((-1, 10, 5), (3, 10, 0), (3, 10, 11)):
        with pytest.raises(ValueError, match=f"length = {length}, budget = {budget}, buffer = {buffer}"):
            overlong(length, budget, buffer)


# ---- how readable the thinking is --------------------------------------------------------------

CONSISTENCY = [lambda text, code=code: language_consistency(text, code) for code in LANGUAGES]
OF_THINKING = [rewards.length, repetition, reflections, *CONSISTENCY]  # tidiness reads the answer too


def whole(thoughts: str, final: str = "3*(11-3)") -> str:
    return f"<think>{thoughts}</think><answer>{final}</answer>"


@pytest.mark.parametrize(
    "text, want",
    [
        ("<think>a\nb\n</think><answer>8</answer>", "a\nb\n"),
        ("a </think> b", "a "),  # the template opened <think>
        (" \n<think>\na</think>", "\na"),
        ("<think>a", "a"),  # truncated
        ("3+4", "3+4"),
        ("", ""),
        ("<think></think><answer>8", ""),
        ("</think>a</think>", ""),
        ("a<think>b</think>", "a<think>b"),
        ("<think><think>a</think>b</think>", "<think>a"),
        ("<Think>a</Think>", "<Think>a</Think>"),
    ],
)
def test_what_the_thinking_is(text, want):
    assert thinking(text) == want


@pytest.mark.parametrize(
    "text, want",
    [
        ("11-3=8,8*3=24:24 yes\n", "11 - 3 = 8 , 8 * 3 = 24 : 24 yes"),
        ("8*3=24:24对\n5+3=8再\n故3*8", "8 * 3 = 24 : 24 对 5 + 3 = 8 再 故 3 * 8"),
        ("Then, x2 is 3.14.", "then , x 2 is 3.14 ."),
        (r"\frac{1}{2} <answer>", r"\frac { 1 } { 2 } <answer>"),
        (r"\begin{aligned*}\Delta\\\end{aligned*}", r"\begin{aligned*} \delta \ \ \end{aligned*}"),
        ("ｗａｉｔ 𝐰𝐚𝐢𝐭 WAIT wa\u200bit", "wait wait wait wait"),
        ("e\u0301té été", "ete ete"),
        ("한국어 ｶﾅ 漢字", "한국어 カ ナ 漢 字"),
        ("a" * 50, f"{'a' * 24} {'a' * 24} aa"),
        ("<think> \t\u3000\n</think>a", ""),
    ],
)
def test_tokens_are_words_numbers_and_signs(text, want):
    assert tokens(text) == unicodedata.normalize("NFD", want).split() and rewards.length(text) == len(want.split())


ENGLISH, CHINESE = "so we see that it is right", "所以我们知道这是对的"


@pytest.mark.parametrize(
    "thoughts, language, want",
    [
        (ENGLISH, "en", 1.0),
        (ENGLISH, "zh", 0.0),
        (CHINESE, "zh", 1.0),
        (CHINESE, "en", 0.0),
        (f"{ENGLISH} {CHINESE}", "en", 7 / 17),
        (f"{ENGLISH}{CHINESE}", "zh", 10 / 17),  # without a space between them
        ("11-3=8,8*3=24:24 yes\n11-3=8,8*3=24:24对\n", "en", 0.5),
        ("5+3=8 then\n5+3=8再\n6+3=9再\n故3*(11-3)", "zh", 0.75),
        # what is of no language
        (f"{CHINESE}:A>B,C=3,x,λ,Δt,2πr,<answer>", "zh", 1.0),
        (rf"{CHINESE}\frac{{1}}{{2}}\boxed{{x}}\begin{{aligned}}\end{{aligned}}", "zh", 1.0),
        (f"{CHINESE}ＡＢ", "zh", 10 / 11),
        ("a sinθ", "en", 1.0),
        (f"{CHINESE}sinθ", "zh", 10 / 11),
        # a single word of another script
        ("wait привет", "en", 0.5),
        ("wait привет", "ru", 0.5),
        ("wait γειά", "el", 0.5),
        ("안녕 여러분 hello", "ko", 2 / 3),
        ("مرحبا بكم hello", "ar", 2 / 3),
        ("हिन्दी में hello", "hi", 2 / 3),
        ("これは漢字", "ja", 1.0),
        ("これは漢字", "zh", 0.4),
        ("これは漢字 kanji", "ja", 5 / 6),
        ("größer façade niño", "de", 1.0),
        ("สวัสดี hello", "en", 0.5),  # a script of none of the languages
        # what might fool it
        ("ｓｏ ｗｅ ｋｎｏｗ", "zh", 0.0),
        ("ｓｏ ｗｅ ｋｎｏｗ", "en", 1.0),
        ("对 𝐡𝐞𝐥𝐥𝐨 ⓗⓔⓛⓛⓞ ʜᴇʟʟᴏ", "zh", 0.25),
        ("对 h\u200be\u200bl\u200bl\u200bo", "zh", 0.5),  # not five variables
        ("对 h\u0336e\u0336l\u0336l\u0336o\u0336", "zh", 0.5),
        ("对 h\u00ade\x00l\u2060l\ufe0fo", "zh", 0.5),
        ("right w\u0430it", "en", 0.5),  # Cyrillic а: no word of any language
        ("right w\u0430it", "ru", 0.0),
        ("пр\u0438вет в\u006ft", "ru", 0.5),
        ("对 wαiτ", "zh", 0.5),
        ("right hοuse", "en", 0.5),  # Greek ο
        (f"对{'weknowthis' * 24}", "zh", 1 / 11),  # one long word is ten
        ("right\u0301\u0323\u0301", "en", 1.0),
        # nothing to count
        ("", "en", 0.0),
        ("11-3=8,8*3=24:24\n", "en", 0.0),
        ("x = A + λ \\frac <think> 👍", "en", 0.0),
    ],
)
def test_language_consistency(thoughts, language, want):
    assert language_consistency(whole(thoughts), language) == pytest.approx(want)
    assert language_consistency(f"{thoughts}</think>好 good", language) == pytest.approx(want)


def test_languages_of_one_script_are_the_same_and_others_are_refused():
    assert {language_consistency(whole("wir wissen"), code) for code in ("en", "de", "fr", "es")} == {1.0}
    for language in ("tlh", "", "EN", "english"):
        with pytest.raises(ValueError, match=f"language '{language}': no script is known for it; allowed: en, de, fr"):
            language_consistency("so", language)


def test_repetition_by_hand():
    """Of the bigrams so it, it is, is so, so it, it is two occurred before."""
    assert repetition(whole("so it is so it is"), n=2) == pytest.approx(2 / 5)
    assert repetition(whole("So it is, so it IS"), n=2) == pytest.approx(2 / 6)  # the comma makes two more
    line = "11-3=8,8*3=24:24 yes\n"  # 14 tokens
    assert repetition(whole(line)) == 0.0
    assert repetition(whole(line * 3)) == pytest.approx(13 / 27)  # 42 tokens, 27 16-grams, 14 of them distinct
    assert repetition("a b c d e f g") == 0.0 and repetition("a " * 16) == 0.0 and repetition("a " * 17) == 0.5
    assert repetition("a b", n=1) == 0.0 and repetition("a a a a", n=1) == 0.75
    assert repetition("", n=1) == 0.0
    assert repetition(whole("a b", line * 9), n=2) == 0.0  # the answer is not thinking
    with pytest.raises(ValueError, match="n = 0: at least 1"):
        repetition("a", n=0)


@pytest.mark.parametrize(
    "loop", ["wait ", "no\n", "对", "yes", "ｙｅｓ", "สวัสดี", "\\frac", "<think>", "y\u200be\u0301s", "7 ", "👍"]
)
def test_long_loops_are_near_one(loop):
    assert repetition(whole(loop * 2000)) > 0.95


@pytest.mark.parametrize(
    "thoughts, final, want",
    [
        ("11-3=8,8*3=24:24 yes\nso 3*(11-3)", "3*(11-3)", 1),
        ("11-3=8,8*3=24:24对\n故3*(11-3)\n", "3*(11-3)", 1),
        ("so 3*(11-3)", "3 * (11 - 3)", 1),
        ("hm\n SO  3 * (11-3). \n \n", "3*(11-3)", 1),
        *((f"{words}", "8", 1) for words in (
            "So the answer is 8.", "Therefore, 8", "thus: 8", "Hence 8", "Answer: 8", "the answer is 8",
            "The final answer is: 8.", "So, the answer is 8", "answer 8", "answer is 8", "所以 8。", "因此，答案是8。",
            "答案：8", "答案是：8", "答案为8", "所以答案是 8", r"So the answer is $\boxed{8}$.",
            r"so \boxed{8}", "so8", "so\u200b 8\u200b", "so 8\n\u200b", "so 8\r\n",
        )),
        ("so 8", r"\boxed{8}", 1),
        ("so A is a knave", "A is a knave", 1),
        ("so  yes", "yes", 1),
        # another one than the answer
        ("so 3*(11-4)", "3*(11-3)", 0),
        ("so -8", "8", 0),
        ("so 8 or 9", "8", 0),
        ("so 8 so 9", "9", 0),
        ("so 8 8", "8", 0),
        ("so 8..", "8", 0),
        ("so ８", "8", 0),
        ("so a", "A", 0),
        # no summary, or not at the end
        ("3*(11-3)", "3*(11-3)", 0),
        ("some 8", "8", 0),
        ("thusly 8", "8", 0),
        ("answers 8", "8", 0),
        ("also so 8", "8", 0),
        ("so 8\nhm", "8", 0),
        ("so", "8", 0),
        ("so\n8", "8", 0),
        ("so .", ".", 0),
        ("", "8", 0),
        ("hm", "8", 0),
        # another answer before
        ("so 9\nhm\nso 8", "8", 0),
        ("s\u200bo 9\nso 8", "8", 0),
        ("故9\n故8", "8", 0),
        ("The answer is 9\nso 8", "8", 0),
        ("so 8\nso 8", "8", 1),
        ("so 8\nhm\nso  8.", "8", 1),
        ("So we try again\nso 9-1=8\nSo\nso 8", "8", 1),
        ("so x=9\nso x=8", "x=8", 0),
        ("So we must try once more\nso yes", "yes", 1),
        ("so no\nso yes", "yes", 0),
        ("故我们再试\n故8", "8", 1),
    ],
)  # fmt: skip
def test_tidiness(thoughts, final, want):
    assert tidiness(whole(thoughts, final)) == want


@pytest.mark.parametrize(
    "text",
    ["", "so 8", "<think>so 8", "<think>so 8</think>", "so 8<answer>8</answer>", "so 8<answer>8</answer></think>",
     "so 8</think><answer></answer>", "so 8</think><answer>8</answer><answer>8</answer>", "</think><answer>8</answer>"],
)  # fmt: skip
def test_without_an_answer_nothing_is_tidy(text):
    assert tidiness(text) == 0.0


@pytest.mark.parametrize(
    "thoughts, want",
    [
        ("Wait, this is a mistake. However, but retry: error! Verify (wrong) evaluate 'check'", 10),
        ("WAIT ｗａｉｔ wa\u200bit", 3),
        ("double-check, check_sum, check2", 3),
        ("awaits waiting butter checks checked verified mistaken errors evaluation checkmate", 0),
        (r"\check{x} <answer>", 0),
        ("w\u0430it ch\u0435ck", 0),  # Cyrillic
        ("等等，检查一下，但是错了", 4),
        ("不但 不错 等 过", 0),
        ("等一下检查check核对", 4),
        ("11-3=8,8*3=24:24 no\n24对", 0),
        ("", 0),
    ],
)
def test_reflections(thoughts, want):
    assert reflections(whole(thoughts, "wait")) == want


PIECES = [*TAGS, "so ", "故", "8", "3*4", "wait", "等等", "\n", " ", "x", "a\u0301", "\u200b", r"\boxed{8}", "да", "."]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join))


@given(TEXTS)
def test_measures_are_in_their_ranges_and_see_the_thinking_alone(text):
    assert all(0 <= share(text) <= 1 for share in (repetition, tidiness, *CONSISTENCY))
    assert 0 <= reflections(text) <= rewards.length(text)
    assert not tidiness(text) or answer(text)
    for measure in OF_THINKING:
        assert measure(f"{text}</think>") == measure(f"{text}</think>wait 好 好 привет<answer>9</answer>")


WORDS = ["привет", "中", "hello", "สวัสดี", "γειά", "w\u0430it", "मैं"]


@given(TEXTS, st.sampled_from(WORDS), st.sampled_from(list(LANGUAGES)))
def test_foreign_words_never_raise_consistency_nor_own_ones_lower_it(text, word, language):
    text = text.replace("</think>", "")
    own = language_consistency(word, language)
    before, after = (language_consistency(t, language) for t in (text, f"{text} {word}"))
    assert after >= before if own else after <= before
    assert after < 1 or own
    assert language_consistency(f"{text} 12 + x <answer> \\frac", language) == before


@given(TEXTS)
def test_folding_is_what_unicode_says_apart_from_the_marks(text):
    """As NFKC_Casefold, by the character; a second time it changes nothing."""
    folded = text.translate(rewards.FOLDS)
    assert folded.translate(rewards.FOLDS) == folded
    assert tokens(unicodedata.normalize("NFD", text)) == tokens(unicodedata.normalize("NFC", text))


@given(TEXTS, st.integers(2, 6))
def test_a_text_said_k_times_has_no_more_ngrams_than_tokens(text, k):
    once = f"x {text.replace('</think>', '')}\n"
    tokens_once = rewards.length(once)
    assert rewards.length(once * k) == k * tokens_once
    assert repetition(once * k) >= 1 - tokens_once / max(1, k * tokens_once - 15)


LONG = ["a", "a ", "wait ", "中", "等等", "8", "8.", "\\", "\\begin{", "\\begin{a", "<", "</think", "so ", "so\n",
        "so 8\n", "answer is ", "the ", "\n", " ", "\u0301", "\u0301\u0323", "\u200b", "\ufdfa", "w\u0430", "αa", "不",
        "{", "\\boxed{", "\ud800", "👍", ".", "$"]  # fmt: skip


@pytest.mark.parametrize("piece", LONG, ids=ascii)
def test_measures_of_long_texts_are_fast(piece):
    """1e5 characters, folded: within the thinking, and as the answer and its summary."""
    long = piece * (100_000 // max(len(piece), len(piece.translate(rewards.FOLDS))))
    for text in (whole(long), whole(f"so {long}", long), whole(f"so the{long}x\nso 8", "8"), f"<think>{long}"):
        assert sum(quickest(measure, text, times=1) for measure in (*OF_THINKING[:4], tidiness)) < 3

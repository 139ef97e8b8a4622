"""tokenizer_training.py: digit policies and patterns by hand, any text given back, and transformers' equal tokens."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.tokenizer import EOS, PAD, QUOTE, TAGS, Tokenizer
from minir1.tokenizer_training import DIGITS, PRESETS, Recipe, numbers, train

TEXTS = [
    "The total is 1234567 = 1,234,567, and 12 of 345 cats don't sit. naïve café\n",
    "def read_it(self, x1):\n    if x1 == 10:\n        return self.read_it(x1 + 2.5)\n\n\n",
    r"\frac{1}{2} + \sqrt{x^2} = \frac{3}{4}, so \frac{a}{b} $x_1$" + "\r\n",
    "我们说你好，世界。これはペンです。コーヒー 한국어 текст\n",
] * 9
HARD = {
    "emoji": "👨‍👩‍👧 ❤️ 🇩🇪 👍🏽 🤖x",
    "cjk": "我有3个苹果。これは2つのペンです 한국어 ㊗",
    "marks": "e\u0301 a\u0300\u0323 \u0301 ก็ क्षि Z͑ͫ̓ͪ",
    "digits": "7 12 345 1234 12345 123456 1234567 007 0.125 1,234,567.89 x1y22z333 3.14159265358979",
    "other numbers": "½ ² Ⅻ ٣٤٥٦ ๑๒๓๔ 𝟙𝟚𝟛 ①②",
    "line ends": "a\r\nb\rc\n\r\n\n\nd\x0b\x0ce\x85f\u2028g",
    "nulls": "\x00a\x00\x00\x01\x7f\ufffd\ufeff",
    "spaces": "  a   b\t\tc \u00a0\u3000\u200b d    \n        e   ",
    "code": "def f(x_1,*a):\n\tif x>=0x1F and a[-1]!='\\n':\n        return f\"{x:>10}\"  # ok\n\n\n",
    "latex": r"\begin{align*} \frac{-b\pm\sqrt{b^2-4ac}}{2a} \\ \text{if } x\in\mathbb{R} \end{align*}",
    "tokens": f"a{EOS}b<think>c</think>{PAD}<|unk|><thin",
    "nothing": "",
}
SMALL = {name: replace(recipe, size=262 + 1100 + 200) for name, recipe in PRESETS.items()}
MADE = {(name, digits): train(TEXTS, replace(SMALL[name], digits=digits)) for name in SMALL for digits in DIGITS}
each = pytest.mark.parametrize("tokenizer", MADE.values(), ids=map("-".join, MADE))


def pieces(tokenizer, text):
    """The tokens as text; of ASCII."""
    return [tokenizer.backend.id_to_token(t).replace("Ġ", " ").replace("Ċ", "\n") for t in tokenizer.encode(text)]


def digits_of(tokenizer, text):
    return " ".join(piece for piece in pieces(tokenizer, text) if piece.isdigit())


# ---- digits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "digits, expected",
    [
        ("single", ["7", "1 2", "1 2 3 4", "1 2 3 4 5", "1 2 3 4 5 6", "1 2 3 4 5 6 7", "0 0 7", "1 0 0 0"]),
        ("left_threes", ["7", "12", "123 4", "123 45", "123 456", "123 456 7", "007", "100 0"]),
        ("right_threes", ["7", "12", "1 234", "12 345", "123 456", "1 234 567", "007", "1 000"]),
        ("whole", ["7", "12", "1 2 3 4", "1 2 3 4 5", "1 2 3 4 5 6", "1 2 3 4 5 6 7", "0 0 7", "1 0 0 0"]),
    ],
)
def test_each_policy_by_hand(name, digits, expected):
    for text in ("{}", "x{}y", "({})", " {} ", "a={}\n", "€{}你"):
        for number, groups in zip(("7", "12", "1234", "12345", "123456", "1234567", "007", "1000"), expected):
            assert digits_of(MADE[name, digits], text.format(number)) == groups


@each
def test_a_token_with_a_digit_holds_nothing_else(tokenizer):
    vocabulary = tokenizer.backend.get_vocab()
    assert all(token.isdigit() for token in vocabulary if any(c in "0123456789" for c in token))
    text = " 12 345,678 x9\n10"
    assert "".join(p for p in pieces(tokenizer, text) if p.isdigit()) == "123456789" + "10"


def test_every_number_of_a_policy_is_one_token_however_rare():
    for digits in ("left_threes", "right_threes"):
        tokenizer = MADE["math", digits]
        for text in [f"{n:0{length}}" for length in (1, 2, 3) for n in range(10**length)]:
            assert len(tokenizer.encode(text)) == 1
    tokenizer = train(TEXTS, replace(SMALL["code"], digits="whole", bound=130))
    assert [len(tokenizer.encode(str(n))) for n in range(131)] == [1] * 131
    assert digits_of(tokenizer, "131 01 130") == "1 3 1 0 1 130"
    assert {name: len(numbers(name, 999)) + 10 for name in DIGITS} == {
        "single": 10, "left_threes": 1110, "right_threes": 1110, "whole": 1000,
    }  # fmt: skip


def test_a_comma_divides_a_number_and_letters_do():
    tokenizer = MADE["math", "right_threes"]
    assert pieces(tokenizer, "1,2345") == ["1", ",", "2", "345"] and digits_of(tokenizer, "1e1000") == "1 1 000"


@pytest.mark.parametrize("digits", DIGITS)
def test_a_number_of_any_length_takes_time_linear_in_it(digits):
    """A pattern that looks ahead at each group would need minutes."""
    tokenizer, length = MADE["code", digits], 200_000
    began = time.process_time()
    tokens = tokenizer.encode("7" * length)
    assert len(tokens) == (length if digits in ("single", "whole") else -(-length // 3))
    assert tokenizer.decode(tokens[:4]).startswith("77") and time.process_time() - began < 10


# ---- patterns ----------------------------------------------------------------------------------


def divided(name, text):
    """The pieces that a preset divides a text into, joined as they were."""
    backend = MADE[name, "single"].backend
    return [text[begin:end] for _, (begin, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


def test_pieces_of_mathematics():
    assert divided("math", r"so \frac{x+1}{2} >= a") == [
        "so", r" \frac", "{", "x", "+", "1", "}", "{", "2", "}", " >", "=", " a",
    ]  # fmt: skip


def test_pieces_of_code():
    assert divided("code", "if x_1 >= y:\n\n        return  f(z)\r\n\tend") == [
        "if", " x_", "1", " >=", " y", ":", "\n\n        ", "return", "  ", "f", "(", "z", ")", "\r\n\t", "end",
    ]  # fmt: skip


def test_pieces_of_languages():
    assert divided("languages", "I don't like 日本のコーヒー, l’été! naïve") == [
        "I", " don't", " like", " ", "日本", "の", "コーヒー", ",", " l’été", "!", " naïve",
    ]  # fmt: skip
    decomposed = "cafe\u0301 क्षि"
    assert divided("languages", decomposed) == ["cafe\u0301", " क्षि"]


# ---- any text ----------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("kind", HARD)
def test_hard_texts_are_given_back(tokenizer, kind):
    tokens = tokenizer.encode(HARD[kind])
    assert tokenizer.decode(tokens) == HARD[kind]
    assert tokenizer.encode_batch([HARD[kind]]) == [tokens]


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.text(alphabet="019 ab_\n\r\t\\.,é你の'<think>", max_size=40)))
def test_any_text_is_given_back(name, text):
    text = text.replace(QUOTE, "")  # a noncharacter, at which `encode` divides a text
    for digits in DIGITS:
        tokenizer = MADE[name, digits]
        assert tokenizer.decode(tokenizer.encode(text)) == text


@each
def test_transformers_opens_the_folder_and_encodes_equally(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for text in [*HARD.values(), *TEXTS[:4], "1234567" * 99]:
        tokens = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == tokens == again.encode(text)
        assert theirs.decode(tokens) == text == again.decode(tokens)
    assert len(theirs) == tokenizer.size == again.size
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == (EOS, PAD, None)
    assert theirs.convert_tokens_to_ids(list(TAGS)) == [tokenizer.id(tag) for tag in TAGS]


# ---- the rest of a recipe ----------------------------------------------------------------------


def test_special_tokens_come_first_and_further_ones_after_them():
    tokenizer = train(TEXTS, replace(SMALL["code"], special=("<|tool|>", "<|user|>")))
    names = (EOS, PAD, *TAGS, "<|tool|>", "<|user|>")
    assert [tokenizer.id(name) for name in names] == list(range(8))
    assert tokenizer.encode(f"a<|tool|>{TAGS[0]}")[1:] == [6, 2]
    assert sorted(tokenizer.backend.get_vocab().values()) == list(range(tokenizer.size))


def test_the_size_is_that_of_all_tokens_and_less_where_the_texts_give_no_more():
    assert train(TEXTS, replace(SMALL["code"], size=300)).size == 300
    assert train(TEXTS, replace(SMALL["math"], size=1400)).size == 1400
    assert train(["aaaa"], replace(SMALL["code"], size=300)).size == 262 + 2  # aa, aaaa


def test_the_page_names_digits_and_size_of_each_preset():
    page = (Path(__file__).parent.parent / "docs" / "own_text.md").read_text(encoding="utf-8")
    for name, recipe in PRESETS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` | ")]
        assert row.endswith(f" | `{recipe.digits}` | {recipe.size:,} |")
    assert all(f"| `{digits}` | " in page for digits in DIGITS)


def test_training_is_a_function_of_the_texts():
    one, other = (train(iter(TEXTS), SMALL["languages"]).backend.to_str() for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"digits": "fours"}, "digits = 'fours': one of single, left_threes, right_threes, whole"),
        ({"bound": 8}, "bound = 8: at least 9"),
        ({"size": 0}, "size = 0: at least 1"),
        ({"size": 1361}, "size = 1361: at least 1362, 6 special tokens, 256 bytes and 1100 numbers"),
        ({"special": ("",)}, "special = .*: different texts, none of them empty"),
        ({"special": ("a", "a")}, "special = .*: different texts"),
        ({"special": (EOS,)}, "special = .*: different texts"),
        ({"patterns": ("(",)}, r"patterns = \('\(',\): "),
    ],
)
def test_a_wrong_recipe_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        train(TEXTS, Recipe(**(vars(SMALL["math"]) | changes)))

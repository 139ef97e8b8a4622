"""Byte-level BPE for a kind of text: how it is divided into pieces, and how numbers become tokens.

    tokenizer = train(texts, PRESETS["math"])

A text is divided into numbers and what lies between them, numbers by the digit policy and the rest by patterns; BPE
(Sennrich, Haddow, Birch, arXiv:1508.07909) joins bytes within a piece only. It learns nothing about digits: the
numbers that a policy makes are put into the vocabulary, so that each is one token, however rare it is in the texts.

    digits            1234567 becomes     tokens
    single            1 2 3 4 5 6 7          10    Llama 2, Qwen2.5, DeepSeek-Coder
    left_threes       123 456 7           1,110    GPT-4, Llama 3, DeepSeek-V3 and R1
    right_threes      1 234 567           1,110    place values stay aligned (Singh, Strouse, arXiv:2402.14903)
    whole             1 2 3 4 5 6 7     bound+1    numbers up to the bound are one token, larger ones single digits

docs/own_text.md says where each of these models states its policy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import tokenizers
from tokenizers import Regex, pre_tokenizers

from minir1.settings import at_least
from minir1.tokenizer import EOS, PAD, TAGS, Tokenizer, train_bpe

DIGITS = ("single", "left_threes", "right_threes", "whole")
NUMBER = r"\p{Nd}+"  # a run of decimal digits of any script
GROUPS = {  # patterns that divide a number, one after another
    "single": (r"\p{Nd}",),
    "left_threes": (r"\p{Nd}{1,3}",),
    # The first group is split off once, and the rest from the left: a lookahead at each group would be quadratic.
    "right_threes": (r"\A\p{Nd}{1,2}(?=(?:\p{Nd}{3})+\z)", r"\p{Nd}{1,3}"),
    "whole": (),
}


def numbers(digits: str, bound: int) -> list[str]:
    """The numbers of several digits that are one token in any case."""
    if digits == "single":
        return []
    if digits == "whole":
        return [str(n) for n in range(10, bound + 1)]
    return [f"{n:0{length}}" for length in (2, 3) for n in range(10**length)]


def count_numbers(digits: str, bound: int) -> int:
    """How many `numbers` there are."""
    return {"single": 0, "whole": bound - 9}.get(digits, 10**2 + 10**3)


@dataclass(frozen=True)
class Recipe:
    """What a tokenizer is trained by.

    patterns: regular expressions of Oniguruma, applied one after another to what lies between numbers. What a pattern
    matches is a piece, and so is what lies between two matches; nothing of a text is lost. ValueError if `size` is too
    small for the special tokens, the 256 bytes and the numbers.
    """

    patterns: tuple[str, ...]
    digits: str  # one of DIGITS
    size: int  # V, tokens in all; fewer if the texts hold no more
    bound: int = 999  # with digits = "whole": the largest number that is one token
    special: tuple[str, ...] = ()  # special tokens beside end, padding and the think and answer tags

    def __post_init__(self):
        at_least(self, 1, "size")
        at_least(self, 9, "bound")
        if self.digits not in DIGITS:
            raise ValueError(f"digits = {self.digits!r}: one of {', '.join(DIGITS)}")
        fixed = [EOS, PAD, *TAGS]
        count, whole = len([*fixed, *self.special]), count_numbers(self.digits, self.bound)
        if self.size < (least := count + 256 + whole):
            parts = f"{count} special tokens, 256 bytes and {whole} numbers"
            raise ValueError(f"size = {self.size}: at least {least}, {parts}")
        if not all(self.special) or len({*fixed, *self.special}) < len(fixed) + len(self.special):
            raise ValueError(f"special = {self.special}: different texts, none of them empty or one of {fixed}")


WORDS = r" ?[\p{L}\p{M}]+"  # letters with their accents, and one space before them
SPACES = r"\s+(?!\S)|\s+"  # the last space belongs to the next word
PRESETS = {
    # LaTeX commands are pieces; each sign is one of its own, so that no formula hides in a token.
    "math": Recipe((rf" ?\\\p{{L}}+|{WORDS}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]|[\r\n]+|{SPACES}",), "right_threes", 8192),
    # A line end and the indentation after it are one piece; identifiers keep their underscores.
    "code": Recipe((r"(?:\r?\n)+[ \t]*| ?[\p{L}\p{M}_]+| ?[^\s\p{L}\p{M}\p{N}_]+|[^\S\r\n]+|\s+",), "single", 4096),
    # Chinese and Japanese write no spaces: a run of each script is a piece. An apostrophe may stand within a word.
    "languages": Recipe(
        (
            r"\p{Han}+|\p{Hiragana}+|[\p{Katakana}ー]+",
            rf"{WORDS}(?:['’][\p{{L}}\p{{M}}]+)*| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|[\r\n]+|{SPACES}",
        ),
        "single",
        16384,
    ),
}


def pre_tokenizer(patterns: Iterable[str], digits: str) -> pre_tokenizers.PreTokenizer:
    """Divides a text into numbers, these by the policy, and the rest by the patterns; writes bytes as characters."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (NUMBER, *GROUPS[digits], *patterns)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(texts: Iterable[str], recipe: Recipe) -> Tokenizer:
    """Learn a tokenizer from texts, which may be a stream: only the number of each different piece is in memory.

    ValueError for a pattern that is no regular expression.
    """
    fixed = numbers(recipe.digits, recipe.bound)
    try:
        learn, divide = (pre_tokenizer(recipe.patterns, digits) for digits in ("single", recipe.digits))
    except Exception as error:  # the library raises the bare class
        raise ValueError(f"patterns = {recipe.patterns}: {error}") from error
    learned = train_bpe(texts, recipe.size - len(fixed), divide=learn, special=recipe.special)
    state = json.loads(learned.backend.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {number: len(vocabulary) + i for i, number in enumerate(fixed)}
    state["model"]["ignore_merges"] = True  # a piece that is in the vocabulary is that token
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = divide
    return Tokenizer(backend)

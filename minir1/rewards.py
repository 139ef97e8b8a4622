"""Rewards as functions of the text that a model wrote, independent of tasks, models and torch.

The text includes its tags (DeepSeek-R1, arXiv:2501.12948, section 2.2: accuracy and format rewards, by rule). Tags are
matched exactly: other cases, inner blanks and lookalikes are plain text. A chat template may already have written the
leading `<think>`, so it may be absent; `</think>` may not. How readable the thinking is (language consistency,
repetition, tidiness, length, reflective words) is measured in what stands before `</think>`.
"""

import re
import unicodedata

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BLANKS = (  # white space, controls, and what Unicode says to display as nothing (Default_Ignorable_Code_Point)
    r"[\s\x00-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
BLANK = re.compile(f"{BLANKS}*")
INVISIBLE = re.compile(rf"(?!\s){BLANKS}")


def format_reward(text: str, allow_empty_think: bool = False) -> float:
    """1.0 iff the whole text is `<think>…</think> <answer>…</answer>`, else 0.0.

    Each tag occurs exactly once and in this order (the leading `<think>` may be absent), the answer is not blank, and
    only white space is between or outside the two blocks. Blank thinking, invisible characters included, is malformed,
    since skipping the thinking would be the cheapest way to this reward; `allow_empty_think=True` is for the control
    that must not think.
    """
    body = text.strip().removeprefix("<think>")
    if [body.count(tag) for tag in TAGS] != [0, 1, 1, 1]:
        return 0.0
    thought, rest = body.split("</think>")
    rest = rest.strip()
    if not (rest.startswith("<answer>") and rest.endswith("</answer>")):
        return 0.0
    content = rest.removeprefix("<answer>").removesuffix("</answer>")
    return float(not BLANK.fullmatch(content) and (allow_empty_think or not BLANK.fullmatch(thought)))


def answer(text: str) -> str | None:
    """The stripped content of the only `<answer>…</answer>`, if it comes after the thinking, else None.

    None if an answer tag is missing, repeated or in the wrong order, if the content is blank, if the thinking before it
    was never closed (or was opened more often than closed), or if a think tag follows `<answer>`. More lenient than
    `format_reward`: text before, between or after the blocks costs the format reward, not the answer.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before, rest = text.split("<answer>")
    content, closed, _ = rest.partition("</answer>")
    if not closed or "<think>" in rest or "</think>" in rest:
        return None
    still_open = before.count("<think>") > before.count("</think>")
    if still_open or before.rfind("</think>") <= before.rfind("<think>"):
        return None
    return None if BLANK.fullmatch(content) else content.strip()


def overlong(length: int, budget: int, buffer: int) -> float:
    """The soft penalty of long answers (DAPO, arXiv:2503.14476, equation 13): 0 … -1, linear over the last tokens.

        0                                     length <= budget - buffer
        ((budget - buffer) - length) / buffer   up to the budget
        -1                                    beyond it

    length, budget, buffer: tokens. An answer of exactly `budget` tokens, truncated or not, gets -1.
    Raises ValueError for a negative length and unless 0 < buffer <= budget.
    """
    if length < 0 or not 0 < buffer <= budget:
        raise ValueError(f"length = {length}, budget = {budget}, buffer = {buffer}: 0 < buffer <= budget, length >= 0")
    return max(-1.0, min(0.0, (budget - buffer - length) / buffer))


# ---- how readable the thinking is ---------------------------------------------------------------------------------
#
# Text is compared after folding, character by character: compatibility forms become plain (fullwidth ｗ, bold 𝐰 -> w),
# upper case lower, and combining marks (accents, vowel signs) and invisible characters disappear. Not with
# unicodedata.normalize on the whole text: its time is quadratic in a long run of combining marks.

HAN = "\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\U0001aff0-\U0001b16f"
LATIN = "a-z\xaa-\u02ff\u1d00-\u1dbf\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua7ff\uab30-\uab68"
GREEK = "\u0370-\u03ff\u1f00-\u1fff"
SCRIPTS = {  # script -> a word of it, folded; a Greek letter beside Latin ones is a symbol, as in Δx and sinθ
    "Latin": re.compile(f"[{GREEK}]?[{LATIN}]+[{GREEK}]?"),
    "Han": re.compile(f"[{HAN}]"),
    "Han and kana": re.compile(f"[{HAN}{KANA}]"),
    "Cyrillic": re.compile("[\u0400-\u052f\u1c80-\u1c8a\ua640-\ua69f]+"),
    "Hangul": re.compile("[\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff]+"),
    "Arabic": re.compile("[\u0600-\u06ff\u0750-\u077f\u0870-\u08ff]+"),
    "Devanagari": re.compile("[\u0900-\u097f\ua8e0-\ua8ff]+"),
    "Greek": re.compile(f"[{GREEK}]+"),
}
LANGUAGES = dict.fromkeys(("en", "de", "fr", "es"), "Latin") | {"zh": "Han", "ja": "Han and kana", "ru": "Cyrillic"}
LANGUAGES |= {"ko": "Hangul", "ar": "Arabic", "hi": "Devanagari", "el": "Greek"}

LETTER = rf"[^\W\d_{HAN}{KANA}]"  # of an alphabet
WORD = rf"{LETTER}{{1,24}}|[{HAN}{KANA}]"  # cut after 24 letters: words glued together are several
MARKUP = r"</?(?:think|answer)>|\\(?:begin|end)\{[a-z]*\*?\}|\\[a-z]+"  # tags and LaTeX commands
VARIABLE = re.compile(f"[{LATIN}{GREEK}]|[{GREEK}][{LATIN}]|[{LATIN}][{GREEK}]")  # x, A, θ, Δt, πr: of no language
WORDS = re.compile(f"{MARKUP}|({WORD})")
TOKENS = re.compile(rf"\d+(?:\.\d+)?|{WORD}|{MARKUP}|\S")

CONNECTIVES = "so", "thus", "therefore", "hence", "故", "所以", "因此"
NAMED = r"(?:the\s+)?(?:final\s+)?answer(?:\s+is)?(?![a-z])|答案(?:是|为)?"
LEADING = "|".join(word + "(?![a-z])" * word.isascii() for word in CONNECTIVES)
SUMMARY = re.compile(  # a line that begins with a connective, or with "answer"; what follows is what it states
    rf"(?:(?:{LEADING})\s*[,，]?\s*(?:{NAMED})?|{NAMED})\s*[:：]?(.*)", re.IGNORECASE
)
BOXED = re.compile(r"\$?\\boxed\{(.*)\}\$?")

# DeepSeek-R1 in Nature 645 (2025), doi:10.1038/s41586-025-09422-z, Extended Data Figure 1a; and counterparts of these
# ten, translated for minir1, since the paper counts no Chinese words
REFLECTIVE = frozenset("wait mistake however but retry error verify wrong evaluate check".split())
REFLECTIVE_ZH = "等等 等一下 错误 错 然而 但是 但 不过 可是 重试 验证 核实 评估 检查 核对".split()
REFLECTIONS_ZH = re.compile(f"不[但错]|({'|'.join(REFLECTIVE_ZH)})")  # 不但 (not only), 不错 (not bad): none


class _Folds(dict):
    """Code point -> its folded text, for `str.translate`; filled with the characters that occur."""

    def __missing__(self, code: int) -> str:
        parts = (c for c in unicodedata.normalize("NFKD", chr(code)) if unicodedata.category(c)[0] != "M")
        self[code] = INVISIBLE.sub("", "".join(parts)).casefold()
        return self[code]


FOLDS = _Folds()


def thinking(text: str) -> str:
    """The thinking: what stands before the first `</think>`, or all of the text, without the leading `<think>`.

    White space is kept, but for that before `<think>`. A text that was truncated within its thinking is all thinking;
    so is one without any tag.
    """
    return re.sub(r"\A\s*<think>", "", text.partition("</think>")[0])


def tokens(text: str) -> list[str]:
    """The thinking in words, numbers and single signs, folded: what `length` counts and `repetition` compares.

    A word is a run of letters of an alphabet, or one Chinese character or kana; a tag and a LaTeX command are one
    token. Runs are cut after 24 letters, so that a loop without spaces is several tokens too. White space separates
    and is no token, case and accents make no difference.
    """
    return TOKENS.findall(thinking(text).translate(FOLDS))


def length(text: str) -> int:
    """How many words, numbers and signs the thinking has (DeepSeek-R1, section 2.2.4, follows its growth), 0 or more.

    Independent of a tokenizer, so that different models compare (`tokens`).
    """
    return len(tokens(text))


def language_consistency(text: str, language: str) -> float:
    """The share of the thinking's words that are in the target language, 0 … 1 (DeepSeek-R1, section 2.3.2).

        words of the language / words

    A language is known by its script: a run of letters of one alphabet is a word, and so is each Chinese character and
    kana. So en, de, fr and es are the same here, and a Chinese sentence passes for Japanese. Numbers, signs, tags,
    LaTeX commands and variables (a single Latin or Greek letter, Δt) count for no language; names of units and
    functions (cm, sin) are Latin words. A word of mixed scripts, such as Latin with a Cyrillic а in it, counts as a
    word of no language. Fullwidth letters are Latin ones; accents and invisible characters are ignored.
    Thinking without any word gets 0: else leaving out all words would be the cheapest way to this reward. One word
    of the language is enough for 1. ValueError for a language that is not in LANGUAGES.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r}: no script is known for it; allowed: {', '.join(LANGUAGES)}")
    found = words(thinking(text))
    return sum(map(bool, map(SCRIPTS[LANGUAGES[language]].fullmatch, found))) / max(1, len(found))


def words(text: str) -> list[str]:
    """The words of a text, folded, as `language_consistency` counts them."""
    folded = text.translate(FOLDS)
    return [word for word in WORDS.findall(folded) if word and not VARIABLE.fullmatch(word)]


def repetition(text: str, n: int = 16) -> float:
    """The share of the thinking's n-grams of `tokens` that occurred before in it, 0 … 1; near 1 in a long loop.

        1 - distinct n-grams / n-grams

    As seq-rep-n of Welleck et al. (arXiv:1908.04319); DeepSeek-R1, section 2.2.4, names poor readability as R1-Zero's
    drawback. Sixteen tokens are about a line of sums: shorter n-grams recur in every search that goes on from one
    beginning. 0 for fewer than n tokens. ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n = {n}: at least 1")
    found = tokens(text)
    grams = list(zip(*(found[i:] for i in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def tidiness(text: str) -> float:
    """1.0 iff the thinking closes with a summary that states the answer, and none before states another; else 0.0.

    DeepSeek-R1's cold start (section 2.3.1) ends each response with a summary. Here it is the last line of the thinking
    that is not blank. It begins with a connective (CONNECTIVES, "the answer is", 答案是; in any case, `:` may follow),
    and the rest is `answer(text)`, apart from white space, a full stop at the end and \\boxed{} around it. An earlier
    line that begins so states another answer if the rest differs, has no more words than the answer, and has no `=`
    that the answer lacks: "so 3*4" does where the answer is 3+4, "So we try again" and "so 3*4=12" do not. Where
    answers are sentences, an intermediate conclusion ("so A is a knave") counts as one. 0.0 without an answer.
    """
    lines = [line.strip() for line in INVISIBLE.sub("", thinking(text)).splitlines() if line.strip()]
    final = INVISIBLE.sub("", answer(text) or "")
    wanted = _bare(final)
    if not wanted or not lines or not SUMMARY.match(lines[-1]):
        return 0.0
    *earlier, last = (match[1] for match in map(SUMMARY.match, lines) if match)
    others = (claim for claim in earlier if _bare(claim) not in ("", wanted) and ("=" not in claim or "=" in wanted))
    most = len(words(final))
    return float(_bare(last) == wanted and all(len(words(claim)) > most for claim in others))


def _bare(claim: str) -> str:
    """What a summary states, without white space, full stop and box."""
    claim = "".join(claim.split()).removesuffix(".").removesuffix("。")
    boxed = BOXED.fullmatch(claim)
    return boxed[1] if boxed else claim


def reflections(text: str) -> int:
    """How many reflective words the thinking has, 0 or more: the ten that DeepSeek-R1's paper in Nature counts
    (REFLECTIVE), and Chinese counterparts (REFLECTIVE_ZH).

    Whole words in any case, and no inflections, since the paper names none: `checks` and `verified` do not count. The
    Chinese ones count wherever their characters stand, and may mean something else there (等等 is also "and so on").
    """
    folded = thinking(text).translate(FOLDS)
    return sum(word in REFLECTIVE for word in WORDS.findall(folded)) + sum(map(bool, REFLECTIONS_ZH.findall(folded)))

r"""The number that a text answers with, as an exact fraction: for the tasks whose answers are numbers.

What is not understood is no number: words that change a number (`dozen`, `negative`, `not`), operators beside it, a
second number and other notations give None, never the digits alone.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from minir1.tasks import Problem, Verdict, answers

MAX_CHARS = 60  # of a number and its unit
SENTENCE = 500  # characters before the last number among which its sentence begins

DIGITS = (
    r"(?P<whole> [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ | (?=\.[0-9]) )"  # 1,200, 1200, or nothing as in .5
    r"(?: (?P<decimal>\.[0-9]+) | (?P<top>\ [0-9]+)?/(?P<bottom>[0-9]+) )?"  # 1.5, 3/2, or 1 1/2
)
MONEY = r"(?:[$€£]\ ?)?"
LONE = re.compile(
    rf"{MONEY} (?P<sign>[-+]?)\ ?{MONEY} {DIGITS} (?: \ ?% | \ ?(?P<unit>[A-Za-z]+(?:\ [A-Za-z]+){{0,2}}) )?",
    re.VERBOSE,
)
INSIDE = re.compile(rf"(?P<sign>[-+]?) {DIGITS} (?:\ ?%)?", re.VERBOSE)  # a sentence, without currency signs

CARDINALS = (
    r"zero|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty(?:-\w+)?"
)
SCALES = (
    r"dozens?|hundreds?|thousands?|[mbtr]+illions?|lakhs?|crores?|half|halves|thirds|(?:third|quarters?) of|"
    r"(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million)th(?:s| of)"
)
CHANGING = (  # words that change a number, offer another one, or deny it
    r"or|nor|not|no|never|neither|either|but|instead|rather|except|excluding|unless|wrong|incorrect|false|maybe|"
    r"perhaps|possibly|vs|versus|negative|minus|plus|less|squared|cubed|cube of|root|sqrt|power|factorial|double|twice|"
    r"thrice|triple|mod|modulo|base|reciprocal|inverse|opposite|pi|inf|infinity"
)
BEFORE = (  # words that change the number after them
    r"about|around|approximately|approx\.?|roughly|nearly|almost|over|under|above|below|beyond|than|up to|square of|"
    r"log|ln|sin|cos|tan|exp"
)
AFTER = r"ones?|tens|score|gross|grand|bn|mn|mil|remainder"  # words that change the number before them
NO_UNIT = re.compile(
    rf"{CARDINALS}|{SCALES}|{CHANGING}|{BEFORE}|{AFTER}|[a-z](?<![ghlms])|and|to|is|itself|st|nd|rd|ths?",
    re.IGNORECASE,
)
DENIED = re.compile(
    rf"\b(?:{CARDINALS}|{SCALES}|{CHANGING})\b|n['’]t\b|"
    rf"\b(?:{BEFORE})[ (]+[-+]?\.?[0-9]|[0-9] (?:and )?(?:{AFTER})\b",
    re.IGNORECASE,
)
COUNTED = re.compile(  # the number of something else: `in three years`
    rf"\b(?:in|for|the|after|over|per|all|those|these|next|last|first|other) (?:{CARDINALS})(?= [a-z])", re.IGNORECASE
)
CONTEXT = re.compile(  # what follows says why, or for what, the number before it holds: `$10 for 50 minutes`
    r",? (?:(?:because|since|as(?! well as)(?<!well as)|given|which)\b|"
    r"(?:for|in|after|over|during|on|at|out of)\b(?!.*=))",
    re.IGNORECASE,
)
REASON = re.compile(  # words of a reason do not concern the number before it, unless they offer another one
    r",? (?:because|since|given)\b(?!.*\b(?:or|maybe|perhaps|possibly)\b)", re.IGNORECASE
)
LISTED = re.compile(  # a second number that has a context of its own: `72 in case 1, 73 in case 2`
    r"(?:[,;]|\band) [-+$]*[0-9][0-9.,/]* (?:[A-Za-z]+ )?(?:for|in|after|over|during|on|at|out of)\b(?! (?:all|total))",
    re.IGNORECASE,
)
FOREIGN = re.compile(  # notations that are no plain number
    "|".join([
        r"[0-9] ?: ?[0-9]|[0-9]\.\.|\.[0-9]+\. ?[0-9]",  # 12:00, 66.6…, 1.2.3
        r"[0-9],[0-9](?![0-9]{2}(?![0-9]))",  # 1,5
        r"[A-Za-z_^][0-9]|[0-9] ?[_^!]|[0-9](?:st|nd|rd|th)",  # x2, 2^5, 5!, 18th
        r"[0-9](?!(?:[gLls]|[kcm][gm]|m[lL]|lb|oz|ft|in|yd|mi|hr|[ap]m)\b)[A-Za-z]{1,2}(?![A-Za-z])",  # 2x, but 5cm
        r"[0-9] (?![aAIghLlms]\b)[A-Za-z](?![A-Za-z])",  # 18 x, but 18 m and 18 a day
        r"[0-9] ?\(?\?",  # 18?
        r"[(\[] ?[-+]?[0-9.]+ ?,|, ?[-+]?[0-9.]+ ?[)\]]",  # (2, …
        r"(?![0-9])\d|[\\√π∞∈∪∩∑∏∫±‰²³¹⁰-⁹₀-₉¼-¾⅐-ↈ]",
    ])
)  # fmt: skip
OPERATORS = frozenset("+-–*/×÷·^<>≤≥≈≠~!#&|@_{}")
ALGEBRA = re.compile(r"(?<![A-Za-z])[A-Za-z] ?[-+*/^]|[-+*/^] ?[A-Za-z](?![A-Za-z])|[0-9] ?(?![aAIgLls]\b)[A-Za-z]\b")
BETWEEN = re.compile(r"[\s,;/&|()–—=-]*(?:and|to)?[\s(]*")  # two numbers of a list or range

PLAIN = [  # LaTeX, Markdown and typography -> plain text, in this order
    (r"^\s*#+\s", ""),
    (r"<<[^<>]{0,200}>>", ""),  # of GSM8K's calculator: 48/2 = <<48/2=24>>24
    (r"\u2212", "-"),
    (r"\\!", ""),
    (r"\{,\}", ","),
    (r"(?<=[0-9])(?:\\[,;: ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ","),  # 8\,000
    (r"(?<=[0-9])\s*(?=\\[dtc]?frac)", " "),
    (r"\\[dtc]?frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))", r"\1\2/\3\4 "),
    (r"\\(?:text|mbox|math|operatorname)(?:bf|it|rm|sf|tt|normal)?\s*\{([^{}]*)\}", r" \1 "),
    (r"\\boxed\s*\{([^{}]*)\}", r"\1"),
    (r"(?<![\w*])(\*\*?)(?=\S)([^*\n]+)\1(?![\w*])", r"\2"),  # bold, italic
    (r"(?:\^\s*\{?\s*\\circ\s*\}?|°|\\degree\b)\s*(?:[CF]\b)?", " degrees "),
    (
        r"(?:(?<![A-Za-z])(?:[ckm]m|ft|in|yd|mi|units?|inch(?:es)?|feet|meters?)|(?<= )m)[ }]*(?:\^\s*\{?[23]\}?|[²³])",
        " units ",
    ),  # cm^2
    (r"\\([%$])", r"\1"),
    (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\(?:left|right)(?![A-Za-z])", ""),
    (r"\\[,;: ()\[\]]|\\q?quad(?![A-Za-z])|(?<=\S)~|\s", " "),
    (r" +", " "),
]
SENTENCES = [  # besides, in a sentence
    (r"(?:\bUS)?[$€£]", ""),
    (r"(?<=[0-9)]) ?(?:x|X|plus|minus|times|divided by|multiplied by) ?(?=[(0-9.])", "*"),
    (r" ?/ ?(?=[A-Za-z]{2})|(?<=m)/(?=[hs]\b)", " per "),  # 72/day, m/s
    (r"(?<=[0-9])-(?=[A-Za-z]{2})", " "),  # 8-hour
]
REMARK = re.compile(r"\s\((?=[^()]{0,80}[A-Za-z]{2})[^()=]{1,80}\)(?=[\s.*]*$)")  # 72 clips (48 in April and 24 in May)
PLAIN, SENTENCES = ([(re.compile(pattern), put) for pattern, put in rules] for rules in (PLAIN, SENTENCES))


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the text answers with the number of the reference, compared as fractions. Scores: accuracy, 0 or 1."""
    said = value(text)
    right = said is not None and said == number(problem.reference)
    return Verdict("right" if right else "wrong", {"accuracy": float(right)})


def final(problem: Problem, text: str) -> str | None:
    """The number that the text answers with, as a majority vote compares it: `1,200.0` is `1200`."""
    said = value(text)
    return None if said is None else str(said)


def value(text: str) -> Fraction | None:
    """The number that a whole text answers with: in its claim, or, if it claims nothing, its last number."""
    claim = answers.claim(text, otherwise=last)
    if claim is None:
        return None
    said = number(claim)
    return in_sentence(claim) if said is None else said


def number(text: str | None) -> Fraction | None:
    r"""The value of a text that consists of one number, else None.

    Allowed around the digits: a sign, a currency sign before or `%` after (neither changes the value), commas between
    groups of three, a decimal part, a denominator or a fraction after a whole number, up to three words of unit, a full
    stop at the end, `\text{}`, bold, parentheses, and `\boxed{}` or `$ $` around all. The minus of Unicode (U+2212) is
    a minus; digits other than 0-9 are not allowed. Units are not compared, but words that change the number, such as
    `dozen` or `and`, give None.
    """
    if text is None or len(text) > MAX_CHARS:
        return None
    text = plain(text).removesuffix(".").strip()
    for left, right in ("$$", "()", "{}"):
        if len(text) > 2 and text[0] == left and text[-1] == right:
            text = text[1:-1].strip().removesuffix(".")
    match = LONE.fullmatch(text)
    if not match or FOREIGN.search(text) or any(map(NO_UNIT.fullmatch, (match["unit"] or "").split())):
        return None
    return _fraction(match)


def in_sentence(text: str) -> Fraction | None:
    """The only number that a sentence states, such as `x = 72` or `20 + 52 = 72 clips`, else None.

    Operands state nothing: `1000 + 200` is no number, and `10 + 20 = 30` is 30. The same number may occur again.
    """
    stated = _stated(text, alone=True) if len(text) <= answers.MAX_CHARS else None
    return stated and stated.value


def last(text: str) -> str | None:
    """The last number of a text, or the result of the equation in its sentence, as written.

    Of several numbers in that sentence, the one that was computed last before it: 64 of `40 + 24 = 64. She pays $64 for
    16 glasses.`

    None if that sentence does not state it or offers another number beside it.
    """
    end = max(text.rfind(digit) for digit in "0123456789")
    begin = max(0, end - SENTENCE)
    begin += max((match.end() for match in answers.END.finditer(text[begin : end + 1])), default=0)
    before = text[max(0, begin - SENTENCE) : begin]
    computed = INSIDE.search(plain(before[before.rfind("=") :][1:MAX_CHARS])) if "=" in before else None
    computed = computed and _fraction(computed)
    stated = _stated(answers.sentence(text[begin : end + SENTENCE]), alone=False, computed=computed)
    return stated and stated.text


class Number(NamedTuple):
    """A number in a sentence."""

    text: str
    start: int
    end: int
    value: Fraction | None
    operand: bool  # an operator stands beside it


def _stated(text: str, alone: bool, computed: Fraction | None = None) -> Number | None:
    """The number after the last `=`, or else the one that was computed, or else the last one.

    alone: of a claim, in which nothing else may be stated.
    """
    text = plain(text)
    remark = REMARK.search(text)
    if remark and any(map(str.isdigit, text[: remark.start()])) and not DENIED.search(text, remark.start()):
        text = text[: remark.start()]
    text = COUNTED.sub("", _rewritten(text, SENTENCES))
    matches = INSIDE.finditer(text)
    numbers = [Number(match[0], *match.span(), _fraction(match), _operand(match, text)) for match in matches]
    end = len(text)
    if alone and numbers and (context := CONTEXT.search(text, numbers[0].end)):
        end = context.start()
        if REASON.match(text, end):
            text = text[:end]
        elif LISTED.search(text, end):
            return None
        numbers = [number for number in numbers if number.start < end]
    equals = text.rfind("=", 0, end)
    results = [i for i, number in enumerate(numbers) if number.start > equals >= 0]
    others = [i for i, number in enumerate(numbers) if not (alone and number.operand)]
    if not results and not others:
        return None
    again = [i for i in others if numbers[i].value == computed]
    at = results[0] if results else (again or others)[-1]
    said, rivals = numbers[at], set(_beside(text, numbers, at))
    if alone:
        rivals.update(range(at if results else len(numbers)))
    if said.operand or said.value is None or (equals >= 0 and _relation(text[:equals], said.value)):
        return None
    if any(numbers[i].value != said.value and not numbers[i].operand for i in rivals):
        return None
    if not alone:  # words far from the number do not concern it
        text = text[numbers[at - 1].end - 1 if at else 0 : numbers[at + 1].start + 1 if at + 1 < len(numbers) else end]
    return None if FOREIGN.search(text) or DENIED.search(text) else said


def _beside(text: str, numbers: list[Number], at: int) -> range:
    """The indices of the numbers that are in one list or range with `numbers[at]`, itself included."""
    low = high = at
    while low and BETWEEN.fullmatch(text, numbers[low - 1].end, numbers[low].start):
        low -= 1
    while high + 1 < len(numbers) and BETWEEN.fullmatch(text, numbers[high].end, numbers[high + 1].start):
        high += 1
    return range(low, high + 1)


def plain(text: str) -> str:
    """A text without LaTeX, Markdown and typography, as far as numbers need it, and with single blanks."""
    return _rewritten(text, PLAIN).strip()


def _rewritten(text: str, rules: list[tuple[re.Pattern, str]]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _fraction(match: re.Match) -> Fraction | None:
    """The value of digits; None for a denominator of 0, an improper fraction after a whole number, and long ones."""
    whole, top, bottom = match["whole"].replace(",", ""), match["top"], match["bottom"]
    if len(match[0]) > MAX_CHARS or (bottom and not int(bottom)) or (top and int(top) >= int(bottom)):
        return None
    if top:
        size = int(whole) + Fraction(int(top), int(bottom))
    else:
        size = Fraction(int(whole), int(bottom)) if bottom else Fraction(whole + (match["decimal"] or ""))
    return -size if match["sign"] == "-" else size


def _operand(match: re.Match, text: str) -> bool:
    """Whether an operator stands beside a number; its own sign is one if a number or a parenthesis is before it."""
    before, after = text[: match.start()].rstrip()[-1:], text[match.end() :].lstrip()[:1]
    subtracted = match["sign"] and (before.isdigit() or before in (")", "%"))
    return bool(subtracted) or before in OPERATORS or after in OPERATORS


def _relation(left: str, value: Fraction) -> bool:
    """Whether an equation is a relation, as `3x - y + 13 = 0` or `x + 13 = 20`, and gives no value, as `m + n = 33`."""
    left = re.split(r"[,;:] |=", left)[-1]
    return bool(ALGEBRA.search(left)) and (any(map(str.isdigit, left)) or value == 0)

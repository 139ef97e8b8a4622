r"""Whether two final answers are the same mathematics: exact, by hand, in well under a millisecond, without sympy.

    equal(r"\frac{1}{2}", "0.5")            True
    equal(r"\frac{1}{2^{99}}", r"2^{-98}")  False
    equal(r"\sin^2 x", r"1 - \cos^2 x")     None: not decided here

An answer is read (minir1/tasks/readings.py) as a value, with a unit perhaps, or as words, a list, a set, a tuple or
interval, a matrix, an equation and so on, and compared part by part with exact arithmetic (minir1/tasks/algebra.py).
Floating point only ever tells two formulas apart. What counts as no difference:

    a unit, %, ° or $ on one side only; two known units that differ are a difference
    x = 5 and 5; x ∈ [1, 2] and [1, 2]; 1 < x ≤ 2 and (1, 2]
    the order in a set and in a bare list, and whether a bare list has braces; a tuple may lack its parentheses, and
    then needs its order
    a column vector and the tuple of its entries; the kind of a matrix's brackets
    an answer without a subscript for the base where the reference has one
    upper and lower case of words; (C), C and \text{(C)}
"""

import re

from minir1.tasks import algebra, latex
from minir1.tasks.algebra import Unreadable
from minir1.tasks.readings import OTHERWISE, Answer, is_symbol, read, right_side

KNOWN = {  # tokens that math-verify reads or rejects; it drops others without a word
    *r"+ - * / ^ _ ( ) [ ] { } | ! , = < > ≤ ≥ ≠ ' ° & \\ \{ \} \frac \sqrt \pi \infty \binom \pm \mp \cup".split(),
    *r"\cap \in \setminus \matrix \endmatrix \abs \lfloor \rfloor \lceil \rceil \emptyset".split(),
    *(f"\\{name}" for name in (*latex.FUNCTIONS, *latex.SYMBOLS)),
}
CHOICE = re.compile(
    r"(?:\(\s*(?P<bracketed>[A-Ja-j])\s*\)|(?P<bare>[A-J])(?:[).:]|$))(?P<option>[.:]?(?:\s.*)?)", re.DOTALL
)
NO_OPTION = re.compile(  # not what may stand beside the letter: relations, sums, other letters
    r"[=<>&+*/!%:]|\([A-J]\)|\b[A-J]\b|\\(?:ne|to|approx|equiv|Rightarrow|cup|cap|p?mod|bmod|div|times|cdot|ldots|dots)\b|\\\\|-\s*$"
)
COMMANDS = re.compile(r"\\(?:text|mbox|textbf|mathrm|textit)(?![A-Za-z])|[{}$]|\\(?=[ ,;:!])")
SENTENCE = re.compile(r"[^\\^_=<>+*/-]*[a-z]{4}[^\\^_=<>+*/-]*")  # with a word, as in June 20
MAX_BRACKETS = 100  # that math-verify reads in reasonable time
INFINITY = algebra.atom("∞")
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")


def equal(reference: str, answer: str) -> bool | None:
    """Whether the answer is mathematically the reference; None if that is not decided here. Raises nothing.

    Both are final answers alone, LaTeX or plain, at most latex.MAX_CHARS characters (a longer one equals itself only).
    """
    if plain(reference) == plain(answer) and plain(reference):
        return True
    if max(len(reference), len(answer)) > latex.MAX_CHARS:
        return False
    if (letter := choice(reference)) and (chosen := choice(answer)):
        return letter == chosen
    if (sentence := SENTENCE.fullmatch(_bare(reference))) and sentence[0] == _bare(answer):
        return True
    try:
        expected, given = readings(reference), readings(answer)
        if not expected or not given:
            return False if expected and _too_large(answer) else None
        results = [compare(a, b) for a in expected for b in given]
    except (Unreadable, RecursionError, ArithmeticError):
        return None
    return True if True in results else None if None in results else False


def _too_large(text: str) -> bool:
    """Whether an answer is a formula that is no final answer, such as 9^{9^{9^9}}, which math-verify would compute."""
    try:
        read(latex.tokens(text))
    except (algebra.TooLarge, RecursionError):
        return True
    except (Unreadable, ArithmeticError):
        return False
    return False


def known(text: str) -> bool:
    """Whether an answer has only tokens of mathematics that math-verify can be trusted with."""
    try:
        items = latex.tokens(text)
    except Unreadable:
        return False
    if sum(token in latex.OPEN for token in items) > MAX_BRACKETS:
        return False
    if any(latex.is_number(before) and token == "'" for before, token in zip(items, items[1:])):  # 7' is not 7
        return False
    based = any(
        token == "_" and not (before.isalpha() or before[0] == "\\") for before, token in zip(["1", *items], items)
    )
    return not based and all(token in KNOWN or latex.is_number(token) or token.isalpha() for token in items)


def readings(text: str) -> list[Answer]:
    """Each way to read an answer: `1,200` is a number or a list. Empty if there is none."""
    found = []
    texts = [text]
    if not re.search(r"[(\[]|\\\{", text):
        together = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
        texts = [together] if re.search(r",0[0-9]", text) else [together, text]
    for version in dict.fromkeys(texts):
        try:
            found.append(read(latex.tokens(version)))
        except (Unreadable, ArithmeticError):
            continue
    return found


def choice(text: str) -> str | None:
    r"""The letter of (C), C, C) or \text{(C) 12}, else None. A bare letter may be a symbol, too."""
    match = CHOICE.fullmatch(
        re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit)\s*\{|[{}$*]|\\(?=[ ,;:])", "", text).strip()
    )
    if not match or text.count("{") != text.count("}") or NO_OPTION.search(OTHERWISE.sub("=", match["option"] or "")):
        return None
    return (match["bracketed"] or match["bare"]).upper()


def _bare(text: str) -> str:
    """Words without the commands around them."""
    return " ".join(COMMANDS.sub(" ", text).lower().split()).rstrip(".")


def plain(text: str) -> str:
    """The text without a full stop at the end and without white space, but for one blank between digits or letters."""
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", " ".join(text.split())).rstrip(".")


def compare(a: Answer, b: Answer) -> bool | None:
    """Whether a reference and an answer say the same; None if that is not certain."""
    if a.kind == b.kind == "equation":
        return _same_equation(a, b)
    if a.kind == "equation" or b.kind == "equation":
        a, b = right_side(a), right_side(b)
        return False if a is None or b is None else compare(a, b)
    a, b = (_one(x) for x in (a, b))
    if a.kind == "value" and b.kind == "list" and all(compare(a, item) is True for item in b.parts):  # 1/2 or 0.5
        return True
    if a.kind == "list" and a.kind != b.kind == "union" or a.kind == "union" != b.kind == "list":
        a, b = _as_interval(a), _as_interval(b)
    if "inequality" in (a.kind, b.kind) and a.kind != b.kind:
        a, b = _as_interval(a), _as_interval(b)
        if "inequality" in (a.kind, b.kind):
            return None
    kinds = {a.kind, b.kind}
    if kinds == {"value"}:
        return _same_value(a, b)
    if kinds == {"words"}:
        return _key(a.detail) == _key(b.detail) and ("?" in a.detail) == ("?" in b.detail)
    if kinds <= {"list", "set"}:
        if _labels(a) and _labels(b) is None or _labels(b) and _labels(a) is None:
            return _all(a.parts, b.parts) if len(a.parts) == len(b.parts) else False
        return _matching(a.parts, b.parts)
    if kinds == {"tuple"}:
        return a.detail == b.detail and _all(a.parts, b.parts)
    if kinds == {"tuple", "list"}:
        listed, tupled = (a, b) if a.kind == "list" else (b, a)
        return tupled.detail in ("()", r"\langle\rangle") and _all(a.parts, b.parts)
    if kinds == {"union"}:
        return _matching(a.parts, b.parts)
    if kinds == {"matrix"}:
        return _all(a.parts, b.parts)
    if kinds == {"row"}:
        return _all(a.parts, b.parts)
    if kinds == {"matrix", "tuple"}:
        matrix, tupled = (a, b) if a.kind == "matrix" else (b, a)
        column = [row.parts[0] for row in matrix.parts if len(row.parts) == 1]
        return (
            len(column) == len(matrix.parts)
            and tupled.detail in ("()", r"\langle\rangle")
            and _all(column, tupled.parts)
        )
    if kinds == {"inequality"}:
        return a.detail == b.detail and algebra.proportional(a.parts[0], b.parts[0], positive=a.detail != "≠")
    if kinds == {"based"}:
        return a.detail == b.detail
    if a.kind == "based" and b.kind == "value":
        return b.detail is None and b.parts[0] == algebra.number(int(a.detail[0])) if a.detail[0].isdigit() else False
    if a.kind == "value" and b.kind == "based" and b.detail[1] == 10:
        return compare(b, a)
    if kinds == {"ratio"}:
        return _same_ratio(a, b)
    if kinds == {"ratio", "value"}:
        ratio, value = (a, b) if a.kind == "ratio" else (b, a)
        if len(ratio.parts) != 2 or ratio.detail:
            return False
        first, second = (part.parts[0] for part in ratio.parts)
        return algebra.equal(first, algebra.multiply(second, value.parts[0]))
    return False


def _labels(a: Answer) -> list | None:
    """The left sides if all items are equations with symbols on the left."""
    if all(item.kind == "equation" and item.parts[0].kind == "label" for item in a.parts):
        return [item.parts[0].detail for item in a.parts]
    return None


def _as_interval(a: Answer) -> Answer:
    """x < 2 as (-∞, 2), and a list of such as a union; anything else as it is."""
    if a.kind == "list" and all(item.kind in ("inequality", "tuple") for item in a.parts):
        return Answer("union", tuple(map(_as_interval, a.parts)))
    if a.kind != "inequality" or not (is_symbol(a.parts[1]) or is_symbol(a.parts[2])):
        return a
    _, left, right = a.parts
    ends = [Answer("value", (end,)) for end in (algebra.negative(INFINITY), right, INFINITY)]
    upper = True
    if not is_symbol(left):
        ends[1], upper = Answer("value", (left,)), False
    below, above = Answer("tuple", (ends[0], ends[1]), "()"), Answer("tuple", (ends[1], ends[2]), "()")
    if a.detail == "≠":
        return Answer("union", (below, above))
    if algebra.add(left, algebra.negative(right)) != a.parts[0]:  # left > right
        upper = not upper
    if a.detail == "≤":
        return below._replace(detail="(]") if upper else above._replace(detail="[)")
    return below if upper else above


def _same_equation(a: Answer, b: Answer) -> bool | None:
    first, second = ((x.parts[0], x.parts[-1]) for x in (a, b))
    if first[0].kind == second[0].kind == "label":
        names = first[0].detail, second[0].detail
        if names[0] == names[1] or ("(" in names[0]) != ("(" in names[1]):  # y = 2x and f(x) = 2x
            return compare(first[1], second[1])
    sums = []
    for left, right in (first, second):
        if left.kind == "label":
            left = read(latex.tokens(left.detail))
        if left.kind != "value" or right.kind != "value":
            return None if left.kind == right.kind else False
        sums.append(algebra.add(left.parts[0], algebra.negative(right.parts[0])))
    return algebra.proportional(*sums)


def _key(words: str) -> str:
    words = re.sub(r"[^a-z0-9 ]", "", words.lower())
    return "".join(word for word in words.split() if word not in ("the", "a", "an"))


def _same_value(a: Answer, b: Answer) -> bool | None:
    if a.detail and b.detail and a.detail != b.detail:
        return False
    result = algebra.equal(a.parts[0], b.parts[0])
    if result is not True and (("percent", 1) in (a.detail or ())) != (("percent", 1) in (b.detail or ())):
        hundred = algebra.number(100)
        value, other = (a, b) if ("percent", 1) in (a.detail or ()) else (b, a)
        if other.detail is None and algebra.equal(value.parts[0], algebra.multiply(hundred, other.parts[0])):
            return True
    return result


def _same_ratio(a: Answer, b: Answer) -> bool | None:
    if len(a.parts) != len(b.parts):
        return False
    if a.detail and b.detail:
        return _all(a.parts, b.parts)
    firsts = a.parts[0].parts[0], b.parts[0].parts[0]
    products = [
        (algebra.multiply(x.parts[0], firsts[1]), algebra.multiply(y.parts[0], firsts[0]))
        for x, y in zip(a.parts, b.parts)
    ]
    return _and([algebra.equal(*pair) for pair in products])


def _one(a: Answer) -> Answer:
    """The item of a list or set that has one."""
    return a.parts[0] if a.kind in ("list", "set") and len(a.parts) == 1 else a


def _all(a, b) -> bool | None:
    return _and([compare(x, y) for x, y in zip(a, b)]) if len(a) == len(b) else False


def _and(results: list) -> bool | None:
    return False if False in results else None if None in results else True


def _matching(a: tuple, b: tuple) -> bool | None:
    """Whether two collections have the same members, in any order."""
    a, certain = list(a), True
    for item in b:
        results = [compare(other, item) for other in a]
        if True in results:
            a.pop(results.index(True))
        elif None in results:
            a.pop(results.index(None))
            certain = False
        else:
            return False
    if a:
        return False
    return True if certain else None

r"""Whether two final answers are the same mathematics: exact, by hand, in well under a millisecond, without sympy.

    equal(r"\frac{1}{2}", "0.5")            True
    equal(r"\frac{1}{2^{99}}", r"2^{-98}")  False
    equal(r"\sin^2 x", r"1 - \cos^2 x")     None: not decided here

An answer is read as a value, with a unit perhaps, or as words, a list, a set, a tuple or interval, a matrix, an equation
and so on (`read`), and compared part by part with exact arithmetic (minir1/tasks/algebra.py). Floating point only ever
tells two formulas apart. What the field does not count as a difference:

    a unit, %, ° or $ on one side only; two known units that differ are a difference
    x = 5 and 5; x ∈ [1, 2] and [1, 2]; 1 < x ≤ 2 and (1, 2]
    the order in a set and in a bare list, and whether a bare list has braces; a tuple may lack its parentheses, and then
    needs its order
    a column vector and the tuple of its entries; the kind of a matrix's brackets
    an answer without a subscript for the base where the reference has one
    upper and lower case of words; (C), C and \text{(C)}
"""

import re
from typing import NamedTuple

from minir1.tasks import algebra, latex
from minir1.tasks.algebra import Formula, Unreadable

MAX_ITEMS = 60  # of a list
KNOWN = {  # tokens that math-verify reads or rejects; it drops others without a word
    *"+-*/^_()[]{}|!,=<>≤≥≠'°", r"\frac", r"\sqrt", r"\pi", r"\infty", r"\binom", r"\pm", r"\mp", r"\{", r"\}", r"\cup", r"\cap", r"\in",
    r"\setminus", r"\matrix", r"\endmatrix", r"\\", "&", r"\abs", r"\lfloor", r"\rfloor", r"\lceil", r"\rceil", r"\emptyset",
    *(f"\\{name}" for name in (*latex.FUNCTIONS, *latex.SYMBOLS)),
}
RELATIONS = ("=", "<", ">", "≤", "≥", "≠", r"\approx", r"\in", r"\equiv", r"\to", r"\Rightarrow", r"\sim", r"\subset", r"\notin")
CHOICE = re.compile(
    r"(?:\(\s*(?P<bracketed>[A-Ja-j])\s*\)|(?P<bare>[A-J])(?:[).:]|$))(?P<option>[.:]?(?:\s.*)?)", re.DOTALL
)
NO_OPTION = re.compile(  # not what may stand beside the letter: relations, sums, other letters
    r"[=<>&+*/!%:]|\([A-J]\)|\b[A-J]\b|\\(?:ne|to|approx|equiv|Rightarrow|cup|cap|p?mod|bmod|div|times|cdot|ldots|dots)\b|\\\\|-\s*$"
)
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?")
BASED = re.compile(r"(\()?([0-9][0-9A-Fa-f]*)(?(1)\))_(?:\{([0-9]+)\}|([0-9]+))")
PLURALS = (
    "centimeter:cm centimeters centimetre centimetres|meter:m meters metre metres|millimeter:mm millimeters|kilometer:km kilometers|"
    "inch:in inches|foot:ft feet|yard:yd yards yds|mile:mi miles|gram:g grams|kilogram:kg kilograms|pound:lb lbs pounds|ounce:oz ounces|"
    "second:s sec secs seconds|minute:min mins minutes|hour:hr hrs h hours|day:days|week:weeks|month:months|year:years yr yrs|liter:l liters litre litres|"
    "milliliter:ml milliliters|gallon:gallons gal|dollar:dollars usd|cent:cents|percent:percents|degree:degrees|radian:radians rad|unit:units|am:|pm:|"
    "celsius:c|fahrenheit:f"
)
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
OTHERWISE = re.compile(  # words after a number that are no unit but change or deny it
    r"\b(?:not|no|never|or|and|nor|but|to|wrong|incorrect|false|maybe|perhaps|more|less|fewer|than|plus|minus|times|over|"
    r"squared|cubed|half|third|tenths?|hundredths?|base|mod|if|when|for|where|except|negative|at|approx\w*|about|is)\b", re.IGNORECASE
)
UNITS = {form: unit for group in PLURALS.split("|") for unit, _, forms in [group.partition(":")] for form in [unit, *forms.split()]}


class Answer(NamedTuple):
    """What an answer says. `parts` are Answers, or one Formula for a value."""

    kind: str  # value words list set tuple union matrix row equation inequality ratio based
    parts: tuple = ()
    detail: object = None  # unit, words, brackets, relation or base


def equal(reference: str, answer: str) -> bool | None:
    """Whether the answer is mathematically the reference; None if that is not decided here. Raises nothing.

    Both are final answers alone, LaTeX or plain, at most latex.MAX_CHARS characters (a longer one equals itself only).
    """
    if plain(reference) == plain(answer) and plain(reference):
        return True
    if (letter := choice(reference)) and (chosen := choice(answer)):
        return letter == chosen
    if max(len(reference), len(answer)) > latex.MAX_CHARS:
        return False
    try:
        expected, given = readings(reference), readings(answer)
        if not expected or not given:
            return None
        results = [compare(a, b) for a in expected for b in given]
    except (Unreadable, RecursionError, ArithmeticError):
        return None
    return True if True in results else None if None in results else False


def known(text: str) -> bool:
    """Whether an answer has only tokens of mathematics that math-verify can be trusted with."""
    try:
        items = latex.tokens(text)
    except Unreadable:
        return False
    return all(token in KNOWN or token[0] in "0123456789." or token.isalpha() for token in items)


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
    r"""The letter of (C), C, C) or \text{(C) 12}; None if the text is something else. A bare letter may be a symbol, too."""
    match = CHOICE.fullmatch(re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit)\s*\{|[{}$*]|\\(?=[ ,;:])", "", text).strip())
    if not match or text.count("{") != text.count("}") or NO_OPTION.search(OTHERWISE.sub("=", match["option"] or "")):
        return None
    return (match["bracketed"] or match["bare"]).upper()


def plain(text: str) -> str:
    """The text without a full stop at the end and without white space, but for one blank between digits or letters."""
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", " ".join(text.split())).rstrip(".")


def read(items: list[str]) -> Answer:
    """The answer that tokens write. Unreadable if it is none that is understood here."""
    parts, found = latex.split(items, (",", ";"))
    if found:
        parts = [part for part in parts if part]
        if len(parts) > MAX_ITEMS:
            raise Unreadable("too many items")
        return _list(parts) if len(parts) > 1 else read(*parts or [[]])
    if len(items) > 2 and items[1] == '"in' and items[2] in latex.OPEN:
        return read(items[2:])
    if items and items[0] == "{" and latex.closing(items, 0) == len(items) - 1:
        inner = items[1:-1]
        return read([r"\{", *inner, r"\}"] if latex.split(inner, (",", ";"))[1] else inner)
    parts, found = latex.split(items, (r"\cup",))
    if found:
        return Answer("union", tuple(map(read, parts)))
    parts, found = latex.split(items, RELATIONS)
    if found:
        return _relation(parts, found)
    if all(token.startswith('"') for token in items):
        return _words(" ".join(token[1:] for token in items))
    if (structure := _bracketed(items)) is not None:
        return structure
    if r"\matrix" in items:
        return _scaled(items)
    parts, found = latex.split(items, (":",))
    if found:
        values = tuple(map(_value, parts))
        return Answer("ratio", values, "".join(items) if TIME.match("".join(items)) else None)
    if r"\pm" in items or r"\mp" in items:
        return Answer("list", tuple(_value(items, sign) for sign in (1, -1)))
    return _value(items)


def compare(a: Answer, b: Answer) -> bool | None:
    """Whether a reference and an answer say the same; None if that is not certain."""
    if a.kind == b.kind == "equation":
        return _same_equation(a, b)
    if a.kind == "equation" or b.kind == "equation":
        a, b = _right_side(a), _right_side(b)
        return False if a is None or b is None else compare(a, b)
    a, b = (_one(x) for x in (a, b))
    if a.kind == "value" and b.kind == "list" and all(compare(a, item) is True for item in b.parts):  # 1/2 or 0.5
        return True
    if a.kind == "list" and a.kind != b.kind == "union" or a.kind == "union" != b.kind == "list":
        a, b = _as_interval(a), _as_interval(b)
    if "inequality" in (a.kind, b.kind) and a.kind != b.kind:
        a, b = _as_interval(a), _as_interval(b)
    kinds = {a.kind, b.kind}
    if kinds == {"value"}:
        return _same_value(a, b)
    if kinds == {"words"}:
        return _key(a.detail) == _key(b.detail)
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
        return len(column) == len(matrix.parts) and tupled.detail in ("()", r"\langle\rangle") and _all(column, tupled.parts)
    if kinds == {"inequality"}:
        return a.detail == b.detail and algebra.proportional(a.parts[0], b.parts[0], positive=a.detail != "≠")
    if kinds == {"based"}:
        return a.detail == b.detail
    if a.kind == "based" and b.kind == "value":
        return b.detail is None and b.parts[0] == algebra.number(int(a.detail[0])) if a.detail[0].isdigit() else False
    if kinds == {"ratio"}:
        return _same_ratio(a, b)
    if kinds == {"ratio", "value"}:
        ratio, value = (a, b) if a.kind == "ratio" else (b, a)
        if len(ratio.parts) != 2 or ratio.detail:
            return False
        first, second = (part.parts[0] for part in ratio.parts)
        return algebra.equal(first, algebra.multiply(second, value.parts[0]))
    return False


def _list(parts: list[list[str]]) -> Answer:
    r"""A bare list. `n = 2, 3, 4` lists values of n; `1 \pm 2, 5` has three items."""
    items = []
    for part in parts:
        item = read(part)
        items += item.parts if item.kind == "list" else [item]
    if items[0].kind == "equation" and all(item.kind != "equation" for item in items[1:]):
        items[0] = _right_side(items[0]) or items[0]
    labels = [item.parts[0].detail for item in items if item.kind == "equation" and item.parts[0].kind == "label"]
    if len(labels) == len(items) and len(set(labels)) == 1:  # x = 1, x = 2
        items = [item.parts[-1] for item in items]
    return Answer("list", tuple(items))


def _labels(a: Answer) -> list | None:
    """The left sides if all items are equations with symbols on the left."""
    if all(item.kind == "equation" and item.parts[0].kind == "label" for item in a.parts):
        return [item.parts[0].detail for item in a.parts]
    return None


def _bracketed(items: list[str]) -> Answer | None:
    """A tuple, an interval, a set or a matrix, if the tokens are one."""
    if items == [r"\emptyset"]:
        return Answer("set")
    opening = items[0] if items else ""
    if opening not in ("(", "[", r"\{", r"\langle", r"\matrix") or latex.closing(items, 0) != len(items) - 1:
        return None
    inner, end = items[1:-1], items[-1]
    if opening == r"\matrix":
        rows = [row for row in latex.split(inner, ("\\\\",))[0] if row]
        cells = [tuple(map(read, latex.split(row, ("&",))[0])) for row in rows]
        return Answer("matrix", tuple(Answer("row", row) for row in cells))
    parts, found = latex.split(inner, (",", ";"))
    if opening == r"\{":
        return Answer("set", _list(parts).parts if found else (_flat(read(inner)) if inner else ()))
    if not found and opening == "(" and end == ")":
        return read(inner) if inner else None
    if not found:
        return None
    return Answer("tuple", tuple(map(read, parts)), opening + end)


def _scaled(items: list[str]) -> Answer:
    """A matrix in brackets, or with a factor before it."""
    start = items.index(r"\matrix")
    factor, rest = items[:start], items[start:]
    if factor in (["("], ["["]) and rest[-1] in (")", "]"):
        return read(rest[:-1])
    matrix = _bracketed(rest)
    factor = [token for i, token in enumerate(factor) if token != "*" or i < len(factor) - 1]
    scale = latex.formula(factor + ["1"] * (factor == ["-"]))
    if matrix is None or any(cell.kind != "value" for row in matrix.parts for cell in row.parts):
        raise Unreadable("not a matrix with a factor")
    scaled = [[Answer("value", (algebra.multiply(scale, cell.parts[0]),)) for cell in row.parts] for row in matrix.parts]
    return Answer("matrix", tuple(Answer("row", tuple(row)) for row in scaled))


def _flat(a: Answer) -> tuple:
    return a.parts if a.kind == "list" else (a,)


def _relation(parts: list[list[str]], found: list[str]) -> Answer:
    if set(found) == {"="}:
        return Answer("equation", (_side(parts[0]), *map(read, parts[1:])))
    if found == [r"\in"]:
        return read(parts[1])
    if r"\approx" in found:
        at = found.index(r"\approx")
        exact = [token for part, relation in zip(parts, [*found[:at], ""]) for token in (*part, relation) if token]
        pair = [_right_side(read(part)) for part in (exact, parts[at + 1])]
        if any(x is None or x.kind != "value" for x in pair) or not algebra.close(*(x.parts[0] for x in pair)):
            raise Unreadable("an approximation of something else")
        return read(exact)
    values = [_value(part) for part in parts]
    if any(value.kind != "value" for value in values):
        raise Unreadable("a relation of words")
    sides = [value.parts[0] for value in values]
    less, more = {"<", "≤"}, {">", "≥"}
    if len(found) == 2 and (set(found) <= less or set(found) <= more) and _symbol(sides[1]):
        low, high, left, right = sides[0], sides[2], found[0], found[1]
        if set(found) <= more:
            low, high, left, right = high, low, right, left
        brackets = ("[" if left in "≤≥" else "(") + ("]" if right in "≤≥" else ")")
        return Answer("tuple", (Answer("value", (low,)), Answer("value", (high,))), brackets)
    if len(found) == 1 and found[0] in "<>≤≥≠":
        difference = algebra.add(sides[0], algebra.negative(sides[1]))
        if found[0] in more:
            difference = algebra.negative(difference)
        return Answer("inequality", (difference, *sides), {">": "<", "≥": "≤"}.get(found[0], found[0]))
    raise Unreadable(f"a chain of {' '.join(found)}")


def _side(items: list[str]) -> Answer:
    """The left side of an equation: a label such as x, f(x), AB or `Area`, or a formula."""
    name = "".join(items)
    if re.fullmatch(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\([A-Za-z](?:,[A-Za-z])*\))?", name) and name != "i":
        return Answer("label", (), name)
    try:
        value = read(items)
    except Unreadable:
        return Answer("label", (), name)
    named = value.kind == "words" or value.kind == "tuple" and all(x.kind == "value" and _symbol(*x.parts) for x in value.parts)
    return Answer("label", (), name) if named else value


def _symbol(a: Formula) -> bool:
    """Whether a formula is one symbol."""
    return a.bottom == {algebra.ONE: 1} and list(a.top.values()) == [1] and not algebra.constant(a) and all(
        len(key) == 1 and all(isinstance(x, str) and e == 1 for x, e in key) for key in a.top
    )


def _as_interval(a: Answer) -> Answer:
    """x < 2 as (-∞, 2), and a list of such as a union; anything else as it is."""
    if a.kind == "list" and all(item.kind in ("inequality", "tuple") for item in a.parts):
        return Answer("union", tuple(map(_as_interval, a.parts)))
    if a.kind != "inequality" or a.detail == "≠":
        return a
    _, left, right = a.parts
    infinity = algebra.atom("∞")
    value, upper = (right, True) if _symbol(left) else (left, False)
    if not _symbol(left) and not _symbol(right):
        return a
    if algebra.frozen(algebra.add(left, algebra.negative(right))) != algebra.frozen(a.parts[0]):  # left > right
        upper = not upper
    closed = a.detail == "≤"
    if upper:
        ends, brackets = (algebra.negative(infinity), value), "(]" if closed else "()"
    else:
        ends, brackets = (value, infinity), "[)" if closed else "()"
    return Answer("tuple", tuple(Answer("value", (end,)) for end in ends), brackets)


def _right_side(a: Answer) -> Answer | None:
    """What an equation says a value is: 5 for x = 5, 5 = x, a + b = 5 and 2 + 3 = 5, but None for 2x = 10 and 2 = 5."""
    if a.kind != "equation":
        return a
    first, last = a.parts[0], a.parts[-1]
    constants = [part for part in a.parts if part.kind == "value" and algebra.constant(part.parts[0])]
    if any(_same_value(constants[0], other) is not True for other in constants[1:]):
        return None
    if last.kind == "value" and len(constants) == 1 and _symbol(last.parts[0]):
        return constants[0]
    if first.kind == "label" or first in constants and last in constants:
        return last
    if first.kind != "value" or last.kind != "value" or not last.parts[0].top:
        return None
    coefficients, symbols = first.parts[0].top.values(), frozenset().union(*first.parts[0].top)
    return last if len(symbols) > 1 and set(coefficients) <= {1, -1} else None


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


def _words(text: str) -> Answer:
    return Answer("words", (), text)


def _key(words: str) -> str:
    words = re.sub(r"[^a-z0-9 ]", "", words.lower())
    return "".join(word for word in words.split() if word not in ("the", "a", "an"))


def _value(items: list[str], sign: int = 1) -> Answer:
    """A formula with its unit."""
    items, unit = list(items), []
    if based := _based(items):
        return based
    while items and items[0] == "$" or items[:2] == ["-", "$"]:
        items.remove("$")
        unit.append("dollar")
    if "°" in items and not any(token[1:] in latex.FUNCTIONS for token in items):  # not sin 60°
        items = [token for token in items if token != "°"]
        unit.append("degree")
    while items:
        if items[-1] == "%" or items[-1].startswith('"'):
            unit.append("percent" if items[-1] == "%" else items[-1].strip('"'))
            items.pop()
        elif (power := _power_of_unit(items)) > 0:
            unit.append(f"{items[-power - 1].strip(chr(34))} ^{''.join(items[-power:]).strip('^{}')}")
            del items[-power - 1 :]
        else:
            break
    unit = " ".join(reversed(unit))
    if not items or OTHERWISE.search(unit):
        return _words(" ".join(items) + unit)
    value = latex.formula(items, sign)
    if scale := SCALES.get(unit.split()[0].lower()) if unit else None:
        value, unit = algebra.multiply(value, algebra.number(scale)), unit.partition(" ")[2]
    return Answer("value", (value,), _unit(unit))


def _power_of_unit(items: list[str]) -> int:
    """How many tokens at the end are the exponent of words."""
    for n in (2, 4):
        if len(items) > n and items[-n] == "^" and items[-n - 1].startswith('"') and "".join(items[-n:]).strip("^{}").isdigit():
            return n
    return 0


def _unit(text: str) -> tuple | None:
    """Known units with their exponents, in an order; None if there is none, () if one is not known."""
    if not text:
        return None
    units, exponent = [], 1
    for word in re.findall(r"[a-z]+|\^[0-9]", text.lower().replace(".", "").replace("mph", "miles per hour")):
        if word[0] == "^" and units:
            units[-1] = (units[-1][0], int(word[1:]))
        elif word in ("square", "sq", "cubic", "cu"):
            exponent = 2 if word[0] == "s" else 3
        elif word in UNITS:
            units.append((UNITS[word], exponent))
            exponent = 1
        elif word != "per":
            return ()
    return () if any(unit == "unit" for unit, _ in units) else tuple(sorted(units))


def _based(items: list[str]) -> Answer | None:
    """A number with its base as a subscript, such as 4210_{5}."""
    match = BASED.fullmatch("".join(items))
    return match and Answer("based", (), (match[2].lstrip("0").upper() or "0", int(match[3] or match[4])))


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
    products = [(algebra.multiply(x.parts[0], firsts[1]), algebra.multiply(y.parts[0], firsts[0])) for x, y in zip(a.parts, b.parts)]
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

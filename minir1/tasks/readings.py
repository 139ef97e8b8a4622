"""What an answer says: a value with its unit, or words, a list, a set, an interval, a matrix, an equation and so on."""

import re
from typing import NamedTuple

from minir1.tasks import algebra, latex
from minir1.tasks.algebra import Formula, Unreadable
from minir1.tasks.formulas import formula

MAX_ITEMS = 60  # of a list
RELATIONS = tuple(r"= < > ≤ ≥ ≠ \approx \in \equiv \to \Rightarrow \sim \subset \notin".split())
TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?")
BASED = re.compile(r"(\()?([0-9][0-9A-Fa-f]*)(?(1)\))_(?:\{([0-9]+)\}|([0-9]+))")
PLURALS = """
    centimeter:cm centimeters centimetre centimetres|meter:m meters metre metres|millimeter:mm millimeters|
    kilometer:km kilometers|inch:in inches|foot:ft feet|yard:yd yards yds|mile:mi miles|gram:g grams|
    kilogram:kg kilograms|pound:lb lbs pounds|ounce:oz ounces|second:s sec secs seconds|minute:min mins minutes|
    hour:hr hrs h hours|day:days|week:weeks|month:months|year:years yr yrs|liter:l liters litre litres|
    milliliter:ml milliliters|gallon:gallons gal|dollar:dollars usd|cent:cents|percent:percents|degree:degrees|
    radian:radians rad|unit:units|am:|pm:|celsius:c|fahrenheit:f"""
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
OTHERWISE = re.compile(  # words after a number that are no unit but change or deny it
    r"\b(?:not|no|never|or|and|nor|but|to|wrong|incorrect|false|maybe|perhaps|more|less|fewer|than|plus|minus|times|over|"
    r"squared|cubed|half|halves|thirds?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tens|tenths?|hundredths?|"
    r"lakhs?|crores?|factorial|pi|base|mod|if|when|for|where|except|negative|at|approx\w*|about|is)\b",
    re.IGNORECASE,
)
LABEL = re.compile(  # x, AB, f(x), |S|, f(-2)+f(0)
    r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\([A-Za-z](?:,[A-Za-z])*\))?|\|[A-Z]\||"
    r"[A-Za-z]\(-?[0-9.]+(?:,-?[0-9.]+)*\)(?:[-+*][A-Za-z]\(-?[0-9.]+\))*"
)
STATED = re.compile(r'"(.*)(?:\b(?:is|are|equals)|:)', re.IGNORECASE)  # words before a value
UNITS = {
    form: unit
    for group in PLURALS.split("|")
    for unit, _, forms in [group.strip().partition(":")]
    for form in [unit, *forms.split()]
}


class Answer(NamedTuple):
    """What an answer says. `parts` are Answers, or one Formula for a value."""

    kind: str  # value words list set tuple union matrix row equation inequality ratio based
    parts: tuple = ()
    detail: object = None  # unit, words, brackets, relation or base


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
        if values[0].kind == "words" and len(values) == 2:  # Total: 42
            return values[1]
        if any(value.kind != "value" for value in values):
            raise Unreadable("a ratio of something else")
        return Answer("ratio", values, "".join(items) if TIME.match("".join(items)) else None)
    if r"\pm" in items or r"\mp" in items:
        return Answer("list", tuple(_value(items, sign) for sign in (1, -1)))
    return _value(items)


def _list(parts: list[list[str]]) -> Answer:
    r"""A bare list. `n = 2, 3, 4` lists values of n; `1 \pm 2, 5` has three items."""
    items = []
    for part in parts:
        item = read(part)
        items += item.parts if item.kind == "list" else [item]
    if items[0].kind == "equation" and all(item.kind != "equation" for item in items[1:]):
        items[0] = right_side(items[0]) or items[0]
    labels = [item.parts[0].detail for item in items if item.kind == "equation" and item.parts[0].kind == "label"]
    if len(labels) == len(items) and len(set(labels)) == 1:  # x = 1, x = 2
        items = [item.parts[-1] for item in items]
    return Answer("list", tuple(items))


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
        condition, builder = latex.split(inner, ("|", ":"))
        symbol = (condition[0] or [""])[0]
        named = symbol.isalpha() or symbol[1:] in latex.SYMBOLS
        if len(builder) == 1 and named and condition[0][1:2] in ([], [r"\in"]):
            return read(condition[1])  # {x : x > 3}
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
    scale = formula(factor + ["1"] * (factor == ["-"]))
    if matrix is None or any(cell.kind != "value" for row in matrix.parts for cell in row.parts):
        raise Unreadable("not a matrix with a factor")
    scaled = [
        [Answer("value", (algebra.multiply(scale, cell.parts[0]),)) for cell in row.parts] for row in matrix.parts
    ]
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
        pair = [right_side(read(part)) for part in (exact, parts[at + 1])]
        if any(x is None or x.kind != "value" for x in pair) or not algebra.close(*(x.parts[0] for x in pair)):
            raise Unreadable("an approximation of something else")
        return read(exact)
    values = [_value(part) for part in parts]
    if any(value.kind != "value" for value in values):
        raise Unreadable("a relation of words")
    sides = [value.parts[0] for value in values]
    less, more = {"<", "≤"}, {">", "≥"}
    if len(found) == 2 and (set(found) <= less or set(found) <= more) and is_symbol(sides[1]):
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


def right_side(a: Answer) -> Answer | None:
    """What an equation says a value is: 5 for x = 5, 5 = x, a + b = 5 and 2 + 3 = 5, but None for 2x = 10 and 2 = 5."""
    if a.kind != "equation":
        return a
    first, last = a.parts[0], a.parts[-1]
    constants = [part for part in a.parts if part.kind == "value" and algebra.constant(part.parts[0])]
    if any(algebra.equal(constants[0].parts[0], other.parts[0]) is False for other in constants[1:]):
        return None
    if last.kind == "value" and len(constants) == 1 and is_symbol(last.parts[0]):
        return constants[0]
    if first.kind == "label" or first in constants and last in constants:
        return last
    if first.kind == last.kind == "based" and all(1 < base < 37 for _, base in (first.detail, last.detail)):
        return last if int(*first.detail) == int(*last.detail) else None  # 555_{10} = 4210_5
    if first.kind != "value" or last.kind != "value" or not last.parts[0].top:
        return None
    coefficients, symbols = first.parts[0].top.values(), frozenset().union(*first.parts[0].top)
    return last if len(symbols) > 1 and set(coefficients) <= {1, -1} else None


def _side(items: list[str]) -> Answer:
    """The left side of an equation: a label such as x, f(x), AB or `Area`, or a formula."""
    name = "".join(items)
    if LABEL.fullmatch(name) and name != "i":
        return Answer("label", (), name)
    try:
        value = read(items)
    except Unreadable:
        return Answer("label", (), name)
    named = (
        value.kind == "words"
        or value.kind == "tuple"
        and all(x.kind == "value" and is_symbol(*x.parts) for x in value.parts)
    )
    return Answer("label", (), name) if named else value


def is_symbol(a: Formula) -> bool:
    """Whether a formula is one symbol."""
    return (
        a.bottom == {algebra.ONE: 1}
        and list(a.top.values()) == [1]
        and not algebra.constant(a)
        and all(len(key) == 1 and all(isinstance(x, str) and e == 1 for x, e in key) for key in a.top)
    )


def _words(text: str) -> Answer:
    return Answer("words", (), text)


def _value(items: list[str], sign: int = 1) -> Answer:
    """A formula with its unit."""
    items, unit = list(items), []
    if based := _based(items):
        return based
    if len(items) > 1 and (stated := STATED.fullmatch(items[0])) and not OTHERWISE.search(stated[1]):
        del items[0]
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
    value = formula(items, sign)
    if scale := SCALES.get(unit.split()[0].lower()) if unit else None:
        value, unit = algebra.multiply(value, algebra.number(scale)), unit.partition(" ")[2]
    return Answer("value", (value,), _unit(unit))


def _power_of_unit(items: list[str]) -> int:
    """How many tokens at the end are the exponent of words."""
    for n in (2, 4):
        if (
            len(items) > n
            and items[-n] == "^"
            and items[-n - 1].startswith('"')
            and "".join(items[-n:]).strip("^{}").isdigit()
        ):
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
    return () if any(unit == "unit" for unit, _ in units) else tuple(sorted(set(units)))


def _based(items: list[str]) -> Answer | None:
    """A number with its base as a subscript, such as 4210_{5}."""
    match = BASED.fullmatch("".join(items))
    return match and Answer("based", (), (match[2].lstrip("0").upper() or "0", int(match[3] or match[4])))

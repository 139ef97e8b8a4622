"""Formulas from the tokens of an answer (minir1/tasks/latex.py), by recursive descent."""

import math
from fractions import Fraction

from minir1.tasks.algebra import (
    TooLarge,
    Unreadable,
    add,
    atom,
    divide,
    frozen,
    logarithm,
    multiply,
    negative,
    number,
    power,
    rational,
)
from minir1.tasks.latex import CLOSE, FUNCTIONS, OPEN, SYMBOLS, closing, is_number

MAX_DEPTH = 40  # of brackets and fractions in one another
MAX_FACTORIAL = 5_000


def formula(items: list[str], sign: int = 1):
    r"""The value of tokens that are one formula (minir1/tasks/algebra.py). sign: +1 or -1, how `\pm` is read."""
    reader = _Reader(items, sign)
    value = reader.sum(0)
    if reader.at < len(items):
        raise Unreadable(f"unexpected {items[reader.at]}")
    return value


class _Reader:
    """Reads a formula from left to right; `at` is the index of the next token."""

    def __init__(self, items: list[str], sign: int):
        self.items, self.sign, self.at = items, sign, 0

    def next(self) -> str:
        """The next token, "" at the end."""
        return self.items[self.at] if self.at < len(self.items) else ""

    def take(self) -> str:
        """The next token, which is then behind the reader. Unreadable at the end."""
        token = self.next()
        self.at += 1
        if not token:
            raise Unreadable("the end is missing")
        return token

    def sum(self, depth: int):
        r"""± product ± product …; `\pm` and `\mp` as `sign` says."""
        if depth > MAX_DEPTH:
            raise TooLarge("too deep")
        total = number(0)
        first = True
        while first or self.next() in ("+", "-", r"\pm", r"\mp"):
            factor = 1
            while self.next() in ("+", "-", r"\pm", r"\mp"):
                factor *= {"+": 1, "-": -1, r"\pm": self.sign, r"\mp": -self.sign}[self.take()]
            term = self.product(depth)
            total = add(total, term if factor > 0 else negative(term))
            first = False
        return total

    def product(self, depth: int):
        """factor · factor / factor …, the dot written or not."""
        value = self.factor(depth)
        while True:
            token = self.next()
            if token in ("*", "/"):
                self.take()
                factor = 1
                while self.next() in ("+", "-"):
                    factor = -factor if self.take() == "-" else factor
                other = self.factor(depth)
                other = other if factor > 0 else negative(other)
                value = multiply(value, other) if token == "*" else divide(value, other)
            elif self._starts(token):
                if is_number(token):
                    raise Unreadable("two numbers side by side")
                value = multiply(value, self.factor(depth))
            else:
                return value

    def _starts(self, token: str) -> bool:
        """Whether a factor may start here, without a sign for the product."""
        return bool(token) and (
            token.isalpha()
            or is_number(token)
            or token in ("(", "{", "[")
            or (
                token[0] == "\\"
                and (
                    token[1:] in FUNCTIONS
                    or token[1:] in SYMBOLS
                    or token in (r"\frac", r"\sqrt", r"\pi", r"\binom", r"\infty", r"\abs")
                )
            )
        )

    def factor(self, depth: int):
        """A base with factorials and exponents."""
        start = self.at
        value = self.base(depth)
        if self.items[start].isdigit() and self.next() == r"\frac" and (part := self._proper()) is not None:
            return add(value, part)  # a mixed number
        while self.next() in ("!", "^", "°"):
            if self.next() == "^":
                self.take()
                value = power(value, self.exponent(depth))
            elif self.take() == "!":
                value = _factorial(value)
            else:
                value = divide(multiply(value, atom("π")), number(180))
        return value

    def _proper(self):
        r"""The value of a `\frac` of two whole numbers, as in 1\frac{4}{5}; else None, and nothing is read."""
        start = self.at
        self.take()
        parts = []
        for _ in range(2):
            begin = self.at
            parts.append(self.argument(0))
            if not all(token.isdigit() or token in "{}" for token in self.items[begin : self.at]):
                self.at = start
                return None
        return divide(*parts)

    def exponent(self, depth: int):
        if self.next() in ("-", "+"):
            return negative(self.factor(depth)) if self.take() == "-" else self.factor(depth)
        if self.next() in ("{", "("):
            return self.bracket(depth)
        return self.base(depth + 1)

    def bracket(self, depth: int):
        end = closing(self.items, self.at)
        inner = _Reader(self.items[self.at + 1 : end], self.sign)
        value = inner.sum(depth + 1)
        if inner.at < len(inner.items):
            raise Unreadable(f"unexpected {inner.next()}")
        if (self.items[self.at], self.items[end]) not in (("(", ")"), ("{", "}"), ("[", "]")):
            raise Unreadable("brackets that do not match")
        self.at = end + 1
        return value

    def argument(self, depth: int):
        r"""What a command such as \frac takes: a group, or one digit or letter."""
        if self.next() in ("{", "("):
            return self.bracket(depth)
        token = self.next()
        if token.isdigit() and len(token) > 1:
            self.items = [*self.items[: self.at], *token, *self.items[self.at + 1 :]]
        return self.base(depth + 1)

    def base(self, depth: int):
        if depth > MAX_DEPTH:
            raise TooLarge("too deep")
        if self.next() in ("(", "{", "["):
            return self.bracket(depth)
        token = self.take()
        if is_number(token):
            return self.number(token)
        if token == "|":
            return self.absolute(depth)
        if token == "i":
            return atom("i")
        if token.isalpha() or (token[0] == "\\" and token[1:] in SYMBOLS):
            return atom(token + self.subscript())
        if token == r"\pi":
            return atom("π")
        if token == r"\infty":
            return atom("∞")
        if token == r"\frac":
            top = self.argument(depth)
            return divide(top, self.argument(depth))
        if token == r"\sqrt":
            return self.root(depth)
        if token == r"\abs":
            return _function("abs", self.bracket(depth))
        if token == r"\binom":
            top = self.argument(depth)
            return _binomial(top, self.argument(depth))
        if token[0] == "\\" and token[1:] in FUNCTIONS:
            return self.function(token[1:], depth)
        raise Unreadable(f"unexpected {token}")

    def number(self, token: str):
        mantissa, _, exponent = token.lower().partition("e")
        if exponent and abs(int(exponent)) > 300:
            raise Unreadable("too large an exponent")
        value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
        return number(value)

    def subscript(self) -> str:
        marks = ""
        while self.next() == "'":
            marks += self.take()
        if self.next() != "_":
            return marks
        self.take()
        if self.next() == "{":
            end = closing(self.items, self.at)
            name = "".join(self.items[self.at + 1 : end])
            self.at = end + 1
            return f"{marks}_{name}"
        return f"{marks}_{self.take()}"

    def root(self, depth: int):
        degree = number(2)
        if self.next() == "[":
            degree = self.bracket(depth)
        if rational(degree) in (None, 0):
            raise Unreadable("a root of unknown degree")
        return power(self.argument(depth), divide(number(1), degree))

    def absolute(self, depth: int):
        level = 0
        for end in range(self.at, len(self.items)):
            level += (self.items[end] in OPEN) - (self.items[end] in CLOSE)
            if self.items[end] == "|" and level == 0:
                break
        else:
            raise Unreadable("a bar that is not closed")
        inner = _Reader(self.items[self.at : end], self.sign)
        value = inner.sum(depth + 1)
        if inner.at < len(inner.items):
            raise Unreadable(f"unexpected {inner.next()}")
        self.at = end + 1
        return _function("abs", value)

    def function(self, name: str, depth: int):
        base = exponent = None
        while self.next() in ("_", "^"):
            if self.take() == "_":
                base = self.argument(depth)
            else:
                exponent = self.exponent(depth)
        if self.next() in ("(", "{"):
            argument = self.bracket(depth)
        else:
            if self.next() == "-":
                self.take()
                argument = negative(self.factor(depth))
            else:
                argument = self.factor(depth)
            while self._starts(self.next()) and self.next()[1:] not in FUNCTIONS:
                argument = multiply(argument, self.factor(depth))
            if self.next() == "/":
                self.take()
                argument = divide(argument, self.factor(depth))
        if exponent is not None and rational(exponent) == -1:
            name, exponent = f"arc{name}", None
        value = _function(name, argument, base)
        return value if exponent is None else power(value, exponent)


def _function(name: str, argument, base=None):
    if name in ("log", "ln", "lg"):
        value = logarithm(argument)
        base = base or (number(10) if name == "lg" else None)
        return value if base is None else divide(value, logarithm(base))
    if base is not None:
        raise Unreadable("a subscript of a function")
    if name == "exp":
        return power(atom("e"), argument)
    if name == "abs" and rational(argument) is not None:
        return number(abs(rational(argument)))
    quotients = {"tan": ("sin", "cos"), "cot": ("cos", "sin"), "sec": ("", "cos"), "csc": ("", "sin")}
    if name in quotients:
        top, bottom = (atom((part, frozen(argument))) if part else number(1) for part in quotients[name])
        return divide(top, bottom)
    if name not in ("sin", "cos", "abs", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"):
        raise Unreadable(f"no function {name}")
    return atom((name, frozen(argument)))


def _whole(value, most: int) -> int:
    whole = rational(value)
    if whole is not None and whole > most:
        raise TooLarge("a large factorial or binomial")
    if whole is None or whole.denominator != 1 or not 0 <= whole <= most:
        raise Unreadable("a factorial or binomial of no small whole number")
    return int(whole)


def _factorial(value):
    result = 1
    for factor in range(2, _whole(value, MAX_FACTORIAL) + 1):
        result *= factor
    return number(result)


def _binomial(top, bottom):
    return number(math.comb(_whole(top, MAX_FACTORIAL), _whole(bottom, MAX_FACTORIAL)))

r"""Short mathematical answers as people and models write them, LaTeX or plain: tokens, and formulas made from them.

A token is a number, a command such as `\frac`, one letter, one sign, or words, which begin with a quotation mark:
`"square inches`. What the field writes in several ways becomes one: `\dfrac` is `\frac`, `−` is `-`, `\mathrm{cm}` and
`cm` are words, `\left`, `\!` and other spacing are dropped.
"""

import math
import re
from fractions import Fraction

from minir1.tasks.algebra import (
    Unreadable, add, atom, divide, frozen, multiply, negative, number, power, rational,
)

MAX_CHARS = 1_000  # of an answer; longer ones are no final answers
MAX_DEPTH = 40  # of brackets and fractions in one another
MAX_FACTORIAL = 5_000

UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "⁻": "^-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": "/", "∕": "/", "⁄": "/", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "≈": r"\approx ", "°": r"^\circ ", "º": r"^\circ ",
    "∅": r"\emptyset ", "⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ", "½": r"\frac12 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ",
    "∠": r"\angle ", "€": r"\$", "£": r"\$", "′": "'", "’": "'", "‘": "'", "“": "", "”": "", "…": r"\ldots ", "\u200b": "", "\ufeff": "",
    "（": "(", "）": ")", "，": ",", "：": ":", "＝": "=", "。": ".",
} | {high: f"^{low}" for high, low in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")} | {low: f"_{n}" for n, low in enumerate("₀₁₂₃₄₅₆₇₈₉")}
UNICODE = str.maketrans(UNICODE)

SPACING = re.compile(
    r"(?<!\\)\\[,;:> ]|~|\\(?:left|right|[bB]igg?[lrm]?|middle|quad|qquad|enspace|thinspace|displaystyle|textstyle|scriptstyle|limits|"
    r"nolimits|phantom\{[^{}]*\}|hspace\{[^{}]*\}|cancelto|bf|rm|it|large|Large)(?![A-Za-z])\.?"
)
DROPPED = re.compile(r"\\!|[\x00-\x08\x0e-\x1f]")
GROUPS = re.compile(r"(?<=[0-9])(?:\{,\}\s*|,\s*\\!\s*|\\!\s*,\s*|\\,)(?=[0-9]{3}(?![0-9]))")  # 10,\!080, 1{,}000, 1\,000
SPACED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])")  # 10 080
DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z])|\{\s*o\s*\}|\\degree)|\\degrees?(?![A-Za-z])|\{\s*\\circ\s*\}")
ORDINAL = re.compile(r"(?<=[0-9])\s*\^?\s*\{?\s*(?:\\(?:text|mathrm|textsuperscript)\s*\{\s*)?(?:st|nd|rd|th)(?![A-Za-z])\s*\}{0,2}")
WORDS = re.compile(
    r"\\(?:text|mbox|hbox|textbf|textit|textrm|textsf|texttt|textnormal|emph|mathrm|mathbf|mathit|mathsf|operatorname|"
    r"boldsymbol|bm|underline|unit|textsc)\*?\s*\{([^{}]*)\}"
)
WRAPPER = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}|\*\*(.*)\*\*|\\\((.*)\\\)|\\\[(.*)\\\]|\$\$(.*)\$\$|\$((?:[^$\\]|\\.)+)\$", re.DOTALL)
MIXED = re.compile(r"(?<![0-9.)}\]/^_A-Za-z])([0-9]+)\s+(?:and\s+)?([0-9]+)\s*/\s*([0-9]+)(?![0-9.^])")
MATRIX = re.compile(r"\\begin\s*\{[pbB]?(?:small)?matrix\*?\}|\\begin\s*\{array\}\s*\{[^{}]*\}")
END = re.compile(r"\\end\s*\{(?:[pbB]?(?:small)?matrix\*?|array)\}")
REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{([0-9]+)\}")  # 0.1\overline{6}
TOKEN = re.compile(r"\x01[^\x02]*\x02|\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+(?![0-9A-Za-z]))?|\.[0-9]+|[A-Za-z]{2,}|\S", re.DOTALL)
SYNONYMS = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom", r"\tbinom": r"\binom",
    r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\lt": "<", r"\gt": ">", r"\ast": "*",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(", r"\rparen": ")",
    r"\vert": "|", r"\lvert": "|", r"\rvert": "|", r"\mid": "|", r"\varnothing": r"\emptyset", r"\times": "*", r"\cdot": "*",
    r"\div": "/", r"\colon": ":", r"\ne": "≠", r"\le": "≤", r"\ge": "≥", r"\%": "%", r"\$": "$", r"\#": "#", r"\&": "&", r"\_": "_",
    r"\dots": r"\ldots", r"\cdots": r"\ldots", r"\|": "|", r"\arccot": r"\operatorname", r"\union": r"\cup", r"\prime": "'",
    r"\implies": r"\Rightarrow",
}
NAMES = {  # plain words that are mathematics
    **{name: f"\\{name}" for name in ("sqrt", "pi", "infty", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "arcsin", "arccos",
                                      "arctan", "sinh", "cosh", "tanh", "theta", "alpha", "beta", "gamma", "lambda", "phi", "omega", "cup", "binom", "frac")},
    "infinity": r"\infty", "Infinity": r"\infty", "inf": r"\infty", "oo": r"\infty", "and": ",", "or": ",", "union": r"\cup", "abs": r"\abs", "Pi": r"\pi",
    "percent": "%", "percentage": "%", "degrees": "°", "degree": "°", "deg": "°", "in": '"in', "to": '"to', "is": '"is', "no": '"no',
}
SHORT_WORDS = set("cm mm km kg mg lb lbs ft yd hr hrs sec min mph ml sq cu am pm yes per the are all for not one two six ten odd oz mi".split())
FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg", "exp")
SYMBOLS = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell".split()
)
OPEN, CLOSE = ("(", "[", "{", r"\{", r"\langle", r"\matrix", r"\lfloor", r"\lceil"), (")", "]", "}", r"\}", r"\rangle", r"\endmatrix", r"\rfloor", r"\rceil")


def tokens(text: str) -> list[str]:
    """The tokens of an answer. Unreadable if it is empty or has more than MAX_CHARS characters."""
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    text = re.sub(r"√\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])", r"\\sqrt{\1}", text).translate(UNICODE).strip()
    for _ in range(4):
        text = text.strip().rstrip(".,;:").strip() if not text.endswith("\\,") else text[:-2]
        wrapped = WRAPPER.fullmatch(text)
        inner = next((group for group in wrapped.groups() if group is not None), "") if wrapped else ""
        if not wrapped or not _balanced(inner):
            break
        text = inner
    text = re.sub(r"\\\\\s*\[[^\]]*\]", r"\\\\ ", text)  # the height of a row
    text = re.sub(r"\\(?:mathbb|mathbf|Bbb)\s*\{?\s*R\s*\}?", r"(-\\infty,\\infty)", text)
    text = GROUPS.sub("", text)
    text = DROPPED.sub("", SPACING.sub(" ", DEGREE.sub("°", text)))
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup ", text)
    text = REPEATING.sub(_repeating, ORDINAL.sub("", text))
    text = MATRIX.sub(r"\\matrix ", END.sub(r"\\endmatrix ", text))
    for _ in range(3):
        text = WORDS.sub(_words, text)
    text = SPACED.sub(lambda match: match[0].replace(" ", ""), text)
    text = MIXED.sub(r"(\1+\2/\3)", text)
    result = []
    for token in TOKEN.findall(text):
        for piece in _pieces(token):
            if piece.startswith('"') and result and result[-1].startswith('"'):
                result[-1] += " " + piece[1:]
            else:
                result.append(piece)
    if not result:
        raise Unreadable("empty")
    return result


def split(items: list[str], separators: tuple[str, ...]) -> tuple[list[list[str]], list[str]]:
    """The parts between separators that are in no bracket, and these separators."""
    parts, found, depth = [[]], [], 0
    for token in items:
        depth += (token in OPEN) - (token in CLOSE)
        if depth == 0 and token in separators:
            parts.append([])
            found.append(token)
        else:
            parts[-1].append(token)
    return parts, found


def closing(items: list[str], start: int) -> int:
    """Index of the bracket that closes the one at `start`, whatever its kind. Unreadable if there is none."""
    depth = 0
    for i in range(start, len(items)):
        depth += (items[i] in OPEN) - (items[i] in CLOSE)
        if depth == 0:
            return i
    raise Unreadable("a bracket that is not closed")


def formula(items: list[str], sign: int = 1):
    r"""The value of tokens that are one formula (minir1/tasks/algebra.py). sign: +1 or -1, how `\pm` is read."""
    reader = _Reader(items, sign)
    value = reader.sum(0)
    if reader.at < len(items):
        raise Unreadable(f"unexpected {items[reader.at]}")
    return value


def _balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0 and "**" not in text


def _repeating(match: re.Match) -> str:
    whole, start, period = match.groups()
    value = Fraction(int(whole + start + period or 0) - int(whole + start or 0), (10 ** len(period) - 1) * 10 ** len(start))
    return f"({value})"


def _words(match: re.Match) -> str:
    content = match[1].strip().strip("\x01\x02")
    inner = re.sub(r"[\x01\x02]", "", content)
    if content in FUNCTIONS:
        return f"\\{content} "
    if not re.search(r"[A-Za-z]", inner) or content in ("i", "e") or re.fullmatch(r"\(?[A-Z]\)", inner):
        return f" {inner} "
    if re.fullmatch(r"(?i),?\s*(?:and|or)\s*,?", inner):
        return " , "
    if re.search(r"[\\^+=<>]|[0-9].*[A-Za-z]", inner):  # mathematics
        return f" {inner} "
    return f"\x01{inner}\x02"


def _pieces(token: str) -> list[str]:
    if token[0] == "\x01":
        return ['"' + token[1:-1]]
    if token[0] == "\\" and token[1:] in ("text", "mathrm", "operatorname"):
        raise Unreadable(f"unexpected {token}")
    token = SYNONYMS.get(token, token)
    token = SYNONYMS.get(token, token)
    if len(token) < 2 or not token.isalpha():
        return [token]
    if token in NAMES:
        return [NAMES[token]]
    if token.lower() in SHORT_WORDS or (len(token) > 3 and set(token.lower()) & set("aeiouy")) or token.istitle():
        return ['"' + token]
    return list(token)


class _Reader:
    """Reads a formula from left to right; `at` is the index of the next token."""

    def __init__(self, items: list[str], sign: int):
        self.items, self.sign, self.at = items, sign, 0

    def next(self) -> str:
        return self.items[self.at] if self.at < len(self.items) else ""

    def take(self) -> str:
        token = self.next()
        self.at += 1
        if not token:
            raise Unreadable("the end is missing")
        return token

    def sum(self, depth: int):
        if depth > MAX_DEPTH:
            raise Unreadable("too deep")
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
                if token[0].isdigit() or token[0] == ".":
                    raise Unreadable("two numbers side by side")
                value = multiply(value, self.factor(depth))
            else:
                return value

    def _starts(self, token: str) -> bool:
        """Whether a factor may start here, without a sign for the product."""
        return bool(token) and (
            token[0].isalnum() or token[0] == "." or token in ("(", "{", "[")
            or (token[0] == "\\" and (token[1:] in FUNCTIONS or token[1:] in SYMBOLS
                                      or token in (r"\frac", r"\sqrt", r"\pi", r"\binom", r"\infty", r"\abs")))
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
            if not all(token.isdigit() or token in "{}" for token in self.items[begin:self.at]):
                self.at = start
                return None
        return divide(*parts)

    def exponent(self, depth: int):
        if self.next() in ("-", "+"):
            return negative(self.factor(depth)) if self.take() == "-" else self.factor(depth)
        if self.next() in ("{", "("):
            return self.bracket(depth)
        token = self.next()
        return self.base(depth + 1) if token and not token.startswith('"') else self.take()

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
            raise Unreadable("too deep")
        token = self.next()
        if token in ("(", "{", "["):
            return self.bracket(depth)
        self.take()
        if token[0].isdigit() or token[0] == ".":
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
            if self.next() == "/" :
                self.take()
                argument = divide(argument, self.factor(depth))
        if exponent is not None and rational(exponent) == -1:
            name, exponent = f"arc{name}", None
        value = _function(name, argument, base)
        return value if exponent is None else power(value, exponent)


def _function(name: str, argument, base=None):
    if name in ("log", "ln", "lg"):
        value = atom(("log", frozen(argument)))
        base = base or (number(10) if name == "lg" else None)
        return value if base is None else divide(value, atom(("log", frozen(base))))
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

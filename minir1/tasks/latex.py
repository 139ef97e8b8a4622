r"""Short mathematical answers as people and models write them, LaTeX or plain, as tokens.

A token is a number, a command such as `\frac`, one letter, one sign, or words, which begin with a quotation mark:
`"square inches`. What the field writes in several ways becomes one: `\dfrac` is `\frac`, `−` is `-`, `\mathrm{cm}` and
`cm` are words, `\left`, `\!` and other spacing are dropped.
"""

import re
from fractions import Fraction

from minir1.tasks.algebra import Unreadable

MAX_CHARS = 1_000  # of an answer; longer ones are no final answers
WRAPPINGS = 4  # of \boxed, $ $, ** and the like around one another


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2]))


UNICODE = str.maketrans(
    {
        letter: f"{command} "
        for letter, command in _pairs(
            r"""× \times · \cdot ⋅ \cdot ∙ \cdot √ \sqrt ∛ \sqrt[3] π \pi ∞ \infty ∪ \cup ∩ \cap ∈ \in ≤ \le ⩽ \le ≥ \ge
        ⩾ \ge ≠ \ne ± \pm ∓ \mp ≈ \approx ° ^\circ º ^\circ ∅ \emptyset ⟨ \langle ⟩ \rangle ℝ \mathbb{R} θ \theta
        α \alpha β \beta γ \gamma λ \lambda φ \phi ω \omega ½ \frac12 ¼ \frac14 ¾ \frac34 ⅓ \frac13 ⅔ \frac23 ∠ \angle
        … \ldots"""
        ).items()
    }
    | _pairs(r"− - – - — - ‐ - ‑ - ⁻ ^- ÷ / ∕ / ⁄ / € \$ £ \$ ′ ' ’ ' ‘ ' （ ( ） ) ， , ： : ＝ = 。 .")
    | {"¢": r"\text{ cents}"}
    | dict.fromkeys("“”\u200b\ufeff", "")
    | {letter: f"^{n}" for n, letter in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {letter: f"_{n}" for n, letter in enumerate("₀₁₂₃₄₅₆₇₈₉")}
)
SYNONYMS = _pairs(
    r"""\dfrac \frac \tfrac \frac \cfrac \frac \dbinom \binom \tbinom \binom \leq ≤ \leqslant ≤ \le ≤ \geq ≥ \geqslant ≥
    \ge ≥ \neq ≠ \ne ≠ \lt < \gt > \ast * \times * \cdot * \div / \lbrace \{ \rbrace \} \lbrack [ \rbrack ] \lparen (
    \rparen ) \vert | \lvert | \rvert | \mid | \| | \colon : \% % \$ $ \# # \& & \_ _ \varnothing \emptyset
    \bigcup \cup \bigcap \cap \dots \ldots \cdots \ldots \prime ' \implies \Rightarrow"""
)
FUNCTIONS = tuple("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp".split())
SYMBOLS = frozenset(
    """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau phi
    varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell""".split()
)
MATHEMATICS = (  # plain words that are mathematics
    {
        name: f"\\{name}"
        for name in (*FUNCTIONS, *"sqrt pi infty theta alpha beta gamma lambda phi omega cup frac".split())
    }
    | _pairs(r"infinity \infty Infinity \infty inf \infty oo \infty union \cup abs \abs Pi \pi and , or ,")
    | _pairs("percent % percentage % degrees ° degree ° deg °")
)
SHORT_WORDS = frozenset(  # of fewer than four letters, which are no product of symbols
    """cm mm km kg mg lb lbs ft yd hr hrs sec min mph ml sq cu am pm yes per the are all for not one two six ten odd oz
    mi in to is no""".split()
)
OPEN = ("(", "[", "{", r"\{", r"\langle", r"\matrix", r"\lfloor", r"\lceil")
CLOSE = (")", "]", "}", r"\}", r"\rangle", r"\endmatrix", r"\rfloor", r"\rceil")

WRAPPER = re.compile(
    r"\\(?:boxed|fbox)\s*\{(.*)\}|\*\*(.*)\*\*|\\\((.*)\\\)|\\\[(.*)\\\]|\$\$(.*)\$\$|\$((?:[^$\\]|\\.)+)\$", re.DOTALL
)
WORDS = re.compile(
    r"\\(?:text|mbox|hbox|textbf|textit|textrm|textsf|texttt|textnormal|emph|mathrm|mathbf|mathit|mathsf|operatorname|"
    r"boldsymbol|bm|underline|unit|textsc)\*?\s*\{([^{}]*)\}"
)
TOKEN = re.compile(
    r"\x01[^\x02]*\x02|\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+(?![0-9A-Za-z]))?|\.[0-9]+|[A-Za-z]{2,}|\S",
    re.DOTALL,
)
DOLLAR = re.compile(r"(?<!\\)\$")


def _repeating(match: re.Match) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, start, period = match.groups()
    difference = int(whole + start + period) - int(whole + start or 0)
    return f"({Fraction(difference, (10 ** len(period) - 1) * 10 ** len(start))})"


RULES = [
    (r"√\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])", r"\\sqrt{\1}"),
    (r"[\x00-\x08\x0e-\x1f]", ""),
    (r"^(?:[Aa]n?|[Tt]he) (?=[A-Za-z]{3})", ""),
]
BASES = dict(zip("two three four five six seven eight nine ten eleven twelve sixteen".split(), (*range(2, 13), 16)))
LATER_RULES = [  # in this order
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:mathbf|boldsymbol|bm)\s*(?=\{[^{}]*\\)", ""),
    (r"\\(?:begin|end)\s*\{(?:aligned|align\*?|split|gathered)\}", " "),
    (r"(?:\\\\\s*)?&\s*=", "="),
    (r"(?:\{|^)([^{}]*)\\over(?![A-Za-z])([^{}]*)(?:\}|$)", r"\\frac{\1}{\2}"),
    (  # 52 in base 8
        r"(?<![0-9A-Za-z.,_])([0-9]+)(?:\s|~|\\[ ,]|\\text\s*\{|\()*\s(?:in )?\(?base[ -]?\}?\s*"
        rf"([0-9]+|{'|'.join(BASES)})\s*\)?\}}?\)?$",
        lambda match: f"{match[1]}_{{{BASES.get(match[2], match[2])}}}",
    ),
    (  # 52_{\text{eight}}
        rf"_\s*\{{\s*\\(?:text|mathrm)\s*\{{\s*({'|'.join(BASES)})\s*\}}\s*\}}",
        lambda match: f"_{{{BASES[match[1]]}}}",
    ),
    (r"\\\\\s*\[[^\]]*\]", r"\\\\ "),  # the height of a row
    (r"\\(?:mathbb|mathbf|Bbb)\s*\{?\s*R\s*\}?(?![A-Za-z])", r"(-\\infty,\\infty)"),
    (r"(?<=[0-9])(?:\{,\}\s*|,\s*\\!\s*|\\!\s*,\s*|\\,)(?=[0-9]{3}(?![0-9]))", ""),  # 10,\!080 and 1{,}000 and 1\,000
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z])|\{\s*o\s*\}|\\degree)|\\degrees?(?![A-Za-z])", "°"),
    (r"(?<!\\)\\[,;:> ]|~", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])\.?", " "),
    (r"\\(?:q?quad|enspace|thinspace|(?:display|text|script)style|(?:no)?limits|bf|rm|it|[lL]arge)(?![A-Za-z])", " "),
    (r"\\[hv]?(?:phantom|space)\*?\{[^{}]*\}|(?<!\\)\\[()\[\]]", " "),
    (r"\\!", ""),
    (r"\b([AaPp])\. ?[Mm]\b\.?", r"\1m"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (  # 5th
        r"(?<=[0-9])\s*\^?\s*\{?\s*(?:\\(?:text|mathrm|textsuperscript)\s*\{\s*)?(?:st|nd|rd|th)(?![A-Za-z])\s*\}{0,2}",
        "",
    ),
    (r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{([0-9]+)\}", _repeating),
    (r"\\begin\s*\{[pbB]?(?:small)?matrix\*?\}|\\begin\s*\{array\}\s*\{[^{}]*\}", r"\\matrix "),
    (r"\\end\s*\{(?:[pbB]?(?:small)?matrix\*?|array)\}", r"\\endmatrix "),
]
LAST_RULES = [
    (r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])", lambda match: match[0].replace(" ", "")),  # 10 080
    (r"(?<![0-9.)}\]/^_A-Za-z])([0-9]+)\s+(?:and\s+)?([0-9]+)\s*/\s*([0-9]+)(?![0-9.^])", r"(\1+\2/\3)"),  # 1 4/5
]
RULES, LATER_RULES, LAST_RULES = (
    [(re.compile(pattern), put) for pattern, put in rules] for rules in (RULES, LATER_RULES, LAST_RULES)
)


def tokens(text: str) -> list[str]:
    """The tokens of an answer. Unreadable if it is empty or has more than MAX_CHARS characters."""
    if len(text) > MAX_CHARS:
        raise Unreadable("too long")
    text = _unwrapped(_rewritten(text, RULES).translate(UNICODE))
    text = _rewritten(text, LATER_RULES)
    if len(DOLLAR.findall(text)) % 2 == 0:
        text = DOLLAR.sub(" ", text)
    for _ in range(3):  # words in words
        text = WORDS.sub(_words, text)
    result = []
    for token in TOKEN.findall(_rewritten(text, LAST_RULES)):
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


def is_number(token: str) -> bool:
    """Whether a token is a number, such as 12, 1.5, .5 or 1e-3."""
    return token[0] in "0123456789" or token[0] == "." and len(token) > 1


def _unwrapped(text: str) -> str:
    r"""The text without \boxed{}, $ $, bold and punctuation around it."""
    for _ in range(WRAPPINGS):
        text = text.strip()
        text = text[:-2] if text.endswith("\\,") else text.rstrip(".,;:").strip()
        wrapped = WRAPPER.fullmatch(text)
        inner = next((group for group in wrapped.groups() if group is not None), "") if wrapped else ""
        if not wrapped or not _balanced(inner):
            break
        text = inner
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0 and "**" not in text


def _rewritten(text: str, rules: list) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _words(match: re.Match) -> str:
    r"""The content of \text{} and the like: mathematics as it is, words between \x01 and \x02."""
    inner = re.sub(r"[\x01\x02]", "", match[1]).strip()
    if inner in FUNCTIONS:
        return f"\\{inner} "
    if re.fullmatch(r"(?i),?\s*(?:and|or)\s*,?", inner):
        return " , "
    unit = match.string[: match.start()].rstrip(" ~\\").endswith((*"0123456789", "°"))
    if unit and (power := re.fullmatch(r"([A-Za-z]+)(\^\{?[23]\}?)", inner)):  # m^2
        return f"\x01{power[1]}\x02{power[2]}"
    letters = inner in ("i", "e") or (not unit and re.fullmatch(r"\(?[A-Z]\)?(?:,? ?(?:and )?\(?[A-Z]\)?)*", inner))
    words = re.search(r"[A-Za-z]", inner) and not letters
    if not words or re.search(r"[\\^+=<>]|[0-9].*[A-Za-z]", inner):
        return f" {inner} "
    return f"\x01{inner}\x02"


def _pieces(token: str) -> list[str]:
    if token[0] == "\x01":
        return ['"' + token[1:-1]]
    token = SYNONYMS.get(token, token)
    if len(token) < 2 or not token.isalpha():
        return [token]
    if token in MATHEMATICS:
        return [MATHEMATICS[token]]
    if token.lower() in SHORT_WORDS or (len(token) > 3 and set(token.lower()) & set("aeiouy")) or token.istitle():
        return ['"' + token]
    return list(token)

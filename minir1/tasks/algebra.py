"""Exact arithmetic with the numbers and formulas of short answers, by hand: fractions, roots, π, i, symbols.

A formula is a quotient of two sums. A sum is a dict {monomial: coefficient}, coefficients are Fractions, and a monomial
is a frozenset of (atom, exponent). An atom is

    a prime p    with an exponent in (0, 1): √12 is 2 · 3^(1/2). Distinct products of such roots are linearly
                 independent over the rationals (Besicovitch 1940), so a sum of them is zero only if each coefficient is
    "i"          with exponent 1
    another str  a symbol, or the constants "π" and "e"
    a tuple      a function or power that is not simplified, such as ("sin", argument)

So without tuples, two formulas are equal iff N₁·D₂ - N₂·D₁ has no terms left: `zero` decides, and it is no heuristic.
"""

import cmath
import math
from fractions import Fraction
from typing import NamedTuple

MAX_TERMS = 200  # of a sum
MAX_PRODUCTS = 4_000  # of two sums
MAX_BITS = 100_000  # of a coefficient
MAX_POWER = 60  # of a sum of several terms
TRIAL = 2_000  # largest divisor that is tried: what is left below its square is prime
ONE = frozenset()
CONSTANTS = {"i": 1j, "π": cmath.pi, "e": cmath.e}
FUNCTIONS = {"log": cmath.log, "abs": abs, "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan}
FUNCTIONS |= {name: getattr(cmath, name) for name in ("sin", "cos", "sinh", "cosh", "tanh")} | {"^": None, "^^": None}
POINTS = ((0.7324081, 1.3), (1.9134207, 0.8), (0.2718091, 2.9))  # where formulas with tuples are evaluated


class Unreadable(ValueError):
    """The text is no formula that is understood here."""


class TooLarge(Unreadable):
    """Computing it exactly would take too long."""


class Formula(NamedTuple):
    """A quotient of two sums: monomial, a frozenset of (factor, exponent), -> its rational coefficient."""

    top: dict
    bottom: dict


def number(value: int | Fraction) -> Formula:
    """A rational number."""
    return Formula({ONE: Fraction(value)} if value else {}, {ONE: Fraction(1)})


def atom(name, exponent=Fraction(1)) -> Formula:
    """A symbol, a constant or a function value."""
    return Formula({frozenset([(name, Fraction(exponent))]): Fraction(1)}, {ONE: Fraction(1)})


def add(a: Formula, b: Formula) -> Formula:
    """a + b."""
    if a.bottom == b.bottom:
        return Formula(_sum(a.top, b.top), a.bottom)
    return Formula(_sum(_product(a.top, b.bottom), _product(b.top, a.bottom)), _product(a.bottom, b.bottom))


def multiply(a: Formula, b: Formula) -> Formula:
    """a · b."""
    return Formula(_product(a.top, b.top), _product(a.bottom, b.bottom))


def negative(a: Formula) -> Formula:
    """-a."""
    return Formula({key: -value for key, value in a.top.items()}, a.bottom)


def divide(a: Formula, b: Formula) -> Formula:
    """a / b. Unreadable if b is 0."""
    if not b.top:
        raise Unreadable("division by zero")
    if len(b.top) == 1:  # so that the bottom stays 1 where it can
        ((key, value),) = b.top.items()
        inverse = _product({frozenset((x, -e) for x, e in key): 1 / value}, {ONE: Fraction(1)})
        return multiply(a, Formula(_product(inverse, b.bottom), {ONE: Fraction(1)}))
    return multiply(a, Formula(b.bottom, b.top))


def power(a: Formula, b: Formula) -> Formula:
    """a to the power b: exact for rational b, with the real root of a negative number if the root is odd."""
    exponent = rational(b)
    if exponent is None:
        return _power_of_a_sum(a, b)
    if exponent.denominator == 1:
        return _whole_power(a, int(exponent))
    if not a.top:
        return divide(a, number(exponent > 0))
    return multiply(_root(a.top, exponent), _root(a.bottom, -exponent))


def logarithm(a: Formula) -> Formula:
    """ln a, of a positive fraction as the sum over its primes."""
    value = rational(a)
    if value is None or value <= 0:
        return atom(("log", frozen(a)))
    total = number(0)
    for part, sign in ((value.numerator, 1), (value.denominator, -1)):
        for prime, count in _factors(part).items():
            total = add(total, multiply(number(sign * count), atom(("log", frozen(number(prime))))))
    return total


def rational(a: Formula) -> Fraction | None:
    """The value if it is a rational number."""
    if a.top.keys() <= {ONE} and a.bottom.keys() <= {ONE}:
        return a.top.get(ONE, Fraction(0)) / a.bottom[ONE]
    return None


def constant(a: Formula) -> bool:
    """Whether no symbol occurs."""
    return not _has_symbol(frozen(a))


def frozen(a: Formula) -> tuple:
    """The same as something hashable."""
    return frozenset(a.top.items()), frozenset(a.bottom.items())


def equal(a: Formula, b: Formula) -> bool | None:
    """Whether a = b for all values of the symbols; None if that is not certain."""
    return zero(_sum(_product(a.top, b.bottom), _product(negative(b).top, a.bottom)))


def proportional(a: Formula, b: Formula, positive: bool = False) -> bool | None:
    """Whether a = c·b with a constant c, which is positive or just not 0; None if that is not certain."""
    left, right = _product(a.top, b.bottom), _product(b.top, a.bottom)
    if not left or not right:
        return not left and not right
    symbols = _symbols(next(iter(left)))
    c, d = ({key - symbols: v for key, v in terms.items() if _symbols(key) == symbols} for terms in (left, right))
    if not d:
        return None if _opaque(left) or _opaque(right) else False
    try:
        ratios = [_evaluate(c, point)[0] / _evaluate(d, point)[0] for point in range(2)]
    except (ArithmeticError, ValueError):
        return None
    if not all(map(cmath.isfinite, ratios)):
        return None
    if abs(ratios[0] - ratios[1]) > 1e-8 * abs(ratios[0]):
        return False
    if positive and not (abs(ratios[0].imag) < 1e-8 * abs(ratios[0]) and ratios[0].real > 0):
        return False
    return zero(_sum(_product(left, d), {key: -v for key, v in _product(right, c).items()}))


def close(a: Formula, b: Formula) -> bool:
    """Whether two constants differ by at most 1 %."""
    try:
        values = [_quotient(x, 0) for x in (a, b)]
    except (ArithmeticError, ValueError):
        return False
    return constant(a) and constant(b) and abs(values[0] - values[1]) <= 0.01 * abs(values[0])


def zero(terms: dict) -> bool | None:
    """Whether a sum is 0; None if it has unsimplified functions and is 0 up to rounding."""
    if not terms:
        return True
    if not _opaque(terms):
        return False
    try:
        values = [_evaluate(terms, point) for point in range(len(POINTS))]
    except (ArithmeticError, ValueError):
        return None
    finite = all(map(cmath.isfinite, (x for pair in values for x in pair)))
    return False if finite and any(abs(value) > 1e-8 * scale for value, scale in values) else None


def _sum(a: dict, b: dict) -> dict:
    total = dict(a)
    for key, value in b.items():
        total[key] = total.get(key, 0) + value
        if not total[key]:
            del total[key]
    return total


def _product(a: dict, b: dict) -> dict:
    if len(a) * len(b) > MAX_PRODUCTS:
        raise TooLarge("too many terms")
    total = {}
    for key, value in a.items():
        for other, factor in b.items():
            merged, coefficient = _monomial(key, other)
            total[merged] = total.get(merged, 0) + value * factor * coefficient
    if len(total) > MAX_TERMS:
        raise TooLarge("too many terms")
    if any(max(abs(v.numerator), v.denominator).bit_length() > MAX_BITS for v in total.values()):
        raise TooLarge("too large a number")
    return {key: value for key, value in total.items() if value}


def _monomial(a: frozenset, b: frozenset) -> tuple[frozenset, Fraction]:
    exponents, coefficient = dict(a), Fraction(1)
    for x, exponent in b:
        exponents[x] = exponents.get(x, 0) + exponent
    for x, exponent in list(exponents.items()):
        if x == "i":
            coefficient *= -1 if exponent // 2 % 2 else 1
            exponents[x] = exponent % 2
        elif isinstance(x, int):
            coefficient *= Fraction(x) ** math.floor(exponent)
            exponents[x] = exponent % 1
        if not exponents[x]:
            del exponents[x]
    return frozenset(exponents.items()), coefficient


def _whole_power(a: Formula, exponent: int) -> Formula:
    if exponent < 0:
        return _whole_power(divide(number(1), a), -exponent)
    largest = max((max(abs(v.numerator), v.denominator).bit_length() for v in a.top.values()), default=0)
    if exponent * largest > MAX_BITS or (exponent > MAX_POWER and max(len(a.top), len(a.bottom)) > 1):
        raise TooLarge("too large a power")
    result = number(1)
    for bit in bin(exponent)[2:]:
        result = multiply(result, result)
        result = multiply(result, a) if bit == "1" else result
    return result


def _root(terms: dict, exponent: Fraction) -> Formula:
    """A sum to a power that is not whole."""
    content = Fraction(
        math.gcd(*(v.numerator for v in terms.values())), math.lcm(*(v.denominator for v in terms.values()))
    )
    rest = {key: value / content for key, value in terms.items()}
    if exponent == Fraction(1, 2) and (nested := _nested_root(terms)):
        return nested
    ((key, sign), *others) = rest.items()
    even = not exponent.denominator % 2 and any(not e * exponent.numerator % 2 for x, e in key if not _positive(x))
    if others or even or any(x == "i" for x, _ in key):  # even: √(x²) is |x|
        return multiply(_root_of_number(content, exponent), atom(("^", frozenset(rest.items())), exponent))
    monomial, coefficient = _monomial(ONE, frozenset((x, e * exponent) for x, e in key))
    return multiply(_root_of_number(sign * content, exponent), Formula({monomial: coefficient}, {ONE: Fraction(1)}))


def _positive(x) -> bool:
    return isinstance(x, int) or x in ("π", "e")


def _nested_root(terms: dict) -> Formula | None:
    """√(a + √r) = √((a + d)/2) ± √((a - d)/2) with d² = a² - r, if a and d are rational: √(3 + 2√2) = 1 + √2."""
    if len(terms) != 2 or ONE not in terms or terms[ONE] <= 0:
        return None
    a, (key, b) = terms[ONE], next(item for item in terms.items() if item[0] != ONE)
    if not all(isinstance(x, int) and e == Fraction(1, 2) for x, e in key):
        return None
    square = a * a - b * b * math.prod(x for x, _ in key)
    d = _root_of_number(square, Fraction(1, 2)) if square >= 0 else None
    if d is None or (d := rational(d)) is None:
        return None
    roots = [_root_of_number((a + sign * d) / 2, Fraction(1, 2)) for sign in (1, -1)]
    return add(roots[0], roots[1] if b > 0 else negative(roots[1]))


def _root_of_number(value: Fraction, exponent: Fraction) -> Formula:
    if value < 0 and exponent.denominator == 2:
        return multiply(_root_of_number(-value, exponent), power(atom("i"), number(exponent.numerator)))
    if value < 0 and not exponent.denominator % 2:
        return atom(("^", frozenset({ONE: value}.items())), exponent)
    result = number((-1) ** exponent.numerator if value < 0 else 1)
    for part, sign in ((abs(value.numerator), 1), (value.denominator, -1)):
        for prime, count in _factors(part).items():
            whole, rest = divmod(count * sign * exponent, 1)
            result = multiply(result, _whole_power(number(prime), int(whole)))
            result = multiply(result, atom(prime, rest)) if rest else result
    return result


def _factors(n: int) -> dict:
    """Prime -> exponent. Unreadable if n has two large ones."""
    factors, divisor = {}, 2
    while divisor <= TRIAL and divisor * divisor <= n:
        while not n % divisor:
            factors[divisor] = factors.get(divisor, 0) + 1
            n //= divisor
        divisor += 1
    if n > TRIAL**2:
        root = math.isqrt(n)
        if root * root != n:
            raise Unreadable("a number with large prime factors")
        return factors | {prime: 2 * count for prime, count in _factors(root).items()}
    return factors | ({n: factors.get(n, 0) + 1} if n > 1 else {})


def _power_of_a_sum(a: Formula, b: Formula) -> Formula:
    """2^(3n + 1) as 2 · (2^n)^3."""
    if b.bottom != {ONE: 1} or not a.top:
        return atom(("^^", frozen(a), frozen(b)))
    result = number(1)
    for key, value in b.top.items():
        exponent = Formula({key: Fraction(1)}, b.bottom)
        factor = power(a, number(value)) if key == ONE else atom(("^^", frozen(a), frozen(exponent)), value)
        result = multiply(result, factor)
    return result


def _has_symbol(x) -> bool:
    if isinstance(x, str):
        return x not in CONSTANTS and x not in FUNCTIONS
    return isinstance(x, (tuple, frozenset)) and any(map(_has_symbol, x))


def _symbols(key: frozenset) -> frozenset:
    return frozenset(pair for pair in key if isinstance(pair[0], str) and pair[0] not in CONSTANTS)


def _opaque(terms: dict) -> bool:
    return any(isinstance(x, tuple) for key in terms for x, _ in key)


def _evaluate(terms, point: int) -> tuple[complex, float]:
    """The value of a sum in floating point at one of POINTS, and the sum of the terms' sizes."""
    value, scale = 0j, 0.0
    for key, coefficient in dict(terms).items():
        term = complex(float(coefficient))
        for x, exponent in key:
            term *= _value(x, exponent, point)
        value, scale = value + term, scale + abs(term)
    return value, scale


def _value(x, exponent: Fraction, point: int) -> complex:
    if isinstance(x, int):
        base = complex(x)
    elif isinstance(x, str):
        seed, stretch = POINTS[point]
        share = seed * sum(ord(letter) * 7**n for n, letter in enumerate(x[:9])) % 1
        base = complex(CONSTANTS.get(x, 0.3 + stretch * share))
    elif x[0] == "^":
        base = _evaluate(x[1], point)[0]
        if abs(base.imag) <= 1e-12 * abs(base) and base.real < 0 and exponent.denominator % 2:  # the real root
            return complex((-1) ** exponent.numerator * abs(base) ** float(exponent))
    elif x[0] == "^^":
        base = _quotient(x[1], point) ** _quotient(x[2], point)
    else:
        argument = _quotient(x[1], point)
        if abs(argument) > 1e4:
            raise ArithmeticError("too large an argument")
        base = complex(FUNCTIONS[x[0]](argument))
    return base ** float(exponent)


def _quotient(pair, point: int) -> complex:
    return _evaluate(pair[0], point)[0] / _evaluate(pair[1], point)[0]

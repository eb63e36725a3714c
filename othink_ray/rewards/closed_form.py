"""Parse closed forms to exact values: sums of rational multiples of square roots and powers of pi, e.g. 2√3 + 5π/3."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, isqrt
from typing import TypeAlias

# {(radicand, power of pi): factor} with square-free radicands and nonzero factors. Terms with different keys are
# linearly independent over the rationals, so two values are equal if and only if their forms are.
Form: TypeAlias = dict[tuple[int, int], Fraction]

# Larger expressions are left to the symbolic layer: an answer must cost microseconds here.
MAX_TERMS, MAX_BITS, MAX_POWER, MAX_RADICAND, MAX_DEPTH, MAX_TOKENS = 8, 1024, 64, 10**7, 16, 96

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>
            (?: [1-9][0-9]{0,2} (?: ,[0-9]{3} )+ (?![0-9]) (?: \.[0-9]+ )?
              | [0-9]+ (?: \.[0-9]+ )?
              | \.[0-9]+
            )
            (?: [eE][+-]?[0-9]{1,2} (?![0-9]) )?
        )
      | (?P<symbol> \\(?:pi|sqrt|frac)(?![A-Za-z]) | [-+*/^(){}] )
    )\s*""",
    re.VERBOSE,
)
_MIXED = re.compile(
    r"""(?<![0-9.,]) (?P<whole>[0-9]+)
    (?: \s+ (?P<numerator>[0-9]+) \s*/\s* (?P<denominator>[0-9]+) (?![0-9.]) | \s*\\frac\{([0-9]+)\}\{([0-9]+)\} )""",
    re.VERBOSE,
)
_ONE = (1, 0)


class _NotClosedForm(Exception):
    """Raised when the text is not a closed form or exceeds a size limit."""


def rational(value: Fraction | int) -> Form:
    """Return the form of a rational number."""
    return {_ONE: Fraction(value)} if value else {}


def pi_times(value: Fraction) -> Form:
    """Return the form of `value` * pi."""
    return {(1, 1): value}


def multiply(left: Form, right: Form) -> Form | None:
    """Return the product, or None if it exceeds a size limit."""
    try:
        return _product(left, right)
    except _NotClosedForm:
        return None


def closed_form(text: str) -> Form | None:
    """Return the exact value of an expression in plain LaTeX, or None.

    Supported: integers (also 1,234), decimals, 3e2, fractions, mixed numbers (1 1/2), + - * / ^ with integer exponents,
    square roots of rationals, pi, brackets and implicit products (2\\sqrt{3}). Only a single term can be a divisor.
    Returns None for expressions beyond the limits above, with variables, or undefined (1/0).
    """
    text = _MIXED.sub(_as_sum, text)
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) >= MAX_TOKENS:
            return None
        tokens.append(match["number"] or match["symbol"])
        position = match.end()
    parser = _Parser(tokens)
    try:
        value = parser.sum()
    except _NotClosedForm:
        return None
    return value if parser.next is None else None


def _as_sum(mixed: re.Match[str]) -> str:
    """Rewrite a mixed number (1 1/2, 1\\frac{1}{2}) as a sum if its fraction is proper; leave it unchanged if not."""
    whole, *parts = (group for group in mixed.groups() if group is not None)
    numerator, denominator = map(int, parts)
    return f"({whole}+{numerator}/{denominator})" if 0 < numerator < denominator else mixed[0]


@dataclass(slots=True)
class _Parser:
    """Recursive-descent parser over the tokens."""

    tokens: list[str]
    position: int = 0
    depth: int = 0

    @property
    def next(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> str:
        if self.position == len(self.tokens):
            raise _NotClosedForm
        self.position += 1
        return self.tokens[self.position - 1]

    def sum(self) -> Form:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NotClosedForm
        total = self.product()
        while self.next in ("+", "-"):
            sign = rational(-1 if self.take() == "-" else 1)
            total = _sum(total, _product(sign, self.product()))
        self.depth -= 1
        return total

    def sign(self) -> Form:
        """Parse an optional sign; return 1 or -1 as a form."""
        return rational(-1 if self.next in ("+", "-") and self.take() == "-" else 1)

    def product(self) -> Form:
        value = _product(self.sign(), self.power())
        while self.next is not None:
            if self.next in ("*", "/"):
                divides = self.take() == "/"
                factor = _product(self.sign(), self.power())
                value = _product(value, _inverse(factor) if divides else factor)
            elif self.next in ("(", "{") or self.next.startswith("\\"):
                value = _product(value, self.power())
            else:
                break
        return value

    def power(self) -> Form:
        base = self.atom()
        if self.next != "^":
            return base
        self.take()
        braced = self.next == "{" and bool(self.take())
        negative = self.sign() == rational(-1)
        digits = self.take()
        if (braced and self.take() != "}") or not digits.isdigit() or len(digits) > 3 or int(digits) > MAX_POWER:
            raise _NotClosedForm
        value = rational(1)
        for _ in range(int(digits)):
            value = _product(value, base)
        return _inverse(value) if negative else value

    def atom(self) -> Form:
        token = self.take()
        if token in ("(", "{"):
            value = self.sum()
            if self.take() != {"(": ")", "{": "}"}[token]:
                raise _NotClosedForm
            return value
        if token == "\\pi":
            return pi_times(Fraction(1))
        if token == "\\sqrt":
            return _root(self.atom())
        if token == "\\frac":
            numerator = self.atom()
            return _product(numerator, _inverse(self.atom()))
        if not token[0].isdigit() and token[0] != ".":
            raise _NotClosedForm
        return rational(Fraction(token.replace(",", "")))


def _sum(left: Form, right: Form) -> Form:
    total = dict(left)
    for key, factor in right.items():
        _add_term(total, key, factor)
    return total


def _product(left: Form, right: Form) -> Form:
    total: Form = {}
    for (root, pi), factor in left.items():
        for (other_root, other_pi), other_factor in right.items():
            shared = gcd(root, other_root)  # both radicands are square-free: exactly this factor leaves the root
            key = (root // shared * (other_root // shared), pi + other_pi)
            _add_term(total, key, factor * other_factor * shared)
    return total


def _add_term(total: Form, key: tuple[int, int], factor: Fraction) -> None:
    value = total.get(key, Fraction(0)) + factor
    if max(value.numerator.bit_length(), value.denominator.bit_length(), key[0].bit_length()) > MAX_BITS:
        raise _NotClosedForm
    if value:
        total[key] = value
    else:
        total.pop(key, None)
    if len(total) > MAX_TERMS:
        raise _NotClosedForm


def _inverse(form: Form) -> Form:
    if len(form) != 1:
        raise _NotClosedForm
    [((root, pi), factor)] = form.items()
    return {(root, -pi): 1 / (factor * root)}


def _root(form: Form) -> Form:
    if not form:
        return {}
    if form.keys() != {_ONE} or form[_ONE] < 0:
        raise _NotClosedForm
    value = form[_ONE]
    outside, inside = _square_part(value.numerator * value.denominator)
    return {(inside, 0): Fraction(outside, value.denominator)}


def _square_part(number: int) -> tuple[int, int]:
    """Return (a, b) with number = a² b and b square-free."""
    exact = isqrt(number)
    if exact * exact == number:
        return exact, 1
    if number > MAX_RADICAND:
        raise _NotClosedForm
    outside, divisor = 1, 2
    while divisor * divisor <= number:
        while number % (divisor * divisor) == 0:
            number //= divisor * divisor
            outside *= divisor
        divisor += 1
    return outside, number

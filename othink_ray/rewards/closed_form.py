"""Exact values of closed forms: sums of rational multiples of square roots and powers of pi, such as 2√3 + 5π/3."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, isqrt
from typing import TypeAlias

# {(radicand, power of pi): factor}, radicands square-free, factors not 0. Numbers of different keys are independent
# over the rationals, so two values are equal exactly if their forms are.
Form: TypeAlias = dict[tuple[int, int], Fraction]

# Whatever is larger is left to the symbolic layer: an answer must cost microseconds here.
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
      | (?P<mark> \\(?:pi|sqrt|frac)(?![A-Za-z]) | [-+*/^(){}] )
    )\s*""",
    re.VERBOSE,
)
_MIXED = re.compile(
    r"""(?<![0-9.,]) (?P<whole>[0-9]+)
    (?: \s+ (?P<upper>[0-9]+) \s*/\s* (?P<lower>[0-9]+) (?![0-9.]) | \s*\\frac\{([0-9]+)\}\{([0-9]+)\} )""",
    re.VERBOSE,
)
_ONE = (1, 0)


class _NotClosed(Exception):
    """Not a closed form, or too large a one."""


def rational(value: Fraction | int) -> Form:
    return {_ONE: Fraction(value)} if value else {}


def pi_times(value: Fraction) -> Form:
    return {(1, 1): value}


def multiply(left: Form, right: Form) -> Form | None:
    """The product, or None where it is too large."""
    try:
        return _product(left, right)
    except _NotClosed:
        return None


def closed_form(text: str) -> Form | None:
    """The exact value of an expression in plain LaTeX, or None.

    Taken: integers (also 1,234), decimals, 3e2, fractions, mixed numbers (1 1/2), + - * / ^ with whole powers, roots of
    rationals, pi, brackets, products without a sign (2\\sqrt{3}). A division is by one term only. What is larger than
    the limits above, has variables or is undefined (1/0) is none.
    """
    text = _MIXED.sub(_as_sum, text)
    tokens: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or len(tokens) >= MAX_TOKENS:
            return None
        tokens.append(match["number"] or match["mark"])
        at = match.end()
    reader = _Reader(tokens)
    try:
        value = reader.sum()
    except _NotClosed:
        return None
    return value if reader.next is None else None


def _as_sum(mixed: re.Match[str]) -> str:
    """1 1/2 and 1\\frac{1}{2} are one and a half, if the fraction is proper."""
    whole, *parts = (group for group in mixed.groups() if group is not None)
    upper, lower = map(int, parts)
    return f"({whole}+{upper}/{lower})" if 0 < upper < lower else mixed[0]


@dataclass(slots=True)
class _Reader:
    """Recursive descent over the tokens."""

    tokens: list[str]
    at: int = 0
    depth: int = 0

    @property
    def next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self) -> str:
        if self.at == len(self.tokens):
            raise _NotClosed
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self) -> Form:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NotClosed
        total = self.product()
        while self.next in ("+", "-"):
            sign = rational(-1 if self.take() == "-" else 1)
            total = _sum(total, _product(sign, self.product()))
        self.depth -= 1
        return total

    def sign(self) -> Form:
        """One sign, or none."""
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
            raise _NotClosed
        value = rational(1)
        for _ in range(int(digits)):
            value = _product(value, base)
        return _inverse(value) if negative else value

    def atom(self) -> Form:
        token = self.take()
        if token in ("(", "{"):
            value = self.sum()
            if self.take() != {"(": ")", "{": "}"}[token]:
                raise _NotClosed
            return value
        if token == "\\pi":
            return pi_times(Fraction(1))
        if token == "\\sqrt":
            return _root(self.atom())
        if token == "\\frac":
            numerator = self.atom()
            return _product(numerator, _inverse(self.atom()))
        if not token[0].isdigit() and token[0] != ".":
            raise _NotClosed
        return rational(Fraction(token.replace(",", "")))


def _sum(left: Form, right: Form) -> Form:
    total = dict(left)
    for key, factor in right.items():
        _put(total, key, factor)
    return total


def _product(left: Form, right: Form) -> Form:
    total: Form = {}
    for (root, pi), factor in left.items():
        for (other_root, other_pi), other_factor in right.items():
            shared = gcd(root, other_root)  # both square-free, so this is all that leaves the root
            key = (root // shared * (other_root // shared), pi + other_pi)
            _put(total, key, factor * other_factor * shared)
    return total


def _put(total: Form, key: tuple[int, int], factor: Fraction) -> None:
    value = total.get(key, Fraction(0)) + factor
    if max(value.numerator.bit_length(), value.denominator.bit_length(), key[0].bit_length()) > MAX_BITS:
        raise _NotClosed
    if value:
        total[key] = value
    else:
        total.pop(key, None)
    if len(total) > MAX_TERMS:
        raise _NotClosed


def _inverse(form: Form) -> Form:
    if len(form) != 1:
        raise _NotClosed
    [((root, pi), factor)] = form.items()
    return {(root, -pi): 1 / (factor * root)}


def _root(form: Form) -> Form:
    if not form:
        return {}
    if form.keys() != {_ONE} or form[_ONE] < 0:
        raise _NotClosed
    value = form[_ONE]
    outside, inside = _square_part(value.numerator * value.denominator)
    return {(inside, 0): Fraction(outside, value.denominator)}


def _square_part(number: int) -> tuple[int, int]:
    """(a, b) with number = a² b, b square-free."""
    exact = isqrt(number)
    if exact * exact == number:
        return exact, 1
    if number > MAX_RADICAND:
        raise _NotClosed
    outside, divisor = 1, 2
    while divisor * divisor <= number:
        while number % (divisor * divisor) == 0:
            number //= divisor * divisor
            outside *= divisor
        divisor += 1
    return outside, number

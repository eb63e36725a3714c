"""Exact values: numbers, fractions, closed forms, and texts that are too large or malformed."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from othink_ray.rewards.numbers import Form, closed_form, parse_quantity


def rational(text: str) -> Fraction | None:
    """Return the value of a quantity and assert that it is rational."""
    quantity = parse_quantity(text)
    if quantity is None:
        return None
    assert set(quantity.value) <= {(1, 0)}
    return quantity.value.get((1, 0), Fraction(0))


def as_float(form: Form) -> float:
    return sum(float(factor) * math.sqrt(root) * math.pi**power for (root, power), factor in form.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/3", Fraction(1, 3)),
        ("0.1", Fraction(1, 10)),
        ("1e99", Fraction(10**99)),
        ("12345678901234567890.5", Fraction("12345678901234567890.5")),
        ("0" * 63 + "7", Fraction(7)),
        ("2 1/2", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("3 4/2", None),
        ("1/0", None),
        ("0^{-1}", None),
        ("2^{999}", None),
        ("1e100", None),
    ],
)
def test_numbers_are_exact(text: str, expected: Fraction | None) -> None:
    assert rational(text) == expected


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**6))
def test_every_fraction_round_trips(value: Fraction) -> None:
    assert rational(f"{value}") == value


@given(st.integers(min_value=-(10**12), max_value=10**12))
def test_every_integer_round_trips_with_and_without_commas(value: int) -> None:
    assert rational(str(value)) == rational(f"{value:,}") == value


@given(
    st.integers(-50, 50),
    st.integers(1, 50),
    st.integers(0, 3000),
    st.integers(-50, 50),
)
def test_a_closed_form_agrees_with_floating_point(a: int, b: int, c: int, d: int) -> None:
    form = closed_form(f"\\frac{{{a}\\sqrt{{{c}}}}}{{{b}}}+{d}\\pi")
    assert form is not None
    assert as_float(form) == pytest.approx(a * math.sqrt(c) / b + d * math.pi, rel=1e-12, abs=1e-9)


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_product_of_roots_is_the_root_of_the_product(a: int, b: int) -> None:
    assert closed_form(f"\\sqrt{{{a}}}\\sqrt{{{b}}}") == closed_form(f"\\sqrt{{{a * b}}}") is not None


@pytest.mark.parametrize("text", ["", "+", "(", "3)", "\\sqrt", "\\frac{1}", "2^", "2^{", "1..2", "\\pi3", "3x"])
def test_truncated_or_malformed_texts_are_not_numbers(text: str) -> None:
    assert closed_form(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "(" * 96,
        "{" * 40 + "1" + "}" * 40,
        "(1+\\sqrt{2}+\\sqrt{3}+\\pi)^{64}",
        "((9^{64})^{64})^{64}",
        "\\sqrt{99999999999999999999}",
        "*".join(["\\sqrt{9999991}"] * 30),
        "+".join(f"\\sqrt{{{n}}}" for n in range(30)),
    ],
)
def test_too_large_expressions_are_rejected_quickly(text: str) -> None:
    started = time.perf_counter()
    closed_form(text)
    assert time.perf_counter() - started < 0.5

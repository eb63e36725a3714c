from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from othink_ray.rewards.parse import answer_text, parse_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>3</answer>", "3"),
        ("<think>x</think><answer> 3 </answer>", " 3 "),
        ("<answer></answer>", ""),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>1</answer> and <answer>2", "1"),
        ("<answer>1 <answer>2</answer></answer>", "2"),
        ("<answer>1</answer></answer>", "1"),
        ("</answer><answer>", None),
        ("<answer>3", None),
        ("3</answer>", None),
        ("<Answer>3</Answer>", None),
        ("< answer>3</answer>", None),
        ("", None),
    ],
)
def test_the_last_complete_answer_is_the_one_stated(text: str, expected: str | None) -> None:
    assert answer_text(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/3", Fraction(1, 3)),
        ("0.1", Fraction(1, 10)),
        ("1e99", Fraction(10**99)),
        ("12345678901234567890.5", Fraction("12345678901234567890.5")),
        ("0" * 63 + "7", Fraction(7)),
        ("0" * 64 + "7", None),
    ],
)
def test_numbers_are_exact(text: str, expected: Fraction | None) -> None:
    assert parse_number(text) == expected


@given(st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**6))
def test_every_fraction_reads_back(value: Fraction) -> None:
    assert parse_number(f" {value} ") == value


@given(st.integers(min_value=-(10**12), max_value=10**12))
def test_every_integer_reads_back_plain_and_with_thousands(value: int) -> None:
    assert parse_number(str(value)) == parse_number(f"{value:,}") == value


@pytest.mark.parametrize("text", ["9" * 10**6, "1," * 10**6, "a" * 10**6, " " * 10**6 + "3 4", "1e999999999"])
def test_long_or_huge_numbers_are_refused_at_once(text: str) -> None:
    started = time.perf_counter()
    assert parse_number(text) is None
    assert time.perf_counter() - started < 1

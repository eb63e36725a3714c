"""Numerals in English words, compared with an independent speller, and texts that are not numerals."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from othink_ray.rewards.text import spelled

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int, hyphen: str, separator: str) -> str:
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return TENS[tens - 2] + (hyphen + UNITS[unit] if unit else "")
    for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= size:
            count, rest = divmod(number, size)
            return f"{in_words(count, hyphen, separator)} {name}" + (
                f"{separator}{in_words(rest, hyphen, separator)}" if rest else ""
            )
    raise AssertionError


@given(st.integers(0, 10**9 - 1), st.sampled_from("- "), st.sampled_from([" ", " and "]))
def test_every_number_below_a_billion_round_trips(number: int, hyphen: str, separator: str) -> None:
    words = in_words(number, hyphen, separator)
    assert spelled(words) == (number, "")
    assert spelled(f"{words.upper()} red cubes") == (number, "red cubes")
    assert spelled(f"minus {words}") == (-number, "")


@pytest.mark.parametrize(
    ("text", "value", "rest"),
    [
        ("3 hundredths of them", Fraction(3, 100), "of them"),
        ("seven twenty-fifths", Fraction(7, 25), ""),
        ("twenty-two sevenths", Fraction(22, 7), ""),
        ("an eighth", Fraction(1, 8), ""),
        ("1 half", Fraction(1, 2), ""),
        ("two and three quarters cups", Fraction(11, 4), "cups"),
        ("zero point zero five", Fraction(1, 20), ""),
        ("2 point 5", Fraction(5, 2), ""),
        ("1,500 million", Fraction(1500 * 10**6), ""),
        ("three seconds", Fraction(3), "seconds"),
        ("two or three", Fraction(2), "or three"),
        ("five six", Fraction(5), "six"),
        ("three third", Fraction(3), "third"),
        ("two thousand 3000", Fraction(2000), "3000"),
        ("one hundred 300", Fraction(100), "300"),
        ("three and five halves", Fraction(3), "and five halves"),
    ],
)
def test_the_longest_numeral_is_read_and_the_rest_kept(text: str, value: Fraction, rest: str) -> None:
    assert spelled(text) == (value, rest)


@pytest.mark.parametrize(
    "text", ["", "3", "1,234", "cubes", "third", "the third", "a", "and", "three-sided", "five-six", "point five"]
)
def test_texts_that_are_not_numerals_give_none(text: str) -> None:
    assert spelled(text) is None

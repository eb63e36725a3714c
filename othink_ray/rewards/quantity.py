"""Read quantities exactly: a closed form or a numeral in words, with its unit, percent sign or counted things."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias

from othink_ray.rewards.closed_form import Form, closed_form, multiply, pi_times, rational
from othink_ray.rewards.numbers import is_expression, may_be_number, spelled
from othink_ray.rewards.text import is_harmless, names_several, names_things, without_tail

Dimension: TypeAlias = tuple[tuple[str, int], ...]  # (kind, power) of each factor

# {kind: {space-separated names: size in the first unit of the kind}}
_KINDS: dict[str, dict[str, Fraction]] = {
    "length": {
        "m meter meters metre metres": Fraction(1),
        "mm millimeter millimeters millimetre millimetres": Fraction(1, 1000),
        "cm centimeter centimeters centimetre centimetres": Fraction(1, 100),
        "dm decimeter decimeters decimetre decimetres": Fraction(1, 10),
        "km kilometer kilometers kilometre kilometres": Fraction(1000),
        "in inch inches": Fraction(254, 10000),
        "ft foot feet": Fraction(3048, 10000),
        "yd yard yards": Fraction(9144, 10000),
        "mi mile miles": Fraction(1609344, 1000),
    },
    "mass": {
        "g gram grams": Fraction(1),
        "mg milligram milligrams": Fraction(1, 1000),
        "kg kilogram kilograms": Fraction(1000),
    },
    "time": {
        "s sec secs second seconds": Fraction(1),
        "min mins minute minutes": Fraction(60),
        "h hr hrs hour hours": Fraction(3600),
    },
}
_UNITS = {
    name: (kind, rational(size))
    for kind, units in _KINDS.items()
    for names, size in units.items()
    for name in names.split()
} | {name: ("angle", pi_times(Fraction(1, 180))) for name in "° deg degree degrees".split()}
_UNITS |= {name: ("angle", rational(1)) for name in "rad radian radians".split()}
_SINGLE_LETTERS = frozenset("gsh")  # also common variable names: units only after a space

_POWER = r"\s*\^\s*(?:\{\s*[23]\s*\}|[23])|\s+(?:squared|cubed)\b"
_UNIT = re.compile(
    rf"""
    (?: (?P<degree>°) | (?P<percent>%|per\s?cent\b|pct\b)
      | (?: (?P<shape>square|sq\.?|cubic|cu\.?) \s+ )? (?P<name>[A-Za-z]+(?:-[A-Za-z]+)*) (?P<power>{_POWER})?
        (?: \s*(?:/|\bper\b)\s* (?P<per>[A-Za-z]+) (?P<per_power>{_POWER})? )?
    )
    (?: \s+ (?P<words>[A-Za-z].*) )?""",
    re.VERBOSE | re.IGNORECASE,
)
_EXPONENTS = {"square": 2, "squared": 2, "sq": 2, "sq.": 2, "cubic": 3, "cubed": 3, "cu": 3, "cu.": 3}

_AFTER_NUMBER = re.compile(r"(?<![A-Za-z\\])[A-Za-z°%]")  # possible start of a unit or of the counted things
_MINUTES = re.compile(r"(-?)([0-9]{1,6})°\s*([0-9]{1,2})\s*['′](?:\s*([0-9]{1,2})\s*(?:''|[\"″]))?")
_CURRENCY = re.compile(r"^[$£€¥]\s*(?=[0-9.])|(?<=[0-9])\s*[$£€¥]$")
_EXACTLY = re.compile(
    r"(?:exactly|precisely|only|just|equal\s+to|(?:a\s+)?(?:grand\s+)?total\s+of|in\s+(?:total|all),?)\s+",
    re.IGNORECASE,
)
_REPEATED = re.compile(r"(?P<before>[^()]+)\((?P<again>[^()]+)\)(?P<after>[^()]*)")
_NONE_OF = re.compile(r"no\s+(?P<things>.+)", re.IGNORECASE)
_EQUALS = re.compile(r"=|\s(?:is|equals)\s")
# Left side of an equation: x, x_1, ∠ABC, ∠1, \sin A.
_PREFIX = r"(?:\\(?:sin|cos|tan|cot|sec|csc|angle|triangle)(?![A-Za-z])|m?\s*[∠△]|angle\s)\s*"
_NAME = re.compile(
    rf"(?:{_PREFIX})*[A-Za-z]{{1,4}}(?:[0-9]|_\{{?[0-9A-Za-z]{{1,3}}\}}?)?['′]?|(?:{_PREFIX})+[1-9]", re.IGNORECASE
)
_SEVERAL = re.compile(r"[,;<>]|\\(?:leq|geq|neq?|in)(?![A-Za-z])|[0-9]\s+[A-Za-z]")


@dataclass(frozen=True, slots=True)
class Unit:
    """Unit after a number: `dimension` is empty if unknown; `scale` is its size in the first unit of its kind."""

    dimension: Dimension = ()
    scale: Form | None = None
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Quantity:
    """Exact value with its unit: `dimension` and `scale` as in `Unit`."""

    value: Form
    dimension: Dimension = ()
    scale: Form | None = None
    percent: bool = False


@lru_cache(maxsize=4096)
def parse_quantity(text: str) -> Quantity | None:
    """Return the exact value of the single number in a text in plain LaTeX, or None.

    Accepted: closed forms and numerals in words; before the number a name (x =, ∠ABC =), a computation (10 - 3 =) or a
    currency; after it one unit, the counted things (3 red cubes in total), or the number repeated in brackets.
    Rejected: more than one number (3 or 4), and words that change the number or leave it open (3 less, about 3).
    """
    side = _last_side(text)
    if side is None:
        return None
    side = _EXACTLY.sub("", side, count=1) if _EXACTLY.match(side) else side
    return _parse_angle(side) or _parse_with_unit(side) or _parse_repeated(side) or _parse_none_of(side)


def same(stated: Quantity, truth: Quantity) -> bool:
    """Return whether two quantities are exactly equal.

    A unit may be missing on one side. Two known units are converted; different kinds differ. A percent sign may be
    missing (50% is 50) or evaluated (50% is 0.5).
    """
    if stated.scale is not None and truth.scale is not None:
        left, right = multiply(stated.value, stated.scale), multiply(truth.value, truth.scale)
        return stated.dimension == truth.dimension and left is not None and left == right
    if stated.percent != truth.percent:
        percent, other = (stated, truth) if stated.percent else (truth, stated)
        if multiply(percent.value, rational(Fraction(1, 100))) == other.value:
            return True
    return stated.value == truth.value


def is_unit(name: str) -> bool:
    """Return whether a word names a known unit."""
    return name.lower() in _UNITS


def parse_unit(text: str, *, spaced: bool) -> Unit | None:
    """Return the unit in the text after a number, or None; `spaced` if a space separates the two.

    The text may contain only the unit and the name of what is measured or counted.
    """
    found = _UNIT.fullmatch(text)
    if found is None or not names_things(found["words"] or ""):
        return None
    if found["degree"]:
        return DEGREE
    if found["percent"]:
        return Unit(percent=True)
    name, power = found["name"], _exponent(found["power"] or found["shape"])
    if len(name) == 1 and name != "m" and not (spaced and name in _SINGLE_LETTERS):
        return None
    if not is_unit(name):  # 12 square units
        return Unit() if names_things(name) and not found["per"] else None
    unit = _unit(name, power)
    if found["per"]:
        if not is_unit(found["per"]):
            return None
        divisor = _unit(found["per"], -_exponent(found["per_power"]))
        assert unit.scale is not None and divisor.scale is not None
        return Unit((*unit.dimension, *divisor.dimension), multiply(unit.scale, divisor.scale))
    return unit


def _last_side(text: str) -> str | None:
    """Return the last side of a chain of equations whose first side is a name or a number, or None.

    A text without an equation is returned as it is.
    """
    *sides, last = (side.strip() for side in _EQUALS.split(text))
    if not sides:
        return last
    if any(not side or _SEVERAL.search(side) for side in sides):
        return None
    first, *others = sides
    if not (_NAME.fullmatch(first) or _has_value(first)) or not is_harmless(first):
        return None
    return last if all(_NAME.fullmatch(side) or _is_term(side) for side in others) else None


def _is_term(side: str) -> bool:
    return is_expression(f"{side}=") and re.search(r"[0-9A-Za-z]", side) is not None


def _has_value(side: str) -> bool:
    return closed_form(side.replace("°", "")) is not None or (is_expression(side) and may_be_number(side))


def _parse_angle(text: str) -> Quantity | None:
    """Parse an angle in degrees and minutes, optionally seconds."""
    angle = _MINUTES.fullmatch(text)
    if angle is None:
        return None
    sign, degrees, minutes, seconds = angle.groups()
    size = Fraction(int(degrees)) + Fraction(int(minutes), 60) + Fraction(int(seconds or 0), 3600)
    return Quantity(rational(-size if sign else size), DEGREE.dimension, DEGREE.scale)


def _parse_repeated(text: str) -> Quantity | None:
    """Parse a number repeated in brackets: five (5) cubes."""
    repeated = _REPEATED.fullmatch(text)
    if repeated is None:
        return None
    quantity = _parse_with_unit(f"{repeated['before'].strip()} {repeated['after'].strip()}".strip())
    again = _parse_with_unit(repeated["again"].strip())
    return quantity if quantity is not None and again is not None and same(again, quantity) else None


def _parse_none_of(text: str) -> Quantity | None:
    """Parse `no cubes` as 0. Requires a plural: `no idea` is not a number."""
    things = _NONE_OF.fullmatch(text)
    return Quantity(rational(0)) if things and names_several(without_tail(things["things"])) else None


def _parse_with_unit(text: str) -> Quantity | None:
    """Parse a number and the unit or the counted things after it."""
    text = _CURRENCY.sub("", text, count=1)
    if (value := closed_form(text)) is not None:
        return Quantity(value)
    if numeral := spelled(text):
        number, after = numeral
        return _quantity_of(rational(number), after, spaced=True)
    for start in (match.start() for match in _AFTER_NUMBER.finditer(text)):
        before = text[:start]
        if (value := closed_form(before)) is None:
            continue
        if quantity := _quantity_of(value, text[start:], spaced=before[-1:].isspace()):
            return quantity
    return None


def _quantity_of(value: Form, after: str, *, spaced: bool) -> Quantity | None:
    """Return the value with the unit from the text after it; None unless that is a unit or names the counted things."""
    after = without_tail(after)
    if not after:
        return Quantity(value)
    unit = parse_unit(after, spaced=spaced)
    return None if unit is None else Quantity(value, unit.dimension, unit.scale, unit.percent)


def _exponent(power: str | None) -> int:
    if power is None:
        return 1
    power = power.strip(" ^{}")
    return int(power) if power.isdigit() else _EXPONENTS[power.lower()]


def _unit(name: str, power: int) -> Unit:
    kind, size = _UNITS[name.lower()]
    [(key, factor)] = size.items()
    return Unit(((kind, power),), {(1, key[1] * power): factor**power})


DEGREE = _unit("°", 1)

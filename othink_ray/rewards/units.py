"""Units after a number: their kind and size, a percent sign, and what else they may stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from othink_ray.rewards.closed_form import Form, multiply, pi_times, rational
from othink_ray.rewards.wording import names_things

Dimension: TypeAlias = tuple[tuple[str, int], ...]  # (kind, power) of each factor

# kind: {names: size in the kind's first unit}
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
_SINGLE = frozenset("gsh")  # also names of variables: units only after a space

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


@dataclass(frozen=True, slots=True)
class Unit:
    """`dimension` is empty without a known unit, and `scale` is that unit in the kind's first one."""

    dimension: Dimension = ()
    scale: Form | None = None
    percent: bool = False


def is_unit(name: str) -> bool:
    return name.lower() in _UNITS


def parse_unit(text: str, *, spaced: bool) -> Unit | None:
    """The unit that follows a number (after a space, if `spaced`), and says no more than that and what is measured."""
    found = _UNIT.fullmatch(text)
    if found is None or not names_things(found["words"] or ""):
        return None
    if found["degree"]:
        return DEGREE
    if found["percent"]:
        return Unit(percent=True)
    name, power = found["name"], _exponent(found["power"] or found["shape"])
    if len(name) == 1 and name != "m" and not (spaced and name in _SINGLE):
        return None
    if not is_unit(name):  # 12 square units
        return Unit() if names_things(name) and not found["per"] else None
    unit = _unit(name, power)
    if found["per"]:
        if not is_unit(found["per"]):
            return None
        below = _unit(found["per"], -_exponent(found["per_power"]))
        assert unit.scale is not None and below.scale is not None
        return Unit((*unit.dimension, *below.dimension), multiply(unit.scale, below.scale))
    return unit


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

"""An answer that is one number: its exact value, its unit, its percent sign."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from othink_ray.rewards.closed_form import Form, closed_form, multiply, pi_times, rational

WORDS = {
    word: Fraction(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
# Words that would make another number of the one before them, so none of them is a unit.
NOT_UNITS = frozenset(WORDS) | frozenset(
    "hundred hundreds thousand thousands million millions billion billions dozen dozens pair pairs half halves third "
    "thirds quarter quarters fourth fourths fifth fifths sixth sixths eighth eighths tenth tenths squared cubed "
    "factorial sqrt root pi plus minus times over point or and to th st nd rd".split()
)
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

_POWER = r"\s*\^\s*(?:\{\s*([23])\s*\}|([23]))"
_UNIT = re.compile(
    rf"""(?<![A-Za-z\\])
    (?: (?P<degree>°) | (?P<percent>%|per\s?cent|pct)
      | (?: (?P<shape>square|sq\.?|cubic|cu\.?) \s+ )? (?P<name>[A-Za-z]+) (?P<power>{_POWER})?
        (?: \s*(?:/|\bper\b)\s* (?P<per>[A-Za-z]+) (?P<per_power>{_POWER})? )?
    ) $""",
    re.VERBOSE | re.IGNORECASE,
)
_SHAPES = {"sq": 2, "cu": 3}
_MINUTES = re.compile(r"(-?)([0-9]{1,6})°\s*([0-9]{1,2})\s*['′](?:\s*([0-9]{1,2})\s*(?:''|[\"″]))?")
_LABEL = re.compile(r"(?:\\(?:angle|triangle)\s*|[∠△]\s*|angle\s+)?[A-Za-z]{1,4}[0-9]?\s*=\s*", re.IGNORECASE)
_CURRENCY = re.compile(r"[$£€¥]\s*(?=[0-9.])")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value; `dimension` is empty without a known unit, and `scale` is that unit in the kind's first one."""

    value: Form
    dimension: tuple[tuple[str, int], ...] = ()
    scale: Form | None = None
    percent: bool = False


@lru_cache(maxsize=4096)
def parse_quantity(text: str) -> Quantity | None:
    """The one number that a text in plain LaTeX states, exactly, or None.

    Taken: closed forms and the words zero to twenty; before them a name (x =, ∠ABC =) or a currency; after them one
    unit. Not taken: more than one number (3 or 4), other words (about 3), a word that changes the value (3 dozen).
    """
    text = _LABEL.sub("", text, count=1) if _LABEL.match(text) else text
    if angle := _MINUTES.fullmatch(text):
        sign, degrees, minutes, seconds = angle.groups()
        size = Fraction(int(degrees)) + Fraction(int(minutes), 60) + Fraction(int(seconds or 0), 3600)
        return Quantity(rational(-size if sign else size), *_dimension("°", 1))
    money = _CURRENCY.match(text)
    text = text[money.end() :] if money else text
    if (value := _value(text)) is not None:
        return Quantity(value)
    unit = _UNIT.search(text)
    if unit is None or (value := _value(text[: unit.start()].rstrip())) is None:
        return None
    if unit["degree"]:
        return Quantity(value, *_dimension("°", 1))
    if unit["percent"]:
        return Quantity(value, percent=True)
    name = unit["name"]
    spaced = text[: unit.start()][-1:].isspace()
    if name.lower() in NOT_UNITS or (len(name) == 1 and name != "m" and not (spaced and name in _SINGLE)):
        return None
    dimension, scale = _dimension(name.lower(), _exponent(unit["power"], unit["shape"]))
    if unit["per"] and dimension:
        below, other = _dimension(unit["per"].lower(), -_exponent(unit["per_power"], None))
        both = multiply(scale, other) if scale is not None and other is not None else None
        dimension, scale = ((*dimension, *below), both) if below and both is not None else ((), None)
    return Quantity(value, dimension, scale)


def same(stated: Quantity, truth: Quantity) -> bool:
    """Equal values, exactly. A unit may be left out; of two known ones of a kind the size counts, other kinds differ.

    A percent sign may be left out (50% is 50) or worked out (50% is 0.5).
    """
    if stated.scale is not None and truth.scale is not None:
        left, right = multiply(stated.value, stated.scale), multiply(truth.value, truth.scale)
        return stated.dimension == truth.dimension and left is not None and left == right
    if stated.percent != truth.percent:
        share, other = (stated, truth) if stated.percent else (truth, stated)
        if multiply(share.value, rational(Fraction(1, 100))) == other.value:
            return True
    return stated.value == truth.value


def _value(text: str) -> Form | None:
    word = WORDS.get(text.lower())
    return rational(word) if word is not None else closed_form(text)


def _exponent(power: str | None, shape: str | None) -> int:
    if shape:
        return _SHAPES[shape[:2].lower()]
    return int(power.strip(" ^{}")) if power else 1


def _dimension(name: str, power: int) -> tuple[tuple[tuple[str, int], ...], Form | None]:
    """((kind, power),) of a known unit and its size; nothing for another word."""
    if name not in _UNITS:
        return (), None
    kind, size = _UNITS[name]
    [(key, factor)] = size.items()
    return ((kind, power),), {(1, key[1] * power): factor**power}

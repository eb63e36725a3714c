"""From a model's text to the answer it states; the text is untrusted, so every function here takes any str."""

from __future__ import annotations

import re
from fractions import Fraction

OPEN, CLOSE = "<answer>", "</answer>"
MAX_CHARS = 64  # no stated number is longer; it also bounds the time spent on one

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

_NUMBER = re.compile(
    r"""
    (?P<sign>[+\-\u2212]?)
    (?:
        (?P<numerator>[0-9]+) \s* / \s* (?P<denominator>[0-9]+)
      | (?P<decimal>
            (?: [1-9][0-9]{0,2} (?: ,[0-9]{3} )+ (?: \.[0-9]+ )?
              | [0-9]+ (?: \.[0-9]+ )?
              | \.[0-9]+
            )
            (?: [eE][+-]?[0-9]{1,2} )?
        )
      | (?P<word>[A-Za-z]+)
    )
    (?: \s* (?: ° | % | (?P<unit>[A-Za-z]{2,}|m) ) )?
    \.?
    """,
    re.VERBOSE,
)


def answer_text(text: str) -> str | None:
    """The text inside the last complete <answer>…</answer>, or None; tags are case-sensitive.

    Of several answers the last one counts, and of nested ones the innermost; an answer that is never closed is none.
    """
    last_close = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(last_close, 0))
    if start < 0:
        return None
    start += len(OPEN)
    return text[start : text.find(CLOSE, start)]


def parse_number(text: str) -> Fraction | None:
    """The one number that the text states, exactly, or None.

    Taken: 3, +3, -3 (also with the sign U+2212), 3.0, .5, 3., 1,234, 3e2 (exponents of two digits), 6/2, and the words
    zero to twenty, unsigned; then one unit, which is ignored (3 items, 70°, 5cm, 50% is 50), and a full stop.
    Not taken: more than one number (3 or 4), words before it (about 3), a unit that changes the value (3 dozen, 2pi),
    ordinals (3rd), 1,5, a zero denominator, NaN and infinity, digits other than 0 to 9, anything above 64 characters.
    """
    stated = text.strip()
    if len(stated) > MAX_CHARS:
        return None
    match = _NUMBER.fullmatch(stated)
    if match is None or (match["unit"] or "").lower() in NOT_UNITS:
        return None
    if match["word"] is not None:
        return WORDS.get(match["word"].lower()) if not match["sign"] else None
    if match["numerator"] is not None:
        if int(match["denominator"]) == 0:
            return None
        size = Fraction(int(match["numerator"]), int(match["denominator"]))
    else:
        size = Fraction(match["decimal"].replace(",", ""))
    return size if match["sign"] in ("", "+") else -size

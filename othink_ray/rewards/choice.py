"""Multiple choice: the letter that an answer picks, and what it says beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?P<open>[(\[]?)(?P<letter>[A-Ja-j])(?P<mark>[)\]]?[.:]?)\s*(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_ANOTHER = re.compile(r"(?<![A-Za-z\\])[(\[]?[A-J](?:[)\].:,]|$)")  # a second choice: A) 60° B) 70°


@dataclass(frozen=True, slots=True)
class Choice:
    """A letter, and the text after it (B) 70°)."""

    letter: str
    rest: str


def parse_choice(text: str) -> Choice | None:
    """B, (B), B., Option B, B) 70°; a text after the letter needs a mark between them. Two choices are none."""
    match = _CHOICE.fullmatch(text)
    if match is None or (match["rest"] and not match["mark"]) or _ANOTHER.search(match["rest"]):
        return None
    return Choice(match["letter"], match["rest"])

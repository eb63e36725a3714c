"""From a model's text to the answer it states; the text is untrusted, so every function here takes any str."""

from __future__ import annotations

import re
from collections.abc import Callable

OPEN, CLOSE = "<answer>", "</answer>"
_TAGS = ("<think>", "</think>", OPEN, CLOSE)
_TAIL_CHARS = 4096  # where a last number is looked for

_NUMBER = re.compile(r"[+\-\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?")


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


def _whole_text(text: str) -> str | None:
    """What follows the last tag of any kind; all of it where there is none."""
    return text[max((at + len(tag) for tag in _TAGS if (at := text.rfind(tag)) >= 0), default=0) :]


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text[-_TAIL_CHARS:])
    return numbers[-1] if numbers else None


def _nothing(text: str) -> str | None:
    return None


WITHOUT_TAG: dict[str, Callable[[str], str | None]] = {
    "strict": _nothing,
    "whole_text": _whole_text,
    "last_number": _last_number,
}


def stated_text(text: str, without_tag: str = "strict") -> str | None:
    """The text to grade: inside the tag, or what the policy `without_tag` makes of a text that has none."""
    inside = answer_text(text)
    return WITHOUT_TAG[without_tag](text) if inside is None else inside

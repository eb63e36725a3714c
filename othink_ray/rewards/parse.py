"""A sentence that states an answer: `The degree of angle OAB is 25.0`, `There are 5 objects left`, `B is correct`."""

from __future__ import annotations

import re
from collections.abc import Callable

from othink_ray.rewards.text import is_harmless

_VERBS = (
    "is|are|was|were|equals|has|have|had|contains?|shows?|counts?|counted|sees?|gets?|got|gives?|remains?|measures?"
)
# The subject has letters only, but in the name of an angle: another number would be a second answer. It is as long as
# can be: the last verb counts.
_SENTENCE = re.compile(
    rf"""
    (?: (?:so|thus|hence|therefore|then|finally|in\s+(?:total|all)) \b,?\s* )?
    (?! (?:option|choice|answer)\s+[(\[]?[A-J]\b )
    (?P<subject> (?: [A-Za-z'’∠△\- ] | \\(?:angle|triangle)(?![A-Za-z]) | (?:(?<=∠)|(?<=angle\s))[1-9] )* )
    (?: \b(?:{_VERBS})\s+ | ['’]s\s+ | \s*(?P<mark>[:=])\s* )
    (?P<stated>\S.*)""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_CONFIRMED = re.compile(
    r"(?!(?:the|it|this|that|my)\b)(?P<stated>.+?)\s+is\s+"
    r"(?:correct|right|the\s+(?:(?:final|correct|right)\s+)?(?:answer|option|choice|one|result|value))",
    re.IGNORECASE | re.DOTALL,
)


def stated_in(sentence: str) -> str | None:
    """What a sentence says its subject is, or None where it is no such sentence, or denies, hedges or asks."""
    if confirmed := _CONFIRMED.fullmatch(sentence):
        return confirmed["stated"]
    match = _SENTENCE.fullmatch(sentence)
    if match is None or not is_harmless(match["subject"]):
        return None
    if match["mark"] and not re.search("[A-Za-z]{3}", match["subject"]):  # x = 3, and the 3 : 4 of a ratio
        return None
    return match["stated"]


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


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(text: str) -> float:
    """1.0 if the whole text is <think>…</think> and then <answer>…</answer>, each tag once, else 0.0.

    White space may stand around and between the two; their content may be empty and may span lines.
    """
    body = text.strip()
    # Counted, not matched: this stays linear on any text.
    if any(body.count(tag) != 1 for tag in TAGS):
        return 0.0
    thought, _, rest = body.partition("</think>")
    return float(thought.startswith("<think>") and rest.lstrip().startswith("<answer>") and rest.endswith("</answer>"))

"""Extract the answer of a completion: the <answer> tag, policies for text without it, the format reward, sentences."""

from __future__ import annotations

import re
from collections.abc import Callable

from othink_ray.rewards.text import is_harmless

OPEN, CLOSE = "<answer>", "</answer>"
TAGS = ("<think>", "</think>", OPEN, CLOSE)

_TAIL_CHARS = 4096  # only the end of the text is searched for its last number
_NUMBER = re.compile(r"[+\-\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?")

_VERBS = (
    "is|are|was|were|equals|has|have|had|contains?|shows?|counts?|counted|sees?|gets?|got|gives?|remains?|measures?"
)
# A sentence that states an answer: `The degree of angle OAB is 25.0`, `There are 5 objects left`. Its subject has only
# letters, except in the name of an angle: another number would be a second answer. The subject matches greedily, so the
# last verb separates it from the answer.
_SENTENCE = re.compile(
    rf"""
    (?: (?:so|thus|hence|therefore|then|finally|in\s+(?:total|all)) \b,?\s* )?
    (?! (?:option|choice|answer)\s+[(\[]?[A-J]\b )
    (?P<subject> (?: [A-Za-z'’∠△\- ] | \\(?:angle|triangle)(?![A-Za-z]) | (?:(?<=∠)|(?<=angle\s))[1-9] )* )
    (?: \b(?:{_VERBS})\s+ | ['’]s\s+ | \s*(?P<sign>[:=])\s* )
    (?P<stated>\S.*)""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
# `B is correct`
_CONFIRMED = re.compile(
    r"(?!(?:the|it|this|that|my)\b)(?P<stated>.+?)\s+is\s+"
    r"(?:correct|right|the\s+(?:(?:final|correct|right)\s+)?(?:answer|option|choice|one|result|value))",
    re.IGNORECASE | re.DOTALL,
)


def answer_text(text: str) -> str | None:
    """Return the text inside the last complete <answer>…</answer>, or None. Tags are case-sensitive.

    Of several answers the last one counts, and of nested ones the innermost. An unclosed answer does not count.
    """
    last_close = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(last_close, 0))
    if start < 0:
        return None
    start += len(OPEN)
    return text[start : text.find(CLOSE, start)]


def stated_text(text: str, without_tag: str = "strict") -> str | None:
    """Return the text to grade: inside the tag, or as the `without_tag` policy selects it if there is no tag."""
    inside = answer_text(text)
    return WITHOUT_TAG[without_tag](text) if inside is None else inside


def format_reward(text: str) -> float:
    """Return 1.0 if the text is `<think>…</think>` followed by `<answer>…</answer>`, each tag once, else 0.0.

    White space is allowed around and between the two; their contents may be empty and may span lines.
    """
    body = text.strip()
    # Counts instead of a regular expression: linear time on any text.
    if any(body.count(tag) != 1 for tag in TAGS):
        return 0.0
    thought, _, rest = body.partition("</think>")
    return float(thought.startswith("<think>") and rest.lstrip().startswith(OPEN) and rest.endswith(CLOSE))


def stated_in(sentence: str) -> str | None:
    """Return the answer that a sentence states about its subject.

    None if the text is not such a sentence, or if it negates, hedges or asks.
    """
    if confirmed := _CONFIRMED.fullmatch(sentence):
        return confirmed["stated"]
    match = _SENTENCE.fullmatch(sentence)
    if match is None or not is_harmless(match["subject"]):
        return None
    if match["sign"] and not re.search("[A-Za-z]{3}", match["subject"]):  # x = 3, or the 3 : 4 of a ratio
        return None
    return match["stated"]


def _whole_text(text: str) -> str | None:
    """Return the text after the last tag of any kind; the whole text if there is no tag."""
    return text[max((start + len(tag) for tag in TAGS if (start := text.rfind(tag)) >= 0), default=0) :]


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

"""A sentence that states an answer: `The degree of angle OAB is 25.0`, `There are 5 objects left`, `B is correct`."""

from __future__ import annotations

import re

from othink_ray.rewards.wording import is_harmless

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

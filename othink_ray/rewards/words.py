"""Answers in words: colours, shapes, yes and no, and several of them."""

from __future__ import annotations

import re

from othink_ray.rewards.wording import HEDGES, is_denied, words_of

_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\S)", re.IGNORECASE)
_END = re.compile(r"[.,;:!]+$")
_AND = re.compile(r"\s*[,;]?\s+(?:and|or)\s+", re.IGNORECASE)
_COMMA = re.compile(r"\s*[,;]\s+")
_MAX_ITEMS = 8

# After a yes or no: it does; there is a circle; it is not a circle.
_REPLY = re.compile(
    r"""(?P<reply>yes|no) (?:\s*[,.;:!])?\s+
    (?P<again>(?:it|there|they|this|that|(?:the|a|an)(?:\s[a-z]+){1,4}?)
      (?:['’]s|\s(?:is|are|was|were|do|does|did|has|have|can)(?:n['’]t)?) (?:\s[a-z]+){0,8})[.!]?""",
    re.VERBOSE | re.IGNORECASE,
)
_KIND = re.compile(r"(?:colou?r|shape)\s+(?P<after>[a-z]+)|(?P<before>[a-z]+)\s+(?:in\s+)?(?:colou?r|shape)")
_REPLIES = frozenset(("yes", "no"))


def same_words(stated: str, truth: str) -> bool:
    """Whether they are the same words: without an article, the marks at the end, their kind (blue color) and case.

    A single letter keeps its case where it names a quantity (x, X) and no choice. A yes or no may be repeated as a
    sentence (No, it is not), if that agrees with it.
    """
    said, true = _bare(stated), _bare(truth)
    if reply := _REPLY.fullmatch(stated):
        agrees = not is_denied(reply["again"]) if reply["reply"].lower() == "yes" else "yes" not in words_of(stated)
        said = _bare(reply["reply"]) if agrees and HEDGES.isdisjoint(words_of(reply["again"])) else said
    return bool(true) and said == true


def split_items(text: str) -> list[str]:
    """The answers of a text that has several, between and, or and commas."""
    parts = _AND.split(text, maxsplit=_MAX_ITEMS)
    if len(parts) == 1 and any(bracket in text for bracket in "()[]{}"):
        return parts
    return [item for part in parts for item in _COMMA.split(part, maxsplit=_MAX_ITEMS)]


def _bare(text: str) -> str:
    text = _END.sub("", _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text).strip()
    if len(text) == 1 and text not in "abcdefghijABCDEFGHIJ":
        return text
    text = re.sub(r"\bgrey\b", "gray", text.casefold())
    named = _KIND.fullmatch(text)
    word = named and (named["after"] or named["before"])
    return word if word and word not in _REPLIES else text  # no shape is not no

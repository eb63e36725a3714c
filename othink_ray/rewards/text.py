"""Interpret English around an answer: words that change its meaning, names of counted things, choices and lists."""

from __future__ import annotations

import re
from dataclasses import dataclass

from othink_ray.rewards.numbers import CARDINALS, ORDINALS

# Closed word classes: English has few of these words and gains no new ones, so they can be listed. Nouns and adjectives
# cannot.
_DENIALS = frozenset(
    "no not never none nor neither nothing nobody cannot without except but unless unlikely hardly barely scarcely "
    "doubt doubtful wrong wrongly false falsely incorrect incorrectly untrue impossible instead if whether what how "
    "why suppose assuming".split()
)
HEDGES = frozenset(
    "or either maybe perhaps probably possibly likely about around roughly approximately approx nearly almost circa "
    "estimated unsure uncertain unknown something ish".split()
)
_COMPARISONS = frozenset("more less fewer least than too short".split())
_MULTIPLES = frozenset(
    "half halves twice double triple times plus minus squared cubed factorial sqrt power raised modulo mod divided "
    "multiplied increased decreased fold point score scores dozen dozens gross pair pairs couple couples lakh "
    "lakhs crore crores myriad thou grand mil bn mn tn ppm ppb bps basis st nd rd th".split()
)
# Words allowed in the subject of a sentence, but not between a number and the things it counts.
_FUNCTION_WORDS = frozenset(
    "a an the this that these those each every all both any some few several many much other another others anything "
    "everything i you he she it we they me him her us them my your his its our their of in on at by to for from with "
    "into onto upon within per through during before after since until between among against along across behind "
    "beside near off out up down toward towards via as over under above below beyond and yet so because while though "
    "although is are was were be been am do does did has have had can could may might must shall should will would "
    "most minimum maximum min max negative pi root base log".split()
)

_CHANGING = _DENIALS | HEDGES | _COMPARISONS | _MULTIPLES | CARDINALS
_NO_NOUNS = _CHANGING | ORDINALS | _FUNCTION_WORDS

_WORD = r"[A-Za-z]{2,}(?:-[A-Za-z]+)*"
_MAX_WORDS = 5
_PHRASE = re.compile(rf"{_WORD}(?:\s+{_WORD}){{0,{_MAX_WORDS - 1}}}")
# Phrases after a count: 3 (cubes) in total, of them, in the image, that are left.
_TAIL = re.compile(
    rf"""(?:^|\s+)
    (?: in \s+ (?:total|all)
      | there | here | left | remaining | altogether
      | (?:in|on|of|from|inside) \s+ (?: them | it | (?:the|this|that|these|those) (?P<place>(?:\s+{_WORD}){{1,3}}) )
      | (?:(?:that|which) \s+)? (?:is|are|was|were) (?P<state>(?:\s+{_WORD}){{1,3}})
    ) $""",
    re.VERBOSE | re.IGNORECASE,
)
_PLURALS = frozenset("people children men women".split())

_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\S)", re.IGNORECASE)
_END = re.compile(r"[.,;:!]+$")
_AND = re.compile(r"\s*[,;]?\s+(?:and|or)\s+", re.IGNORECASE)
_COMMA = re.compile(r"\s*[,;]\s+")
_MAX_ITEMS = 8

# Yes or no, repeated as a sentence: it does; there is a circle; it is not a circle.
_REPLY = re.compile(
    r"""(?P<reply>yes|no) (?:\s*[,.;:!])?\s+
    (?P<again>(?:it|there|they|this|that|(?:the|a|an)(?:\s[a-z]+){1,4}?)
      (?:['’]s|\s(?:is|are|was|were|do|does|did|has|have|can)(?:n['’]t)?) (?:\s[a-z]+){0,8})[.!]?""",
    re.VERBOSE | re.IGNORECASE,
)
_KIND = re.compile(r"(?:colou?r|shape)\s+(?P<after>[a-z]+)|(?P<before>[a-z]+)\s+(?:in\s+)?(?:colou?r|shape)")
_REPLIES = frozenset(("yes", "no"))

_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?P<open>[(\[]?)(?P<letter>[A-Ja-j])(?P<mark>[)\]]?[.:]?)\s*(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_SECOND_CHOICE = re.compile(r"(?<![A-Za-z\\])[(\[]?[A-J](?:[)\].:,]|$)")  # A) 60° B) 70°


@dataclass(frozen=True, slots=True)
class Choice:
    """Letter of a choice and the text after it, e.g. B) 70°."""

    letter: str
    rest: str


def is_harmless(text: str) -> bool:
    """Return whether no word negates, hedges, compares or multiplies."""
    return not any(word in _CHANGING or word.endswith("n't") for word in words_of(text))


def is_denied(text: str) -> bool:
    """Return whether a word negates."""
    return any(word in _DENIALS or word.endswith("n't") for word in words_of(text))


def names_things(text: str) -> bool:
    """Return whether the text after a number only names the counted things (cubes, large red cubes) or is empty.

    False for the text in: 3 hundredths, 3 less, 3 each, 3 cubes or spheres.
    """
    return not text or (_PHRASE.fullmatch(text) is not None and _NO_NOUNS.isdisjoint(words_of(text)))


def names_several(text: str) -> bool:
    """Return whether the text names things in the plural."""
    last = text.lower().split()[-1:]
    plural = bool(last) and (last[0] in _PLURALS or re.search(r"[^siu]s$", last[0]) is not None)
    return plural and names_things(text)


def without_tail(text: str) -> str:
    """Strip phrases that locate the counted things or say that they are all: `cubes in the image` -> `cubes`."""
    for _ in range(2):
        tail = _TAIL.search(text)
        if tail is None or not _NO_NOUNS.isdisjoint(words_of(tail["place"] or tail["state"] or "")):
            break
        text = text[: tail.start()]
    return text


def words_of(text: str) -> list[str]:
    """Return the words in lower case; hyphenated words are split."""
    return re.findall(r"[a-z']+", text.lower().replace("’", "'"))


def same_words(stated: str, truth: str) -> bool:
    """Return whether two texts have the same words, ignoring articles, final punctuation, kind (blue color) and case.

    A single letter that names a quantity (x, X) rather than a choice keeps its case. A yes or no may be followed by a
    sentence that agrees with it (No, it is not).
    """
    stated_bare, true_bare = _bare(stated), _bare(truth)
    if reply := _REPLY.fullmatch(stated):
        agrees = not is_denied(reply["again"]) if reply["reply"].lower() == "yes" else "yes" not in words_of(stated)
        if agrees and HEDGES.isdisjoint(words_of(reply["again"])):
            stated_bare = _bare(reply["reply"])
    return bool(true_bare) and stated_bare == true_bare


def split_items(text: str) -> list[str]:
    """Split a list of answers at `and`, `or`, commas and semicolons."""
    parts = _AND.split(text, maxsplit=_MAX_ITEMS)
    if len(parts) == 1 and any(bracket in text for bracket in "()[]{}"):
        return parts
    return [item for part in parts for item in _COMMA.split(part, maxsplit=_MAX_ITEMS)]


def parse_choice(text: str) -> Choice | None:
    """Parse B, (B), B., Option B or B) 70°; return None for other texts and for two choices.

    Text after the letter must be separated from it by punctuation.
    """
    match = _CHOICE.fullmatch(text)
    if match is None or (match["rest"] and not match["mark"]) or _SECOND_CHOICE.search(match["rest"]):
        return None
    return Choice(match["letter"], match["rest"])


def _bare(text: str) -> str:
    text = _END.sub("", _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text).strip()
    if len(text) == 1 and text not in "abcdefghijABCDEFGHIJ":
        return text
    text = re.sub(r"\bgrey\b", "gray", text.casefold())
    named = _KIND.fullmatch(text)
    word = named and (named["after"] or named["before"])
    return word if word and word not in _REPLIES else text  # `no shape` must not become `no`

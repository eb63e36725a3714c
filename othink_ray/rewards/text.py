"""English around an answer: which words change what it says, and which only name what is counted."""

from __future__ import annotations

import re
from dataclasses import dataclass

from othink_ray.rewards.numbers import CARDINALS, ORDINALS

# English has few words of these classes and takes in no new ones, so they can be listed; nouns and adjectives cannot.
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
# What may stand in the subject of a sentence, but not between a number and what it counts.
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
# What may follow a count: 3 (cubes) in total, of them, in the image, that are left.
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


def is_harmless(text: str) -> bool:
    """Whether no word denies, hedges, compares or multiplies what stands beside it."""
    return not any(word in _CHANGING or word.endswith("n't") for word in words_of(text))


def is_denied(text: str) -> bool:
    return any(word in _DENIALS or word.endswith("n't") for word in words_of(text))


def names_things(text: str) -> bool:
    """Whether a text after a number says only what is counted, as cubes and large red cubes do; so also an empty one.

    Not so: 3 hundredths, 3 less, 3 each, 3 cubes or spheres.
    """
    return not text or (_PHRASE.fullmatch(text) is not None and _NO_NOUNS.isdisjoint(words_of(text)))


def names_several(text: str) -> bool:
    """Whether it is the plural of a thing."""
    last = text.lower().split()[-1:]
    plural = bool(last) and (last[0] in _PLURALS or re.search(r"[^siu]s$", last[0]) is not None)
    return plural and names_things(text)


def without_tail(text: str) -> str:
    """Without where the counted things are, or that they are all: `cubes` of `cubes in the image`."""
    for _ in range(2):
        tail = _TAIL.search(text)
        if tail is None or not _NO_NOUNS.isdisjoint(words_of(tail["place"] or tail["state"] or "")):
            break
        text = text[: tail.start()]
    return text


def words_of(text: str) -> list[str]:
    """In lower case; of a hyphenated word each part."""
    return re.findall(r"[a-z']+", text.lower().replace("’", "'"))


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

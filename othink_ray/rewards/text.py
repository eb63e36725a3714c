"""Interpret the English of an answer: numerals, words that change a number, choices, lists and sentences.

`spelled` reads numerals exactly (twenty-one, 2.5 million, two thirds, three and a half).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

# Numerals in words.
_SMALL = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {
    word: 10 * tens
    for tens, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
_LARGE = {"thousand": 10**3} | {
    f"{prefix}illion": 10 ** (3 * power)
    for power, prefix in enumerate("m b tr quadr quint sext sept oct non dec".split(), start=2)
}
_IRREGULAR = {
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def _ordinal(cardinal: str) -> str:
    return _IRREGULAR.get(cardinal, cardinal.removesuffix("y") + ("ieth" if cardinal.endswith("y") else "th"))


# Denominators in the singular. Second is not one: it is a unit of time, or the ordinal after first, never a half.
_SINGULAR_DENOMINATORS = {"half": 2, "quarter": 4} | {
    _ordinal(word): value
    for word, value in (_SMALL | _TENS | {"hundred": 100} | _LARGE).items()
    if word not in ("zero", "one", "two")
}
_PLURAL_DENOMINATORS = {f"{word}s": value for word, value in _SINGULAR_DENOMINATORS.items()} | {"halves": 2}

_SINGULAR = (*_SMALL, *_TENS, "hundred", *_LARGE)
_PLURAL = (word.removesuffix("y") + {"x": "es", "y": "ies"}.get(word[-1], "s") for word in _SINGULAR)  # sixes, twenties
CARDINALS = frozenset((*_SINGULAR, *_PLURAL))
ORDINALS = frozenset((*_SINGULAR_DENOMINATORS, *_PLURAL_DENOMINATORS, "first"))

_DIGITS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]{1,20}(?:\.[0-9]{1,20})?")
_HYPHENS = re.compile(r"[a-z]+(?:-[a-z]+)+")
_NUMERAL_WORDS = CARDINALS | ORDINALS | {"and", "a"}

_Parsed: TypeAlias = "tuple[Fraction, int] | None"  # a value, and the index of the first word after it

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


@dataclass(frozen=True, slots=True)
class Choice:
    """Letter of a choice and the text after it, e.g. B) 70°."""

    letter: str
    rest: str


def spelled(text: str) -> tuple[Fraction, str] | None:
    """Return the number at the start of a text, at least one part of it in words, and the remaining text.

    Reads the longest numeral, so that part of a number is never taken for the whole.
    """
    words = text.split()
    lower: list[str] = []
    origin: list[int] = []  # index into `words` of each word in `lower`: hyphenated words are split
    for index, word in enumerate(map(str.lower, words)):
        parts = word.split("-") if _HYPHENS.fullmatch(word) else [word]
        pieces = parts if _NUMERAL_WORDS.issuperset(parts) else [word]
        lower += pieces
        origin += [index] * len(pieces)
    negative = lower[:1] in (["minus"], ["negative"])
    parsed = _parse_number(lower, int(negative))
    if parsed is None:
        return None
    value, end = parsed
    if _DIGITS.fullmatch(" ".join(lower[:end])) or (end < len(lower) and origin[end] == origin[end - 1]):
        return None
    return -value if negative else value, " ".join(words[origin[end - 1] + 1 :])


def is_harmless(text: str) -> bool:
    """Return whether no word negates, hedges, compares, multiplies or is a numeral."""
    return not any(word in _CHANGING or word.endswith("n't") for word in words_of(text))


def is_denied(text: str) -> bool:
    """Return whether a word negates."""
    return any(word in _DENIALS or word.endswith("n't") for word in words_of(text))


def names_things(text: str) -> bool:
    """Return whether the text after a number only names the counted things (cubes, large red cubes) or is empty.

    False for the text after the 3 in: 3 hundredths, 3 less, 3 each, 3 cubes or spheres.
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


def _bare(text: str) -> str:
    text = _END.sub("", _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text).strip()
    if len(text) == 1 and text not in "abcdefghijABCDEFGHIJ":
        return text
    text = re.sub(r"\bgrey\b", "gray", text.casefold())
    named = _KIND.fullmatch(text)
    word = named and (named["after"] or named["before"])
    return word if word and word not in _REPLIES else text  # `no shape` must not become `no`


def _parse_number(words: Sequence[str], i: int) -> _Parsed:
    """Parse a cardinal, a decimal, a fraction or a mixed number."""
    parsed = _parse_fraction(words, i)
    if parsed is not None:
        return parsed
    parsed = _parse_cardinal(words, i)
    if parsed is None:
        return None
    value, i = parsed
    if words[i : i + 1] == ["point"]:
        return _parse_decimals(value, words, i + 1)
    if words[i : i + 1] == ["and"] and (part := _parse_fraction(words, i + 1)) is not None and part[0] < 1:
        return value + part[0], part[1]
    return value, i


def _parse_fraction(words: Sequence[str], i: int) -> _Parsed:
    """Parse a fraction: half, a third, one fifth, three quarters, 3 hundredths."""
    if words[i : i + 1] == ["half"]:
        return Fraction(1, 2), i + 1
    parsed = (Fraction(1), i + 1) if words[i : i + 1] in (["a"], ["an"]) else _parse_cardinal(words, i)
    if parsed is None or parsed[1] == len(words):
        return None
    numerator, i = parsed
    names = _SINGULAR_DENOMINATORS if numerator == 1 else _PLURAL_DENOMINATORS
    if words[i] in names:
        return numerator / names[words[i]], i + 1
    if words[i] in _TENS and i + 1 < len(words) and 2 < names.get(words[i + 1], 0) < 10:
        return numerator / (_TENS[words[i]] + names[words[i + 1]]), i + 2  # three twenty-fifths
    return None


def _parse_decimals(whole: Fraction, words: Sequence[str], i: int) -> _Parsed:
    """Parse the digits after a decimal point, one word each."""
    digits = ""
    while i < len(words) and len(digits) < 20:
        digit = words[i] if words[i].isascii() and words[i].isdigit() else str(_SMALL.get(words[i], ""))
        if not digit or len(digit) > 20 or (len(digit) > 1 and words[i] in _SMALL):
            break
        digits, i = digits + digit, i + 1
    return (whole + Fraction(int(digits), 10 ** len(digits)), i) if digits else None


def _parse_cardinal(words: Sequence[str], i: int, below: int = 10**40) -> _Parsed:
    """Parse the longest whole number smaller than `below`; digits may precede thousand, million, ..."""
    parsed = _parse_below_thousand(words, i)
    if parsed is None:
        return None
    value, i = parsed
    size = _LARGE.get(words[i]) if i < len(words) else None
    if size is not None and value * size < below:
        value, i = value * size, i + 1
        more = _parse_cardinal(words, i + (words[i : i + 1] == ["and"]), size)
        if more is not None and more[0] < size:
            return value + more[0], more[1]
    return value, i


def _parse_below_thousand(words: Sequence[str], i: int) -> _Parsed:
    parsed = _parse_below_hundred(words, i)
    if parsed is None and words[i : i + 1] in (["a"], ["an"]) and i + 1 < len(words):
        parsed = (Fraction(1), i + 1) if words[i + 1] in _LARGE or words[i + 1] == "hundred" else None
    if parsed is None:
        return None
    value, i = parsed
    if words[i : i + 1] == ["hundred"]:
        value, i = value * 100, i + 1
        more = _parse_below_hundred(words, i + (words[i : i + 1] == ["and"]))
        if more is not None and more[0] < 100:
            return value + more[0], more[1]
    return value, i


def _parse_below_hundred(words: Sequence[str], i: int) -> _Parsed:
    """Parse a number below 100 in words, or any number in digits."""
    if i >= len(words):
        return None
    word = words[i]
    if word in _SMALL:
        return Fraction(_SMALL[word]), i + 1
    if word in _TENS:
        unit = _SMALL.get(words[i + 1], 0) if i + 1 < len(words) else 0
        return Fraction(_TENS[word] + unit * (unit < 10)), i + 1 + (0 < unit < 10)
    if _DIGITS.fullmatch(word):
        return Fraction(word.replace(",", "")), i + 1
    return None

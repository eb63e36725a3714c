"""Numbers in English words, exactly: twenty-one, one hundred and five, 2.5 million, two thirds, three and a half."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

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


# Denominators in the singular. A second is a unit of time, or comes after a first: never a half.
_PARTS = {"half": 2, "quarter": 4} | {
    _ordinal(word): value
    for word, value in (_SMALL | _TENS | {"hundred": 100} | _LARGE).items()
    if word not in ("zero", "one", "two")
}
_DENOMINATORS = {f"{word}s": value for word, value in _PARTS.items()} | {"halves": 2}

_SINGULAR = (*_SMALL, *_TENS, "hundred", *_LARGE)
_PLURAL = (word.removesuffix("y") + {"x": "es", "y": "ies"}.get(word[-1], "s") for word in _SINGULAR)  # sixes, twenties
CARDINALS = frozenset((*_SINGULAR, *_PLURAL))
ORDINALS = frozenset((*_PARTS, *_DENOMINATORS, "first"))

_DIGITS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]{1,20}(?:\.[0-9]{1,20})?")
_HYPHENS = re.compile(r"[a-z]+(?:-[a-z]+)+")
_NUMERAL_WORDS = CARDINALS | ORDINALS | {"and", "a"}

_Read: TypeAlias = "tuple[Fraction, int] | None"  # a value, and where the words after it begin


def spelled(text: str) -> tuple[Fraction, str] | None:
    """The number that a text begins with, at least one word of it in words, and the text after it.

    Read as long as it goes, so that no part of a number is taken for the whole.
    """
    words = text.split()
    lower: list[str] = []
    origin: list[int] = []  # of each word in `lower`, the word of the text that it ends
    for index, word in enumerate(map(str.lower, words)):
        parts = word.split("-") if _HYPHENS.fullmatch(word) else [word]
        pieces = parts if _NUMERAL_WORDS.issuperset(parts) else [word]
        lower += pieces
        origin += [index] * len(pieces)
    negative = lower[:1] in (["minus"], ["negative"])
    read = _number(lower, int(negative))
    if read is None:
        return None
    value, end = read
    if _DIGITS.fullmatch(" ".join(lower[:end])) or (end < len(lower) and origin[end] == origin[end - 1]):
        return None
    return -value if negative else value, " ".join(words[origin[end - 1] + 1 :])


def _number(words: Sequence[str], at: int) -> _Read:
    """A cardinal, a decimal, a fraction or a mixed number."""
    read = _fraction(words, at)
    if read is not None:
        return read
    read = _cardinal(words, at)
    if read is None:
        return None
    value, at = read
    if words[at : at + 1] == ["point"]:
        return _decimals(value, words, at + 1)
    if words[at : at + 1] == ["and"] and (part := _fraction(words, at + 1)) is not None and part[0] < 1:
        return value + part[0], part[1]
    return value, at


def _fraction(words: Sequence[str], at: int) -> _Read:
    """Half, a third, one fifth, three quarters, 3 hundredths."""
    if words[at : at + 1] == ["half"]:
        return Fraction(1, 2), at + 1
    read = (Fraction(1), at + 1) if words[at : at + 1] in (["a"], ["an"]) else _cardinal(words, at)
    if read is None or read[1] == len(words):
        return None
    numerator, at = read
    names = _PARTS if numerator == 1 else _DENOMINATORS
    if words[at] in names:
        return numerator / names[words[at]], at + 1
    if words[at] in _TENS and at + 1 < len(words) and 2 < names.get(words[at + 1], 0) < 10:
        return numerator / (_TENS[words[at]] + names[words[at + 1]]), at + 2  # three twenty-fifths
    return None


def _decimals(whole: Fraction, words: Sequence[str], at: int) -> _Read:
    """The digits after a point, one by one."""
    digits = ""
    while at < len(words) and len(digits) < 20:
        digit = words[at] if words[at].isascii() and words[at].isdigit() else str(_SMALL.get(words[at], ""))
        if not digit or len(digit) > 20 or (len(digit) > 1 and words[at] in _SMALL):
            break
        digits, at = digits + digit, at + 1
    return (whole + Fraction(int(digits), 10 ** len(digits)), at) if digits else None


def _cardinal(words: Sequence[str], at: int, below: int = 10**40) -> _Read:
    """A whole number, or digits before thousand, million ..., as far as the words make one smaller than `below`."""
    read = _below_thousand(words, at)
    if read is None:
        return None
    value, at = read
    size = _LARGE.get(words[at]) if at < len(words) else None
    if size is not None and value * size < below:
        value, at = value * size, at + 1
        more = _cardinal(words, at + (words[at : at + 1] == ["and"]), size)
        if more is not None and more[0] < size:
            return value + more[0], more[1]
    return value, at


def _below_thousand(words: Sequence[str], at: int) -> _Read:
    read = _below_hundred(words, at)
    if read is None and words[at : at + 1] in (["a"], ["an"]) and at + 1 < len(words):
        read = (Fraction(1), at + 1) if words[at + 1] in _LARGE or words[at + 1] == "hundred" else None
    if read is None:
        return None
    value, at = read
    if words[at : at + 1] == ["hundred"]:
        value, at = value * 100, at + 1
        more = _below_hundred(words, at + (words[at : at + 1] == ["and"]))
        if more is not None and more[0] < 100:
            return value + more[0], more[1]
    return value, at


def _below_hundred(words: Sequence[str], at: int) -> _Read:
    """Of words a number below 100; digits may stand for any."""
    if at >= len(words):
        return None
    word = words[at]
    if word in _SMALL:
        return Fraction(_SMALL[word]), at + 1
    if word in _TENS:
        unit = _SMALL.get(words[at + 1], 0) if at + 1 < len(words) else 0
        return Fraction(_TENS[word] + unit * (unit < 10)), at + 1 + (0 < unit < 10)
    if _DIGITS.fullmatch(word):
        return Fraction(word.replace(",", "")), at + 1
    return None


_LAYERS = 6  # at most this many wrappings are taken off one answer
_FUNCTIONS = "sqrt pi sin cos tan cot sec csc arcsin arccos arctan log ln exp".split()
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FULL_WIDTH = {0xFF01 + place: chr(0x21 + place) for place in range(0x5E)}  # ！ to ～
_MARKS = (("__", "__"), *((mark, mark) for mark in "*_`\"'"), ("“", "”"), ("‘", "’"), ("«", "»"))

_LEAD_IN = re.compile(
    r"""
    (?:(?:so|thus|hence|therefore|then)\b,?\s*)?
    (?:
        (?:(?:the|my)\s+)? (?:(?:final|correct|right)\s+)? (?:answer|result|value|option|choice)
        \s* (?:is\b|[:=]) \s* :?
      | there\s+(?:is|are)\b
      | it\s+is\b
      | = (?!\s*=)
    )
    \s*
    """,
    re.VERBOSE | re.IGNORECASE,
)

_BOLD = re.compile(r"(?<!\S)\*\*([^*]+)\*\*(?=[\s.,;:!?]|$)")
_MATH = re.compile(r"(?<!\\)(\$\$?)(?P<dollars>[^$]+)(?<!\\)\1|\\\((?P<inline>.+?)\\\)|\\\[(?P<display>.+?)\\\]")


def _vulgar(fraction: str) -> str:
    upper, lower = unicodedata.normalize("NFKC", fraction).split("\u2044")
    return f"\\frac{{{upper}}}{{{lower}}}"


# In this order: each step reads what the ones before it left.
_REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])", ""),
        (r"\^\s*\{\s*(?:\\circ|\\degree|°)\s*\}|\^\s*(?:\\circ|\\degree|°)|\\(?:circ|degree)(?![A-Za-z])|[º˚]", "°"),
        (r"(?<=[0-9])\^(?:o(?![A-Za-z])|\{o\})", "°"),
        (r"\{,\}", ","),
        (r"(?<=[0-9])\\[,!](?=[0-9]{3}(?![0-9]))", ""),
        (r"\\[,;:! ]|(?<=[0-9}°])~(?=[A-Za-z\\])|\\q?quad(?![A-Za-z])", " "),
        (r"\\([%$])", r"\1"),
        (r"[\u2212\u2013]", "-"),
        (r"\*\*", "^"),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·⋅∙]", "*"),
        (r"\\div(?![A-Za-z])|÷", "/"),
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}"),
        (r"[₀-₉]+", lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}"),
        (r"!=", "≠"),
        (r"(?<=[A-Za-z]{3})!+$", ""),
        (r"[¼-¾⅓-⅞]", lambda match: _vulgar(match[0])),
        (r"π", r"\\pi "),
        (r"√", r"\\sqrt "),
        (rf"(?<![A-Za-z\\])({'|'.join(_FUNCTIONS)})(?![A-Za-z])", r"\\\1 "),
        (r"\\sqrt\s*([0-9]+)", r"\\sqrt{\1}"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"≤|<=|\\le(?![A-Za-z])", r"\\leq "),
        (r"≥|>=|\\ge(?![A-Za-z])", r"\\geq "),
        (r"∞", r"\\infty "),
        (r"∪", r"\\cup "),
        (r"∩", r"\\cap "),
    )
)


def plain(text: str) -> str:
    """The bare answer in plain LaTeX: without lead-in, $…$, \\boxed{…}, **…**, quotes, full stop; units and words stay.

    For a text of at most a few hundred characters: callers bound it.
    """
    text = _BOLD.sub(r" \1 ", text.translate(_FULL_WIDTH))
    text = _MATH.sub(lambda math: f" {math['dollars'] or math['inline'] or math['display']} ", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _braced_roots(_unboxed(text)).strip()
    for _ in range(_LAYERS):
        inner = _unwrapped(text)
        if inner == text:
            break
        text = inner
    return " ".join(text.split())


def _unwrapped(text: str) -> str:
    """One layer less."""
    if lead_in := _LEAD_IN.match(text):
        text = text[lead_in.end() :]
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for opening, closing in _MARKS:
        inner = text[len(opening) : -len(closing)]
        wrapped = len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing)
        if wrapped and opening not in inner and closing not in inner:
            return inner.strip()
    return text


def _unboxed(text: str) -> str:
    """The contents in place of each box."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(?=\{)", text))):
        end = _closing(text, match.end(), "{}")
        if end > 0:
            text = f"{text[: match.start()]} {text[match.end() + 1 : end]} {text[end + 1 :]}"
    return text


def _closing(text: str, at: int, pair: str) -> int:
    """Where the bracket that opens at `at` is closed; -1 where it is not."""
    depth = 0
    for index in range(at, len(text)):
        depth += (text[index] == pair[0]) - (text[index] == pair[1])
        if depth == 0:
            return index
    return -1


def _braced_roots(text: str) -> str:
    """\\sqrt (…) as \\sqrt{…}."""
    for match in reversed(list(re.finditer(r"\\sqrt\s*\(", text))):
        end = _closing(text, match.end() - 1, "()")
        if end > 0:
            text = f"{text[: match.start()]}\\sqrt{{{text[match.end() : end]}}}{text[end + 1 :]}"
    return text


_PIECE = re.compile(r"\\[A-Za-z]+|\\[{}|\\]|[A-Za-z]+|[0-9.,;+\-*/^_=<>(){}\[\]|!'°\s]")
_OPERATOR = re.compile(r"[\\+\-*/^_=<>(){}\[\]|!,]|[0-9][A-Za-z]")
_SHORT_WORDS = frozenset("am an as at be by do go he if in is it me my no of on or so to up us we".split())
_ARITHMETIC = re.compile(r"(?:[0-9.+\-*/(){}\s]|\\frac(?![A-Za-z]))*")
_NO_NUMBER = re.compile(r"[,;=<>]|\\[{}]|[0-9][eE]|(?<!\\log)(?<!\\log )_")
_CONSTANTS = frozenset("ei")
_NUMERIC_COMMANDS = frozenset(_FUNCTIONS) | {"frac"}


def is_expression(plain_text: str) -> bool:
    """Whether it reads as mathematics throughout: symbols, commands and variables of one or two letters, no words."""
    if not _OPERATOR.search(plain_text) or _PIECE.sub("", plain_text):
        return False
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", plain_text)
    return all(len(word) <= 2 and word.lower() not in _SHORT_WORDS for word in words)


def may_be_number(plain_text: str) -> bool:
    """Whether an expression may have a number as its value that `closed_form` cannot tell.

    So none with a variable, a list or a relation, and no mere arithmetic, where `closed_form` refuses what is none.
    """
    if _NO_NUMBER.search(plain_text) or _ARITHMETIC.fullmatch(plain_text):
        return False
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", plain_text)
    commands = re.findall(r"\\([A-Za-z]+)", plain_text)
    return _CONSTANTS.issuperset(words) and _NUMERIC_COMMANDS.issuperset(commands)

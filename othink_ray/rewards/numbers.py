"""Read numbers and expressions in answers: numerals in English words, cleanup of LaTeX and markup, and their kinds.

`spelled` reads numerals exactly (twenty-one, 2.5 million, two thirds, three and a half); `plain` strips an answer to
plain LaTeX; `is_expression` and `may_be_number` classify what remains.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
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

# Cleanup to plain LaTeX.
_MAX_LAYERS = 6  # wrappers (lead-in, quotes, bold) stripped from one answer
_FUNCTIONS = "sqrt pi sin cos tan cot sec csc arcsin arccos arctan log ln exp".split()
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FULL_WIDTH = {0xFF01 + offset: chr(0x21 + offset) for offset in range(0x5E)}  # ！ to ～
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


def _latex_fraction(character: str) -> str:
    numerator, denominator = unicodedata.normalize("NFKC", character).split("\u2044")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


# The order matters: each step reads the output of the previous ones.
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
        (r"[¼-¾⅓-⅞]", lambda match: _latex_fraction(match[0])),
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

# Expressions in plain LaTeX.
_PIECE = re.compile(r"\\[A-Za-z]+|\\[{}|\\]|[A-Za-z]+|[0-9.,;+\-*/^_=<>(){}\[\]|!'°\s]")
_OPERATOR = re.compile(r"[\\+\-*/^_=<>(){}\[\]|!,]|[0-9][A-Za-z]")
_SHORT_WORDS = frozenset("am an as at be by do go he if in is it me my no of on or so to up us we".split())
_ARITHMETIC = re.compile(r"(?:[0-9.+\-*/(){}\s]|\\frac(?![A-Za-z]))*")
_NO_NUMBER = re.compile(r"[,;=<>]|\\[{}]|[0-9][eE]|(?<!\\log)(?<!\\log )_")
_CONSTANTS = frozenset("ei")
_NUMERIC_COMMANDS = frozenset(_FUNCTIONS) | {"frac"}


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


def plain(text: str) -> str:
    """Return the bare answer in plain LaTeX.

    Strips lead-in, $…$, \\boxed{…}, **…**, quotes and the final period; keeps units and words. Callers must bound the
    text to a few hundred characters.
    """
    text = _BOLD.sub(r" \1 ", text.translate(_FULL_WIDTH))
    text = _MATH.sub(lambda math: f" {math['dollars'] or math['inline'] or math['display']} ", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _brace_roots(_unbox(text)).strip()
    for _ in range(_MAX_LAYERS):
        inner = _unwrap(text)
        if inner == text:
            break
        text = inner
    return " ".join(text.split())


def is_expression(plain_text: str) -> bool:
    """Return whether the text is pure mathematics: symbols, commands and variables of one or two letters, no words."""
    if not _OPERATOR.search(plain_text) or _PIECE.sub("", plain_text):
        return False
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", plain_text)
    return all(len(word) <= 2 and word.lower() not in _SHORT_WORDS for word in words)


def may_be_number(plain_text: str) -> bool:
    """Return whether an expression could evaluate to a number although `closed_form` returns None for it.

    False with a variable, a list or a relation. Also False for plain arithmetic: `closed_form` covers it, so its None
    means that the text is not a number.
    """
    if _NO_NUMBER.search(plain_text) or _ARITHMETIC.fullmatch(plain_text):
        return False
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", plain_text)
    commands = re.findall(r"\\([A-Za-z]+)", plain_text)
    return _CONSTANTS.issuperset(words) and _NUMERIC_COMMANDS.issuperset(commands)


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


def _unwrap(text: str) -> str:
    """Strip one layer: a lead-in, a final period, or one pair of quotes or markup."""
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


def _unbox(text: str) -> str:
    """Replace each \\boxed{…} or \\fbox{…} by its contents."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*(?=\{)", text))):
        end = _closing(text, match.end(), "{}")
        if end > 0:
            text = f"{text[: match.start()]} {text[match.end() + 1 : end]} {text[end + 1 :]}"
    return text


def _closing(text: str, start: int, pair: str) -> int:
    """Return the index of the bracket that closes the one at `start`, or -1."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == pair[0]) - (text[index] == pair[1])
        if depth == 0:
            return index
    return -1


def _brace_roots(text: str) -> str:
    """Rewrite \\sqrt (…) as \\sqrt{…}."""
    for match in reversed(list(re.finditer(r"\\sqrt\s*\(", text))):
        end = _closing(text, match.end() - 1, "()")
        if end > 0:
            text = f"{text[: match.start()]}\\sqrt{{{text[match.end() : end]}}}{text[end + 1 :]}"
    return text

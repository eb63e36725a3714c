"""One notation for many: what stands around an answer is taken off, and its mathematics becomes plain LaTeX."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

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

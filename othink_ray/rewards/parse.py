"""Extract the bare answer of a completion, from its <answer> tag or by a policy for texts without one, as plain LaTeX.

`plain` strips an answer to plain LaTeX; `is_expression` and `may_be_number` classify what remains.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from othink_ray.types import Completion, Prompt

OPEN, CLOSE = "<answer>", "</answer>"
TAGS = ("<think>", "</think>", OPEN, CLOSE)

_TAIL_CHARS = 4096  # only the end of the text is searched for its last number
_NUMBER = re.compile(r"[+\-\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?")

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
        (r"\\sqrt\s*([0-9]*\.?[0-9]+)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\\sqrt\{[^{}]*\})", r"\\sqrt{\1}"),
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


def rate_format(prompt: Prompt, completion: Completion) -> float:
    """Return R_format of a completion, as a `Reward`."""
    return format_reward(completion.text)


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


def _whole_text(text: str) -> str | None:
    """Return the text after the last tag of any kind; the whole text if there is no tag."""
    return text[max((start + len(tag) for tag in TAGS if (start := text.rfind(tag)) >= 0), default=0) :]


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text[-_TAIL_CHARS:])
    return numbers[-1] if numbers else None


def _nothing(text: str) -> str | None:
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


WITHOUT_TAG: dict[str, Callable[[str], str | None]] = {
    "strict": _nothing,
    "whole_text": _whole_text,
    "last_number": _last_number,
}

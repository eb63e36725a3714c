"""The grading process: a line of JSON in, a byte out. Run by its path, so that it loads math-verify and little else.

Arguments: CPU seconds for one answer, MiB of memory. It loads and warms up once; each answer gets a child of its own,
which the kernel ends when its time is over. So a verdict hangs on no other answer, and a kill costs milliseconds.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import resource
import signal
import sys

from math_verify import LatexExtractionConfig, parse, verify

READY, RIGHT, WRONG, TIMEOUT, CRASH = b"+", b"1", b"0", b"t", b"c"
_EXIT = {0: WRONG, 1: RIGHT}

# math-verify's own time limits are off: they raise inside Python code, which a long computation in C never reaches.
# Decimals become fractions and numbers are compared to many digits: close is not equal, as in the rules.
_DIGITS = 50
_LATEX = (LatexExtractionConfig(boxed_match_priority=-1),)
_DEGREES = re.compile(r"([0-9]+|\{\\frac\{[0-9]+\}\{[0-9]+\}\})\s*°")
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")
_SET = re.compile(r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
# ANTLR and sympy load and learn lazily; without these the first answers would pay for it.
_WARM_UP = (
    ("x^2+2x", "x(x+2)"),
    ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("(\\frac{1}{2}, \\sqrt{12})", "(0.5, 2\\sqrt{3})"),
    ("[1, \\infty)", "(-\\infty, 2]"),
    ("3", "\\log_2 8+3!-|x|"),
    ("\\frac{1}{2}", "\\sin 30°"),
    ("\\frac{1}{1+\\sqrt{2}}", "\\sqrt{2}-1"),
    ("y=2x+1", "y=1+2x"),
    ("x>3", "3<x"),
)


def equal(truth: str, stated: str) -> bool:
    """Whether two expressions in plain LaTeX are equal; an unreadable one equals nothing."""
    gold, found = _parsed(truth), _parsed(stated)
    if not gold or not found:
        return False
    return bool(verify(gold, found, numeric_precision=_DIGITS, timeout_seconds=None, raise_on_error=True))


def _parsed(text: str) -> list[object]:
    text = _DECIMAL.sub(lambda part: f"{{\\frac{{{part[1]}{part[2]}}}{{1{'0' * len(part[2])}}}}}", text)
    text = _DEGREES.sub(r"(\1*\\pi/180)", text)
    if _SET.fullmatch(text):
        text = f"\\{{{text[1:-1]}\\}}"
    found: list[object] = parse(
        f"${text}$",
        _LATEX,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
        raise_on_error=True,
    )
    return found


def _is_right(line: bytes) -> bool:
    try:
        return equal(*json.loads(line))
    except MemoryError:
        raise
    except Exception:  # a model's text meets four parsers here; what they cannot read is no right answer
        return False


def _graded(line: bytes, seconds: float) -> bytes:
    """The verdict of a child on one answer."""
    child = os.fork()
    if child == 0:
        # CPU time: a crowded machine must not make a right answer wrong. SIGPROF has no handler: the kernel ends us.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            os._exit(_is_right(line))
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return TIMEOUT if os.WTERMSIG(status) == signal.SIGPROF else CRASH
    return _EXIT.get(os.WEXITSTATUS(status), CRASH)


def _serve(seconds: float, memory_mb: int) -> None:
    answers, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # whatever a library prints is no verdict
    logging.disable(logging.CRITICAL)
    for pair in _WARM_UP:
        equal(*pair)
    gc.freeze()  # children share what is loaded
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(nowhere, 2)  # until here it says why it did not start
    os.write(answers, READY)
    for line in sys.stdin.buffer:
        os.write(answers, _graded(line, seconds))


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))

"""Grading process: reads one line of JSON per answer and writes one byte. A script that imports little but math-verify.

Arguments: CPU seconds per answer, memory limit in MiB. The process loads and warms up once, then forks one child per
answer, which the kernel kills at its CPU limit. So no verdict depends on an earlier answer, and a kill costs
milliseconds.
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
_VERDICT_OF_EXIT = {0: WRONG, 1: RIGHT}

# math-verify's time limits are off: they raise between Python instructions, and a long computation in C reaches none.
# Decimals become fractions, and numbers are compared to many digits: as in the rules, close is not equal.
_DIGITS = 50
_LATEX = (LatexExtractionConfig(boxed_match_priority=-1),)
_DEGREES = re.compile(r"([0-9]+|\{\\frac\{[0-9]+\}\{[0-9]+\}\})\s*°")
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")
_SET = re.compile(r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
# ANTLR and sympy import modules and fill caches lazily; without a warm-up the first answers would pay for it.
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
    """Return whether two expressions in plain LaTeX are equal; False if either cannot be parsed."""
    gold, found = _parse_latex(truth), _parse_latex(stated)
    if not gold or not found:
        return False
    return bool(verify(gold, found, numeric_precision=_DIGITS, timeout_seconds=None, raise_on_error=True))


def _parse_latex(text: str) -> list[object]:
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
    except Exception:  # untrusted text runs through four parsers: text that they cannot read is a wrong answer
        return False


def _grade(line: bytes, seconds: float) -> bytes:
    """Grade one answer in a forked child and return its verdict byte."""
    child = os.fork()
    if child == 0:
        # CPU time, not wall time: a busy machine must not make a right answer wrong. SIGPROF has no handler, so the
        # kernel kills the child.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            os._exit(_is_right(line))
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return TIMEOUT if os.WTERMSIG(status) == signal.SIGPROF else CRASH
    return _VERDICT_OF_EXIT.get(os.WEXITSTATUS(status), CRASH)


def _serve(seconds: float, memory_mb: int) -> None:
    verdicts, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # output printed by a library must not be read as a verdict
    logging.disable(logging.CRITICAL)
    for pair in _WARM_UP:
        equal(*pair)
    gc.freeze()  # keeps loaded objects in shared pages of the forked children
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(devnull, 2)  # until here stderr carries the reason of a failed start
    os.write(verdicts, READY)
    for line in sys.stdin.buffer:
        os.write(verdicts, _grade(line, seconds))


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))

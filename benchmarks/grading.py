"""Compare hand-written grading with math-verify:  python -m benchmarks.grading

Grades every case of tests/rewards/verdicts.tsv with five graders and prints a line for each grader: verdicts,
milliseconds per answer, for 16 groups of 8 answers, and for the slowest hostile answer.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from statistics import mean, median
from typing import TypeAlias
from unittest.mock import patch

from othink_ray.rewards import grader, numbers, parse
from othink_ray.rewards.grader import SymbolicProcess
from othink_ray.rewards.numbers import Form

CASES = Path(__file__).resolve().parents[1] / "tests" / "rewards" / "verdicts.tsv"
CPU_S, MEMORY_MB = 2.0, 1024  # as in conf/config.yaml
Grade: TypeAlias = Callable[[str, str], bool]  # (text inside <answer>, true answer) -> right or wrong
Answers: TypeAlias = Sequence[tuple[str, str]]

COUNTING = [(stated, f"{truth}") for truth in range(16) for stated in "0 3 5 7 9 11 three x".split()]
GEOMETRY = [
    (stated.format(n=n), f"{n}\\sqrt{{3}}")
    for n in range(2, 18)
    for stated in (
        *("{n}\\sqrt{{3}}", "{n}√3 cm", "\\sqrt{{{n}}}", "\\frac{{{n}}}{{\\sqrt{{3}}}}", "\\sqrt{{3}}\\cdot{n}", "60°"),
        *("x = {n}\\sqrt3", "{n}.5"),
    )
]
HOSTILE = [
    (stated, truth)
    for truth in ("3", "x+1")
    for stated in (
        *("9**9**9", "9^{9^{9^{9}}}", "99999999!", "{" * 120 + "}" * 120, "\\sqrt{" * 40 + "2" + "}" * 40),
        *("\\frac{" * 40, "(" * 250, "1" * 10**6, "x+" * 500_000, "{" * 10**6, "\\text{" * 150_000),
    )
]


class LibraryProcess(SymbolicProcess):
    """math-verify unmodified, with its own extraction and a comparison of texts, in the same sandbox."""

    worker = Path(__file__).with_name("grading_worker.py")


@contextmanager
def rules_alone() -> Iterator[Grade]:
    """The hand-written rules: `othink_ray.rewards.accuracy`."""
    yield lambda stated, truth: grader.compare(stated, truth) is True


@contextmanager
def rules_then_library() -> Iterator[Grade]:
    """The rules, then math-verify for answers that the rules cannot decide, as `Grader` does."""
    with SymbolicProcess(answer_cpu_s=CPU_S, memory_mb=MEMORY_MB) as process:

        def grade(stated: str, truth: str) -> bool:
            verdict = grader.compare(stated, truth)
            return process.equal(parse.plain(truth), parse.plain(stated)) == "right" if verdict is None else verdict

        yield grade


@contextmanager
def library_alone() -> Iterator[Grade]:
    with LibraryProcess(answer_cpu_s=CPU_S, memory_mb=MEMORY_MB) as process:
        yield lambda stated, truth: process.equal(truth, stated) == "right"


@contextmanager
def without_numbers() -> Iterator[Grade]:
    """The rules for tags, LaTeX, words, choices and lists; math-verify for all numbers."""
    with (
        patch.object(grader, "parse_quantity", lambda text: None),
        SymbolicProcess(answer_cpu_s=CPU_S, memory_mb=MEMORY_MB) as process,
    ):

        def grade(stated: str, truth: str) -> bool:
            if grader.compare(stated, truth):
                return True
            if max(len(stated), len(truth)) > grader.MAX_CHARS:
                return False
            stated, truth = parse.plain(stated), parse.plain(truth)
            expressions = parse.is_expression(f"{stated}=") and parse.is_expression(f"{truth}=")
            return expressions and process.equal(truth, stated) == "right"

        yield grade


@contextmanager
def without_closed_forms() -> Iterator[Grade]:
    """The rules, which read no expressions but integers, decimals and a/b, then math-verify."""
    with ExitStack() as stack:
        for module in (grader, numbers):
            stack.enter_context(patch.object(module, "closed_form", _rational_alone))
        stack.enter_context(patch.object(parse, "_ARITHMETIC", re.compile("(?!)")))  # arithmetic may be a number, too
        yield stack.enter_context(rules_then_library())


def _rational_alone(text: str) -> Form | None:
    try:
        return {(1, 0): Fraction(text)} if Fraction(text) else {}
    except (ValueError, ZeroDivisionError):
        return None


GRADERS = {
    "rules alone": rules_alone,
    "rules, then math-verify": rules_then_library,
    "math-verify alone": library_alone,
    "without numbers.py": without_numbers,
    "without closed forms": without_closed_forms,
}


def main() -> None:
    cases = [line.split("\t") for line in CASES.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    print(f"{len(cases)} verdicts, {sum(case[2] == '1' for case in cases)} of them right answers; times in ms")
    heads = "right;false 1;false 0;first;mean;median;worst;8x16 count;8x16 geo;hostile".split(";")
    print(f"{'grader':<26}" + "".join(f"{head:>11}" for head in heads))
    for name, opened in GRADERS.items():
        with opened() as grade:
            verdicts, times = graded(grade, [("7", "8"), *((stated, truth) for stated, truth, *_ in cases)])
            first, *times = times
            wrong = [case for case, verdict in zip(cases, verdicts[1:], strict=True) if verdict != (case[2] == "1")]
            rewarded = sum(case[2] == "0" for case in wrong)
            counts = len(cases) - len(wrong), rewarded, len(wrong) - rewarded
            spans = first, mean(times), median(times), max(times)
            steps = [min(sum(graded(grade, answers)[1]) for _ in range(2)) for answers in (COUNTING, GEOMETRY)]
            hostile = max(graded(grade, HOSTILE)[1])
        line = "".join(f"{count:>11}" for count in counts)
        print(f"{name:<26}{line}" + "".join(f"{1e3 * span:>11.3g}" for span in (*spans, *steps, hostile)), flush=True)


def graded(grade: Grade, answers: Answers) -> tuple[list[bool], list[float]]:
    """Return the verdict and the seconds of each answer, none of them from a cache of the rules."""
    verdicts, times = [], []
    for stated, truth in answers:
        _clear_caches()
        started = time.perf_counter()
        verdicts.append(grade(stated, truth))
        times.append(time.perf_counter() - started)
    _clear_caches()
    return verdicts, times


def _clear_caches() -> None:
    grader._compare.cache_clear()
    numbers.parse_quantity.cache_clear()


if __name__ == "__main__":
    main()

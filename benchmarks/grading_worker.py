"""The grading process with math-verify unmodified; `benchmarks.grading` starts it like the package's worker."""

from __future__ import annotations

import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

from othink_ray.rewards import sandbox_worker

_EXTRACTION = (LatexExtractionConfig(), ExprExtractionConfig(), StringExtractionConfig(strings=tuple("ABCDEFGHIJ")))


def library_equal(truth: str, stated: str) -> bool:
    """Return whether two texts are the same, or equal for math-verify, which reads LaTeX only between $."""
    if stated.strip(" .").casefold() == truth.strip(" .").casefold():
        return True
    gold, found = (
        parse(f"${text}$" if "\\" in text and "$" not in text else text, _EXTRACTION, parsing_timeout=None)
        for text in (truth, stated)
    )
    return bool(gold and found) and verify(gold, found, timeout_seconds=None)


if __name__ == "__main__":
    sandbox_worker.equal = library_equal
    sandbox_worker._serve(float(sys.argv[1]), int(sys.argv[2]))

"""The comparison of grading with math-verify: its five graders differ where they are built to."""

from __future__ import annotations

import pytest

from benchmarks.grading import GRADERS, graded

CASES = [
    ("2/4", "1/2"),
    ("3 hundredths", "3"),
    ("3 red cubes", "3"),
    ("\\sqrt{12}", "2\\sqrt{3}"),
    ("x(x+2)", "x^2+2x"),
]
VERDICTS = {
    "rules alone": [True, False, True, True, False],
    "rules, then math-verify": [True, False, True, True, True],
    "math-verify alone": [True, True, True, True, False],
    "without numbers.py": [True, False, False, True, True],
    "without closed forms": [True, False, True, True, True],
}


@pytest.mark.parametrize("name", GRADERS)
def test_each_grader_gives_its_verdicts(name: str) -> None:
    with GRADERS[name]() as grade:
        assert graded(grade, CASES)[0] == VERDICTS[name]

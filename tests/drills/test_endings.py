"""The table of endings in docs/faults.md has the rows of the drill."""

from __future__ import annotations

import re

from tests.drills.endings import ENDINGS
from tests.drills.job_endings import RAY_JOBS, SLURM
from tests.drills.slurm import ROOT


def test_the_page_has_a_row_for_each_ending_with_its_exit_status() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| `", page.partition("## How a run can end")[2], re.MULTILINE)
    assert [what for what, _ in rows] == [
        *(ending.what for ending in ENDINGS),
        *(ending.what for ending in SLURM),
        *RAY_JOBS,
    ]
    assert [status for _, status in rows][: len(ENDINGS)] == [str(ending.status) for ending in ENDINGS]

"""The picture in docs/grpo_d.md is what core/kl.py computes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from othink_ray.core.kl import SCHEDULES
from othink_ray.report.schedules import beta_chart, picture

FILE = Path(__file__).resolve().parents[2] / "docs" / "schedules.svg"


def test_the_page_shows_what_the_code_computes() -> None:
    found = picture()
    if os.environ.get("WRITE_PAGES"):
        FILE.write_text(found)
    assert found == FILE.read_text(), "docs/schedules.svg is not what is computed: WRITE_PAGES=1 draws it again"


def test_each_schedule_has_its_curve_and_the_papers_turns_at_its_explored_share() -> None:
    chart = beta_chart()
    assert [key.label for key in chart.keys] == list(SCHEDULES)
    paper = chart.lines[list(SCHEDULES).index("paper")].path
    heights = [float(y) for _, y in re.findall(r"([\d.]+),([\d.]+)", paper)]
    assert heights.index(max(heights)) == 30  # the lowest beta is the lowest point: SVG counts from the top

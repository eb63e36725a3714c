"""The chart of KL weights in docs/grpo_d.md shows the schedules that core/kl.py computes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from othink_ray.core.kl import SCHEDULES
from othink_ray.report.schedules import beta_chart, picture

FILE = Path(__file__).resolve().parents[2] / "docs" / "schedules.svg"


def test_docs_schedules_svg_matches_the_code() -> None:
    svg = picture()
    if os.environ.get("WRITE_PAGES"):
        FILE.write_text(svg)
    assert svg == FILE.read_text(), "docs/schedules.svg is out of date; run this test with WRITE_PAGES=1 to redraw it"


def test_each_schedule_has_a_curve_and_paper_turns_at_30_percent() -> None:
    chart = beta_chart()
    assert [key.label for key in chart.keys] == list(SCHEDULES)
    paper = chart.lines[list(SCHEDULES).index("paper")].path
    heights = [float(y) for _, y in re.findall(r"([\d.]+),([\d.]+)", paper)]
    assert heights.index(max(heights)) == 30  # SVG's y axis points down: the largest y is the smallest beta

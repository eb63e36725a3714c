"""Draw the KL weights beta(s) for docs/grpo_d.md:  python -m othink_ray.report.schedules docs/schedules.svg"""

from __future__ import annotations

import sys
from pathlib import Path

from othink_ray.atomic_write import atomic_write
from othink_ray.config.load import load
from othink_ray.core.kl import SCHEDULES, schedule
from othink_ray.report.charts import Chart, Scale, Series, line_chart
from othink_ray.report.rendering import render

STEPS = 100


def beta_chart() -> Chart:
    """Return a chart of each fixed schedule over 100 steps, with the defaults, the paper's values for counting."""
    kl = load(["algo=grpo_d"]).algo.kl
    curves = [
        Series(
            label=name,
            color=color,
            points=[
                (step, schedule(name, step, STEPS, kl.beta_min, kl.beta_max, kl.explore_frac))
                for step in range(STEPS + 1)
            ],
        )
        for color, name in enumerate(SCHEDULES, start=1)
    ]
    chart = line_chart("beta(s)", curves, left=Scale())
    assert chart is not None
    return chart


def picture() -> str:
    """Return the chart as an SVG document."""
    return render("schedules.svg.j2", chart=beta_chart())


if __name__ == "__main__":
    atomic_write(Path(sys.argv[1]), picture())

"""Axes, tick labels and chart geometry."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from othink_ray.report.axes import Axis, linear_axis, log_axis, short, step_axis, tick_labels
from othink_ray.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    Scale,
    Series,
    area_chart,
    binned,
    line_chart,
    moving_average,
)

numbers = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(st.lists(numbers, min_size=1), st.booleans())
def test_a_linear_axis_covers_all_values_between_outer_ticks(values: list[float], from_zero: bool) -> None:
    axis = linear_axis(values, from_zero=from_zero)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= min(values) and max(values) <= axis.high + slack
    assert (axis.ticks[0], axis.ticks[-1]) == (axis.low, axis.high)
    assert 2 <= len(axis.ticks) <= 7


@given(st.lists(st.floats(1e-12, 1e6), min_size=1))
def test_a_log_axis_covers_all_values_in_whole_decades(values: list[float]) -> None:
    axis = log_axis(values)
    assert axis.low <= min(values) * (1 + 1e-9) and max(values) <= axis.high * (1 + 1e-9)
    assert 2 <= len(axis.ticks) <= 5


def test_zero_is_at_the_bottom_of_a_log_axis() -> None:
    axis = log_axis([0.0, 1e-6, 1e-2])
    assert axis.position(0.0) == 0.0
    assert axis.position(axis.high) == 1.0


@pytest.mark.parametrize(("first", "last"), [(1, 1), (0, 1), (1, 2), (1, 200), (37, 12345)])
def test_step_ticks_are_whole_steps_within_the_run(first: int, last: int) -> None:
    axis = step_axis(first, last)
    assert all(tick == int(tick) and first <= tick <= last for tick in axis.ticks)
    assert 1 <= len(axis.ticks) <= 7


@pytest.mark.parametrize(
    ("axis", "percent", "labels"),
    [
        (Axis(0.0, 0.05, [0.0, 0.025, 0.05]), False, ["0.000", "0.025", "0.050"]),
        (Axis(0.0, 1.0, [0.0, 0.5, 1.0]), True, ["0 %", "50 %", "100 %"]),
        (Axis(0.0, 0.015, [0.0, 0.005, 0.01, 0.015]), True, ["0.0 %", "0.5 %", "1.0 %", "1.5 %"]),
        (Axis(1e-8, 1e-2, [1e-8, 1e-5, 1e-2], log=True), False, ["1e-8", "1e-5", "1e-2"]),
        (Axis(0.0, 2000.0, [0.0, 1000.0, 2000.0]), False, ["0", "1,000", "2,000"]),
        (Axis(0.0, 2e-4, [0.0, 1e-4, 2e-4]), False, ["0.0000", "0.0001", "0.0002"]),
        (Axis(0.0, 5e-5, [0.0, 2.5e-5, 5e-5]), False, ["0", "2.5e-5", "5e-5"]),
        (Axis(-1e7, 1e7, [-1e7, 0.0, 1e7]), False, ["-1e7", "0", "1e7"]),
    ],
)
def test_tick_labels_show_as_many_decimals_as_the_ticks_need(axis: Axis, percent: bool, labels: list[str]) -> None:
    assert tick_labels(axis, percent=percent) == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.62134, "0.621"), (23.1, "23.10"), (1240.4, "1,240"), (3.1e-6, "3.1e-06"), (float("nan"), "–")],
)
def test_short_numbers_have_about_four_digits(value: float, text: str) -> None:
    assert short(value) == text


def series(points: list[tuple[int, float]], **settings: Any) -> Series:
    return Series(label="x", color=1, points=points, **settings)


def test_binning_by_max_keeps_the_largest_value() -> None:
    points = [(step, float(step == 777)) for step in range(1, 1001)]
    kept = binned(series(points, reduce=max), 100)
    assert len(kept) == 100
    assert max(value for _, value in kept) == 1.0


def test_binning_by_mean_keeps_the_mean() -> None:
    points = [(step, float(step)) for step in range(1, 1001)]
    kept = binned(series(points), 100)
    assert sum(value for _, value in kept) / len(kept) == pytest.approx(500.5)


def test_a_moving_average_keeps_a_constant() -> None:
    assert [value for _, value in moving_average([(step, 2.0) for step in range(50)])] == [2.0] * 50


def test_a_series_without_points_gives_no_chart() -> None:
    assert line_chart("t", [series([])], steps=(1, 5), left=Scale()) is None
    assert area_chart("t", [series([])], scale=Scale()) is None


def test_all_points_and_intervals_are_inside_the_plot() -> None:
    chart = line_chart(
        "t",
        [series([(1, -3.0), (50, 8.0)], intervals=[(50, 6.0, 9.5)], dots=True), series([(2, 0.5)], side="right")],
        steps=(1, 60),
        left=Scale(),
        right=Scale(percent=True),
    )
    assert chart is not None
    dots = [dot for line in chart.lines for dot in line.dots]
    ends = [(x, y) for line in chart.lines for x, low, high in line.bars for y in (low, high)]
    assert len(dots) == 3 and len(ends) == 2
    assert all(LEFT <= x <= chart.right < WIDTH and TOP <= y <= HEIGHT - BOTTOM for x, y in dots + ends)


def test_a_second_axis_has_the_color_of_its_only_series() -> None:
    right = Series(label="KL", color=2, points=[(1, 0.5)], side="right")
    chart = line_chart("t", [series([(1, 1.0)]), right], steps=(1, 1), left=Scale(), right=Scale())
    assert chart is not None
    assert (chart.left_color, chart.right_color) == (1, 2)


def test_the_reference_line_is_inside_the_plot() -> None:
    chart = line_chart("t", [series([(1, 1e-6)])], steps=(1, 1), left=Scale(log=True), reference=("limit", 0.01))
    assert chart is not None and chart.reference_y is not None
    assert TOP <= chart.reference_y < chart.lines[0].dots[0][1]


def test_stacked_areas_reach_the_sum_of_their_series() -> None:
    chart = area_chart("t", [series([(1, 1.0), (2, 1.0)]), series([(1, 3.0), (2, 1.0)])], scale=Scale())
    assert chart is not None
    assert [tick.label for tick in chart.left_ticks] == ["0", "1", "2", "3", "4"]
    top = min(float(pair.partition(",")[2]) for pair in chart.areas[1][1].strip("MZ").split())
    assert top == pytest.approx(TOP)


def test_a_small_accuracy_range_is_widened() -> None:
    chart = line_chart(
        "t",
        [series([(1, 0.99), (2, 1.0)])],
        steps=(1, 2),
        left=Scale(percent=True, from_zero=False, least_span=0.2),
    )
    assert chart is not None
    assert chart.left_ticks[-1].label == "100 %"
    assert float(chart.left_ticks[0].label.split()[0]) <= 90.0


def test_a_tooltip_lists_all_values_of_a_step() -> None:
    chart = line_chart("t", [series([(1, 1.0), (2, 3.0)])], steps=(1, 2), left=Scale())
    assert chart is not None
    assert [hover.text for hover in chart.hovers] == ["step 1\nx 1", "step 2\nx 3"]

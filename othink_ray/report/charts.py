"""Line and area charts as geometry in SVG units, ready for the template to draw.

Drawn by hand: 9 charts of 200 steps take 209 kB, need no script and have tooltips and dark mode; matplotlib's have
neither (246 kB, 0.8 s to import), plotly adds 4.8 MB of script and altair 1.1 MB, which the page's policy forbids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

from othink_ray.report.axes import Axis, level_axis, linear_axis, log_axis, short, step_axis, tick_labels

WIDTH, HEIGHT = 400, 220
LEFT, TOP, BOTTOM = 50, 10, 26
RIGHT, RIGHT_WITH_AXIS = 14, 46
DIGIT_WIDTH = 7.5  # upper bound, in a tick label
MOST_POINTS = 300
MOST_AREA_BINS = 120
MOST_HOVERS = 100
SMOOTHED_FROM = 40  # points; with fewer, single values stay readable

Point = tuple[float, float]
Reduce = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One quantity over training steps or over the levels of a sweep; steps without a value are absent."""

    label: str
    color: int
    points: Sequence[Point]
    side: Literal["left", "right"] = "left"
    smooth: bool = False
    dots: bool = False
    reduce: Reduce = fmean  # how a long run's steps are merged into one point
    intervals: Sequence[tuple[float, float, float]] = ()
    band: bool = False  # draw intervals as a band along the curve instead of bars


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A tick of an axis: position, label and text anchor."""

    at: float
    label: str
    anchor: str = "middle"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotLine:
    """A drawn curve: bold path, faint unsmoothed path under it, dots, and intervals as bars or as a band."""

    path: str
    raw_path: str
    color: int
    dots: Sequence[tuple[float, float]]
    bars: Sequence[tuple[float, float, float]]
    band: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A legend entry: label and representative value of a curve."""

    label: str
    value: str
    color: int
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hover:
    """A vertical strip of the plot with a tooltip."""

    x: float
    width: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart ready to draw; coordinates are in SVG units."""

    title: str
    keys: Sequence[Key]
    x_ticks: Sequence[Tick]
    left_ticks: Sequence[Tick]
    right_ticks: Sequence[Tick] = ()
    left_color: int = 0
    right_color: int = 0
    lines: Sequence[PlotLine] = ()
    areas: Sequence[tuple[int, str]] = ()
    reference_y: float | None = None
    hovers: Sequence[Hover] = ()
    right: float = WIDTH - RIGHT
    against: str = "training step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Requirements on an axis: percent, logarithmic, starting at zero, minimum span."""

    percent: bool = False
    log: bool = False
    from_zero: bool = True
    least_span: float = 0.0  # widen a smaller range, so that noise does not look like a trend

    def axis(self, values: Sequence[float]) -> Axis:
        if self.log:
            return log_axis(values)
        margin = max(0.0, self.least_span - (max(values) - min(values))) / 2
        if margin > 0:
            low, high = min(values) - margin, max(values) + margin
            if self.percent:
                low, high = min(min(values), max(low, 0.0)), max(max(values), min(high, 1.0))
            values = [low, high]
        return linear_axis(values, from_zero=self.from_zero)

    def text(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else short(value)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    steps: tuple[int, int] | None = None,
    levels: str = "",
    left: Scale,
    right: Scale | None = None,
    reference: tuple[str, float] | None = None,
) -> Chart | None:
    """Return curves over at least `steps` (first, last), or over the levels of the quantity that `levels` names.

    None if no series has a point.
    """
    series = [curve for curve in series if curve.points]
    if not series:
        return None
    right_edge = WIDTH - (RIGHT if right is None else RIGHT_WITH_AXIS)
    if levels:
        x_axis = level_axis([level for curve in series for level, _ in curve.points])
    else:
        ends = [*(steps or ()), *(curve.points[i][0] for curve in series for i in (0, -1))]
        x_axis = step_axis(round(min(ends)), round(max(ends)))
    scales = {"left": left, "right": right or left}
    axes: dict[str, Axis] = {}
    for side, scale in scales.items():
        values = [value for curve in series if curve.side == side for value in _values(curve)]
        if side == "left" and reference is not None:
            values.append(reference[1])
        if values:
            axes[side] = scale.axis(values)
    keys = [_key(curve, scales[curve.side], levels) for curve in series]
    if reference is not None:
        keys.append(Key(label=reference[0], value=left.text(reference[1]), color=0, dashed=True))
    return Chart(
        title=title,
        keys=keys,
        x_ticks=_x_ticks(x_axis, right_edge),
        left_ticks=_y_ticks(axes.get("left"), left),
        right_ticks=_y_ticks(axes.get("right"), right) if right is not None else (),
        left_color=_side_color(series, "left") if right is not None else 0,
        right_color=_side_color(series, "right"),
        lines=[_plot_line(curve, x_axis, axes[curve.side], right_edge) for curve in series],
        reference_y=_y(axes["left"], reference[1]) if reference is not None else None,
        hovers=_hovers(series, scales, x_axis, right_edge, name=levels or "step"),
        right=right_edge,
        against=levels or "training step",
    )


def area_chart(title: str, series: Sequence[Series], *, scale: Scale) -> Chart | None:
    """Return stacked series, one block per step (or per few steps of a long run); None if no series has a point.

    All series must have the same steps.
    """
    series = [curve for curve in series if curve.points]
    if not series:
        return None
    right_edge = WIDTH - RIGHT
    blocks = [binned(curve, MOST_AREA_BINS) for curve in series]
    steps = [step for step, _ in blocks[0]]
    totals = [0.0] * len(steps)
    x_axis = step_axis(round(series[0].points[0][0]), round(series[0].points[-1][0]))
    edges = [x_axis.low, *((a + b) / 2 for a, b in pairwise(steps)), x_axis.high]
    corners = [_x(x_axis, edge, right_edge) for edge in edges]
    tops: list[list[float]] = [totals]
    for block in blocks:
        totals = [total + value for total, (_, value) in zip(totals, block, strict=True)]
        tops.append(totals)
    axis = scale.axis(totals)
    areas = []
    for curve, below, above in zip(series, tops, tops[1:], strict=False):
        up = [f"{x:.1f},{_y(axis, top):.1f}" for i, top in enumerate(above) for x in (corners[i], corners[i + 1])]
        down = [
            f"{x:.1f},{_y(axis, bottom):.1f}"
            for i, bottom in reversed(list(enumerate(below)))
            for x in (corners[i + 1], corners[i])
        ]
        areas.append((curve.color, f"M{' '.join(up + down)}Z"))
    return Chart(
        title=title,
        keys=[Key(label=curve.label, value=scale.text(curve.points[-1][1]), color=curve.color) for curve in series],
        x_ticks=_x_ticks(x_axis, right_edge),
        left_ticks=_y_ticks(axis, scale),
        areas=areas,
        hovers=_hovers(series, {"left": scale}, x_axis, right_edge),
    )


def binned(series: Series, most: int) -> list[Point]:
    """Return at most `most` points: neighbors are merged by `series.reduce` and placed at their middle step."""
    points = series.points
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    return [
        (points[(a + b - 1) // 2][0], series.reduce([value for _, value in points[a:b]])) for a, b in pairwise(edges)
    ]


def moving_average(points: Sequence[Point]) -> list[Point]:
    """Return means over a centered window of a fifteenth of the points, shorter at both ends."""
    half = max(2, len(points) // 30)
    return [
        (step, fmean(value for _, value in points[max(0, i - half) : i + half + 1]))
        for i, (step, _) in enumerate(points)
    ]


def _values(series: Series) -> list[float]:
    return [value for _, value in series.points] + [end for _, low, high in series.intervals for end in (low, high)]


def _plot_line(series: Series, x_axis: Axis, y_axis: Axis, right_edge: float) -> PlotLine:
    def to_svg(step: float, value: float) -> tuple[float, float]:
        return round(_x(x_axis, step, right_edge), 1), round(_y(y_axis, value), 1)

    def path(points: Sequence[Point]) -> str:
        return "M" + " ".join(f"{x},{y}" for x, y in (to_svg(*point) for point in points))

    points = binned(series, MOST_POINTS)
    smoothed = series.smooth and len(points) >= SMOOTHED_FROM
    lows = [to_svg(step, low) for step, low, _ in series.intervals]
    highs = [to_svg(step, high) for step, _, high in series.intervals]
    band = series.band and len(lows) > 1
    return PlotLine(
        path=path(moving_average(points) if smoothed else points),
        raw_path=path(points) if smoothed else "",
        color=series.color,
        dots=[to_svg(*point) for point in points] if series.dots or len(points) == 1 else [],
        bars=[] if band else [(x, low, high) for (x, low), (_, high) in zip(lows, highs, strict=True)],
        band=f"M{' '.join(f'{x},{y}' for x, y in lows + highs[::-1])}Z" if band else "",
    )


def _key(series: Series, scale: Scale, levels: str) -> Key:
    """Return a legend entry: the latest value of a curve over steps, or the highest value of a sweep."""
    if not levels:
        return Key(label=series.label, value=scale.text(series.points[-1][1]), color=series.color)
    level, value = max(series.points, key=lambda point: point[1])
    return Key(label=f"highest {series.label}", value=f"{scale.text(value)} at {levels} {level:g}", color=series.color)


def _hovers(
    series: Sequence[Series], scales: dict[str, Scale], x_axis: Axis, right_edge: float, *, name: str = "step"
) -> list[Hover]:
    """Return one tooltip strip per shown step, at most MOST_HOVERS, each with the values of all series."""
    steps = sorted({step for curve in series for step, _ in curve.points})
    values = [dict(curve.points) for curve in series]
    stride = math.ceil(len(steps) / MOST_HOVERS)
    shown = steps[stride // 2 :: stride]
    edges = [x_axis.low, *((a + b) / 2 for a, b in pairwise(shown)), x_axis.high]
    hovers = []
    for step, (start, end) in zip(shown, pairwise(edges), strict=True):
        shown_values = [
            f"{curve.label} {scales[curve.side].text(by_step[step])}"
            for curve, by_step in zip(series, values, strict=True)
            if step in by_step
        ]
        x = _x(x_axis, start, right_edge)
        text = "\n".join([f"{name} {step:,.10g}", *shown_values])
        hovers.append(Hover(x=round(x, 1), width=round(_x(x_axis, end, right_edge) - x, 1), text=text))
    return hovers


def _side_color(series: Sequence[Series], side: str) -> int:
    """Return the color of an axis: that of its series if it has exactly one, else 0."""
    colors = [curve.color for curve in series if curve.side == side]
    return colors[0] if len(colors) == 1 else 0


def _x_ticks(axis: Axis, right_edge: float) -> list[Tick]:
    """Return ticks with centered labels; a label that would cross the right border is right-aligned to its tick."""
    ticks = []
    for step, label in zip(axis.ticks, tick_labels(axis), strict=True):
        at = round(_x(axis, step, right_edge), 1)
        fits = at + len(label) * DIGIT_WIDTH / 2 < WIDTH
        ticks.append(Tick(at=at, label=label) if fits else Tick(at=at, label=label, anchor="end"))
    return ticks


def _y_ticks(axis: Axis | None, scale: Scale) -> list[Tick]:
    if axis is None:
        return []
    labels = tick_labels(axis, percent=scale.percent)
    return [Tick(at=round(_y(axis, tick), 1), label=label) for tick, label in zip(axis.ticks, labels, strict=True)]


def _x(axis: Axis, step: float, right_edge: float) -> float:
    return LEFT + axis.position(step) * (right_edge - LEFT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.position(value) * (HEIGHT - BOTTOM - TOP)

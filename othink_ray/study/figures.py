"""Build the paper's figures from the study's numbers, each with the paper's finding and a note on its intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from othink_ray.report.charts import Chart, Scale, Series, line_chart
from othink_ray.report.figures import BLUE, GREEN, ORANGE
from othink_ray.study.records import RecordedValue, Row, StudyRecord, curve_of, number, text, value_of

INK = 0
METHOD_STYLES = {"base": ("base", INK), "grpo": ("GRPO", BLUE), "sft": ("SFT", ORANGE), "grpo_d": ("GRPO-D", GREEN)}
FIRST_OF_RAMP, RAMP = 6, 5  # ordered colors c6..c10 of the style sheet, for the levels of a sweep
ACCURACY = Scale(percent=True, from_zero=False, least_span=0.2)
REWARD = Scale(from_zero=False, least_span=0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperFigure:
    """One figure of the paper; `panels` is empty if none of its runs is done, and `missing` names the absent ones."""

    number: str
    title: str
    found: str
    note: str
    panels: Sequence[Chart]
    missing: str
    table: Sequence[tuple[float, Sequence[RecordedValue | None]]] = ()
    columns: Sequence[str] = ()


def figures(study: StudyRecord) -> dict[str, PaperFigure]:
    """Return the figures drawn as charts, by their key in study.json."""
    return {"fig1": _figure_1(study), "fig4": _figure_4(study), "fig5": _figure_5(study), "fig6": _figure_6(study)}


def method_name(method: str) -> str:
    """Return the displayed name of a method (GRPO-D for grpo_d); an unknown method keeps its name."""
    return METHOD_STYLES.get(method, (method, INK))[0]


def method_color(method: str) -> int:
    """Return the color index of a method, the same on the whole page."""
    return METHOD_STYLES.get(method, (method, INK))[1]


def seeds_note(values: Iterable[RecordedValue | None]) -> str:
    """Return a note on the number of seeds and the interval of the values; empty without a value."""
    known = [value for value in values if value is not None]
    return _interval_note(list(map(_seeds, known)), cut=any(value.cut for value in known)) if known else ""


def _figure_1(study: StudyRecord) -> PaperFigure:
    curves = [(text(row, "method", "?"), curve_of(row.get("points"))) for row in study.fig1]
    series = [
        Series(
            label=method_name(method),
            color=method_color(method),
            points=curve.points,
            intervals=curve.intervals,
            dots=len(curve.points) <= 30,
            band=True,
        )
        for method, curve in curves
    ]
    drawn = {method for method, curve in curves if curve.points}
    same_runs = [
        value_of(row.get("ours"))
        for row in study.table1
        if row.get("task") == "GR" and text(row, "method", "?") in drawn
    ]
    seeds = _seeds_of_curves(study, same_runs)
    has_intervals = any(curve.intervals for _, curve in curves)
    note = (
        _interval_note(seeds, cut=any(curve.cut for _, curve in curves)) if has_intervals else _no_interval_note(seeds)
    )
    return _figure(
        "Fig. 1",
        "Test accuracy in training, geometry",
        "The paper’s 2B model goes from 15.52 % to 32.49 % with SFT and to 30.24 % with GRPO (Table 1).",
        note,
        [line_chart("Test accuracy", series, left=ACCURACY)],
        [method_name(method) for method in ("sft", "grpo") if method not in drawn],
    )


def _figure_4(study: StudyRecord) -> PaperFigure:
    def panel(title: str, key: str, color: int) -> Chart | None:
        return _sweep(title, study.fig4, level="alpha", key=key, color=color, levels="α")

    return _figure(
        "Fig. 4",
        "The weight α of the format reward, geometry",
        _claim(study, "RQ1a", "The paper tries α from 0 to 1 and trains with α = 1 everywhere else."),
        seeds_note(value_of(row.get(key)) for row in study.fig4 for key in ("accuracy", "format")),
        [panel("Accuracy", "accuracy", BLUE), panel("Format accuracy", "format", ORANGE)],
        _missing_levels(study.fig4, "α", "alpha", lambda row: value_of(row.get("accuracy")) is not None),
        table=_level_table(study.fig4, "alpha", ("accuracy", "format")),
        columns=("α", "accuracy, %", "format, %"),
    )


def _figure_5(study: StudyRecord) -> PaperFigure:
    rows = sorted(
        (row for row in study.fig5 if number(row.get("alpha")) is not None), key=lambda row: float(row["alpha"])
    )

    def panel(title: str, key: str) -> Chart | None:
        series = [
            Series(
                label=f"α {row['alpha']:g}",
                color=_ramp(index, len(rows)),
                points=curve_of(row.get(key)).points,
                smooth=True,
            )
            for index, row in enumerate(rows)
        ]
        return line_chart(title, series, left=REWARD)

    def has_data(row: Row) -> bool:
        return bool(curve_of(row.get("accuracy")).points or curve_of(row.get("format")).points)

    drawn = {row["alpha"] for row in rows if has_data(row)}
    same_runs = [value_of(row.get("accuracy")) for row in study.fig4 if number(row.get("alpha")) in drawn]
    return _figure(
        "Fig. 5",
        "Both rewards in training, geometry",
        "The paper draws these curves for the same values of α as in Fig. 4.",
        f"{_no_interval_note(_seeds_of_curves(study, same_runs))}; faint: single steps, bold: their moving average",
        [panel("Accuracy reward", "accuracy"), panel("Format reward", "format")],
        _missing_levels(rows, "α", "alpha", has_data),
    )


def _figure_6(study: StudyRecord) -> PaperFigure:
    return _figure(
        "Fig. 6",
        "A constant KL weight β, geometry",
        "In the paper accuracy rises with β at first, then falls.",
        seeds_note(value_of(row.get("accuracy")) for row in study.fig6),
        [_sweep("Accuracy", study.fig6, level="beta", key="accuracy", color=BLUE, levels="β")],
        _missing_levels(study.fig6, "β", "beta", lambda row: value_of(row.get("accuracy")) is not None),
        table=_level_table(study.fig6, "beta", ("accuracy",)),
        columns=("β", "accuracy, %"),
    )


def _figure(
    number: str,
    title: str,
    found: str,
    note: str,
    panels: Sequence[Chart | None],
    missing: Sequence[str],
    *,
    table: Sequence[tuple[float, Sequence[RecordedValue | None]]] = (),
    columns: Sequence[str] = (),
) -> PaperFigure:
    drawn = [panel for panel in panels if panel is not None]
    absent = f"no run done: {', '.join(missing)}" if missing and drawn else "" if drawn else "no run done"
    return PaperFigure(
        number=number,
        title=title,
        found=found,
        note=note if drawn else "",
        panels=drawn,
        missing=absent,
        table=table if drawn else (),
        columns=columns,
    )


def _sweep(title: str, rows: Sequence[Row], *, level: str, key: str, color: int, levels: str) -> Chart | None:
    """Chart one dot with its interval for each level that has a value."""
    found = _level_values(rows, level, key)
    series = Series(
        label=title.lower(),
        color=color,
        points=[(x, value.mean) for x, value in found],
        intervals=[(x, value.lo, value.hi) for x, value in found],
        dots=True,
    )
    return line_chart(title, [series], levels=levels, left=ACCURACY)


def _level_values(rows: Sequence[Row], level: str, key: str) -> list[tuple[float, RecordedValue]]:
    pairs = [(number(row.get(level)), value_of(row.get(key))) for row in rows]
    known = [(x, value) for x, value in pairs if x is not None and value is not None]
    return sorted(known, key=lambda pair: pair[0])


def _level_table(
    rows: Sequence[Row], level: str, keys: Sequence[str]
) -> list[tuple[float, list[RecordedValue | None]]]:
    """Return the values of a sweep as a table, one row per level."""
    return sorted(
        ((x, [value_of(row.get(key)) for key in keys]) for row in rows if (x := number(row.get(level))) is not None),
        key=lambda table_row: table_row[0],
    )


def _missing_levels(rows: Sequence[Row], symbol: str, level: str, has_data: Callable[[Row], bool]) -> list[str]:
    absent = [x for row in rows if (x := number(row.get(level))) is not None and not has_data(row)]
    return [f"{symbol} {x:g}" for x in sorted(absent)]


def _interval_note(seeds: Sequence[int], *, cut: bool) -> str:
    single_seed = "one seed, with its 95 % interval"
    counts = [count for count in seeds if count > 1]
    note = f"{_range(counts)} seeds: mean of the seeds, with its 95 % interval" if counts else single_seed
    if counts and len(counts) < len(seeds):
        note += f"; elsewhere {single_seed}"
    return note + (", cut at 0 and 100 %" if cut else "")


def _no_interval_note(seeds: Sequence[int]) -> str:
    return ("one seed" if max(seeds) == 1 else f"{_range(seeds)} seeds: mean over the seeds") + ", no interval"


def _seeds(value: RecordedValue) -> int:
    return max(1, len(value.by_seed))


def _seeds_of_curves(study: StudyRecord, same_runs: Iterable[RecordedValue | None]) -> list[int]:
    """Return the seed counts of curves, which do not record them.

    They are those of the runs' final values, or else the number of seeds of the study.
    """
    return [_seeds(value) for value in same_runs if value is not None] or [max(1, len(study.seeds))]


def _claim(study: StudyRecord, experiment: str, otherwise: str) -> str:
    """Return the paper's first claim about an experiment, as worded in study.json."""
    claims = [text(row, "claim") for row in study.claims if row.get("experiment") == experiment]
    return next((f"The paper: {claim}" for claim in claims if claim), otherwise)


def _ramp(index: int, count: int) -> int:
    return FIRST_OF_RAMP + round(index * (RAMP - 1) / max(1, count - 1))


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(most) if least == most else f"{least} to {most}"

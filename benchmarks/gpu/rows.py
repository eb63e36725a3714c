"""Rows of the check's results: one per setting of a part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Figures = Mapping[str, float | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting of a part, its state, and its figures or error."""

    setting: str
    state: Literal["ok", "failed", "skipped"] = "ok"
    figures: Figures = field(default_factory=dict)
    error: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


def failed(setting: str, error: BaseException) -> Row:
    """Return a failed row with the error's type and first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return Row(setting=setting, state="failed", error=f"{type(error).__name__}: {lines[0]}")


def check_limit(row: Row, figure: str, *, at_most: float = float("inf"), at_least: float = float("-inf")) -> Row:
    """Return the row, marked as failed if the figure is outside its limits."""
    value = float(row.figures[figure])
    if at_least <= value <= at_most:
        return row
    limit = f"at most {at_most:g}" if value > at_most or at_least == float("-inf") else f"at least {at_least:g}"
    return replace(row, state="failed", error=f"{figure} must be {limit}")


def measure_each(settings: Iterable[tuple[str, Callable[[], Figures]]]) -> Iterator[Row]:
    """Yield a row per setting; a failure is recorded and does not stop the others."""
    for setting, measure in settings:
        try:
            row = Row(setting=setting, figures=measure())
        except Exception as error:  # a driver, a kernel or a library may raise anything
            row = failed(setting, error)
        yield row

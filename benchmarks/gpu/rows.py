"""What a part of the check says: rows, each kept as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Figures = Mapping[str, float | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting of a part and what came out."""

    setting: str
    state: Literal["ok", "failed", "skipped"] = "ok"
    figures: Figures = field(default_factory=dict)
    error: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


def failed(setting: str, error: BaseException) -> Row:
    lines = str(error).strip().splitlines() or ["no message"]
    return Row(setting=setting, state="failed", error=f"{type(error).__name__}: {lines[0]}")


def judged(row: Row, figure: str, *, at_most: float = float("inf"), at_least: float = float("-inf")) -> Row:
    """As it was found; failed where the figure is not what was wanted."""
    found = float(row.figures[figure])
    if at_least <= found <= at_most:
        return row
    wanted = f"at most {at_most:g}" if found > at_most or at_least == float("-inf") else f"at least {at_least:g}"
    return replace(row, state="failed", error=f"{figure}: wanted {wanted}")


def each(settings: Iterable[tuple[str, Callable[[], Figures]]]) -> Iterator[Row]:
    """A row a setting; one that fails leaves the others."""
    for setting, measure in settings:
        try:
            row = Row(setting=setting, figures=measure())
        except Exception as error:  # whatever a driver, a kernel or a library may raise
            row = failed(setting, error)
        yield row

"""The check's results as a text table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = ("part", "setting", "", "figures")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with aligned columns; the last column holds the figures and the error."""
    lines = [_HEAD, *((row["part"], row["setting"], row["state"], _details(row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(word.ljust(width) for word, width in zip(line[:3], widths, strict=True)), line[3]]).rstrip()
        for line in lines
    )


def _details(row: Mapping[str, Any]) -> str:
    figures = [f"{name} {_format(value)}" for name, value in row["figures"].items()]
    return ", ".join([*figures, *([row["error"]] if row["error"] else [])])


def _format(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

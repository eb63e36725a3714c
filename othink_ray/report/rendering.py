"""Rendering shared by all pages: templates, formatting of dates, and the atomic write."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from othink_ray.atomic_write import atomic_write
from othink_ray.report.axes import short, signed
from othink_ray.report.charts import BOTTOM, HEIGHT, LEFT, TOP, WIDTH

_PACKAGE = "othink_ray.report"
PLOT = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "top": TOP, "bottom": HEIGHT - BOTTOM}


def write_page(
    folder: Path, template: str, *, styles: tuple[str, ...], package: str = _PACKAGE, **values: object
) -> Path:
    """Write the rendered template as the folder's report.html, atomically, and return its path.

    Templates and styles are files of `package`, or of `othink_ray.report`, which holds those that pages share.
    """
    style = "\n".join(_text(name, package) for name in styles)
    html = render(template, package=package, style=style, **values)
    path = folder / "report.html"
    atomic_write(path, html)
    return path


def render(template: str, *, package: str = _PACKAGE, **values: object) -> str:
    """Render a template; `plot` holds the chart geometry."""
    return _environment(package).get_template(template).render(plot=PLOT, **values)


def date(unix_seconds: float) -> str:
    """Format a date and time: 9 October 2025, 08:53 UTC."""
    return datetime.fromtimestamp(unix_seconds, tz=UTC).strftime("%-d %B %Y, %H:%M UTC")


def moment(unix_seconds: float) -> str:
    """Format a moment of a run: 9 Oct 08:53:07 UTC."""
    return datetime.fromtimestamp(unix_seconds, tz=UTC).strftime("%-d %b %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """Format a duration: 48 s, 6 min 12 s or 1 h 24 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes} min {remainder:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _environment(package: str) -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(partial(_text, package=package)),
    )
    environment.filters |= {"short": short, "signed": signed}
    return environment


def _text(name: str, package: str) -> str:
    found = [file for folder in (package, _PACKAGE) if (file := files(folder).joinpath(name)).is_file()]
    return found[0].read_text(encoding="utf-8")

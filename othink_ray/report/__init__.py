"""One self-contained HTML page about a run, made from nothing but the run's folder."""

from othink_ray.report.page import write_report

__all__ = ["write_report"]

"""Self-contained HTML pages of runs and evaluations, with charts and templates that other pages share."""

from othink_ray.report.evaluation import write_evaluation_report
from othink_ray.report.page import write_report

__all__ = ["write_evaluation_report", "write_report"]

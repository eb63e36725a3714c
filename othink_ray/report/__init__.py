"""Self-contained HTML pages of a run and of an evaluation, and the charts and templates that the study's page shares."""

from othink_ray.report.evaluation import write_evaluation_report
from othink_ray.report.page import write_report

__all__ = ["write_evaluation_report", "write_report"]

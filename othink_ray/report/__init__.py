"""Self-contained HTML pages: about a run, made from the run's folder, and about a study, made from its study.json."""

from othink_ray.report.evaluation import write_evaluation_report
from othink_ray.report.page import write_report

__all__ = ["write_evaluation_report", "write_report"]

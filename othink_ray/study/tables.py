"""The paper's tables and figures, computed from the finished runs for study.json, beside the paper's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from othink_ray.config.schema import StudyConfig
from othink_ray.study.plan import GR, METHODS, VC, baseline_beta, swept_seeds
from othink_ray.study.results import FinishedRun, SeedMean, held_out_curve, mean_curve, over_seeds

Row = dict[str, Any]

_REWARDS = ("accuracy", "format")

# The paper's numbers (arXiv 2503.16081v2), in percent.
# Table 1, test accuracy after training on the same task: (task, method) -> (2B, 7B)
TABLE_1 = {
    ("VC", "base"): (42.50, 76.00),
    ("VC", "grpo"): (64.50, 76.50),
    ("VC", "sft"): (68.50, 74.50),
    ("VC", "grpo_d"): (76.50, 78.00),
    ("GR", "base"): (15.52, 33.16),
    ("GR", "grpo"): (30.24, 42.04),
    ("GR", "sft"): (32.49, 43.50),
    ("GR", "grpo_d"): (34.35, 45.49),
}

# Fig. 7, 2B, trained on one task and tested on the other: (trained on, method, baseline) -> relative change
FIG_7 = {
    ("GR", "grpo_d", "base"): 63.53,
    ("GR", "grpo_d", "sft"): 61.63,
    ("VC", "grpo_d", "base"): 4.25,
    ("VC", "grpo_d", "sft"): 368.99,
    ("VC", "sft", "base"): -77.77,
}


class Tables:
    """Results of the finished runs by task, method and swept value."""

    def __init__(self, study: StudyConfig, finished: Sequence[FinishedRun]) -> None:
        self.study, self.finished = study, finished

    def runs(self, task: str, method: str, *, alpha: float = 1.0, beta: float | None = None) -> list[FinishedRun]:
        """Return the finished runs of all seeds; for GRPO without `beta`, with the KL weight of the baseline."""
        if method == "grpo" and beta is None:
            beta = baseline_beta(self.study.counting if task == VC else self.study.geometry)
        wanted = (task, method, alpha, beta)
        return [
            finished
            for finished in self.finished
            if (finished.run.task, finished.run.method, finished.run.alpha, finished.run.beta) == wanted
        ]

    def same_task(self, task: str, method: str) -> SeedMean | None:
        """Return the accuracy after training on the same task.

        For `base` it is the accuracy before any run on the task: all runs start from the same model.
        """
        if method == "base":
            return over_seeds(self._any_run_on(task), lambda finished: finished.trained_task("before"))
        return over_seeds(self.runs(task, method), lambda finished: finished.trained_task("after"))

    def cross_task(self, train: str, method: str) -> SeedMean | None:
        """Return the accuracy on the task that was not trained on."""
        if method == "base":
            return over_seeds(self._any_run_on(train), lambda finished: finished.other_task("before"))
        return over_seeds(self.runs(train, method), lambda finished: finished.other_task("after"))

    def of_alpha(self, alpha: float, name: str = "accuracy") -> SeedMean | None:
        """Return a metric after training with format reward weight `alpha`."""
        return over_seeds(self._swept(alpha=alpha), lambda finished: finished.trained_task("after", name))

    def of_beta(self, beta: float) -> SeedMean | None:
        """Return the accuracy after training with constant KL weight `beta`."""
        return over_seeds(self._swept(beta=beta), lambda finished: finished.trained_task("after"))

    def _any_run_on(self, task: str) -> list[FinishedRun]:
        return [finished for finished in self.finished if finished.run.task == task][:1]

    def _swept(self, *, alpha: float = 1.0, beta: float | None = None) -> list[FinishedRun]:
        """Return the runs of one swept value, limited to the seeds that every value of the sweep has."""
        seeds = swept_seeds(self.study)
        return [run for run in self.runs(GR, "grpo", alpha=alpha, beta=beta) if run.run.seed in seeds]

    def all(self) -> Row:
        """Return every table and figure of the study; those of experiments that it leaves out are empty lists."""
        chosen = self.study.experiments
        return {
            "table1": self._table_1() if "same_task" in chosen else [],
            "fig1": self._fig_1() if "curves" in chosen else [],
            "fig4": self._fig_4() if "alpha" in chosen else [],
            "fig5": self._fig_5() if "alpha" in chosen else [],
            "fig6": [{"beta": beta, "accuracy": _plain(self.of_beta(beta))} for beta in self.study.betas]
            if "beta" in chosen
            else [],
            "fig7": self._fig_7() if "cross_task" in chosen else [],
        }

    def _table_1(self) -> list[Row]:
        return [
            {
                "task": task,
                "method": method,
                "ours": _plain(self.same_task(task, method)),
                "paper": TABLE_1[task, method][0],
                "paper_7b": TABLE_1[task, method][1],
            }
            for task in (VC, GR)
            for method in ("base", *METHODS)
        ]

    def _fig_1(self) -> list[Row]:
        return [{"method": method, "points": held_out_curve(self.runs(GR, method))} for method in ("sft", "grpo")]

    def _fig_4(self) -> list[Row]:
        return [
            {
                "alpha": alpha,
                "accuracy": _plain(self.of_alpha(alpha)),
                "format": _plain(self.of_alpha(alpha, "format")),
            }
            for alpha in self.study.alphas
        ]

    def _fig_5(self) -> list[Row]:
        rows = []
        for alpha in self.study.alphas:
            runs = self._swept(alpha=alpha)
            rows.append({"alpha": alpha, **{name: mean_curve(runs, f"reward/{name}") for name in _REWARDS}})
        return rows

    def _fig_7(self) -> list[Row]:
        rows = []
        for train, test in ((GR, VC), (VC, GR)):
            base, sft = self.cross_task(train, "base"), self.cross_task(train, "sft")
            for method in METHODS:
                ours = self.cross_task(train, method)
                rows.append(
                    {
                        "train": train,
                        "test": test,
                        "method": method,
                        "accuracy": _plain(ours),
                        "base": _plain(base),
                        "over_base": relative(ours, base),
                        "over_sft": relative(ours, sft) if method != "sft" else None,
                        "paper_over_base": FIG_7.get((train, method, "base")),
                        "paper_over_sft": FIG_7.get((train, method, "sft")),
                    }
                )
        return rows


def relative(ours: SeedMean | None, other: SeedMean | None) -> float | None:
    """Return the relative change of the mean; None if either value is missing or the other mean is 0."""
    if ours is None or other is None or other.mean == 0:
        return None
    return ours.mean / other.mean - 1


def _plain(value: SeedMean | None) -> Row | None:
    return None if value is None else asdict(value)

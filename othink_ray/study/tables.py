"""The paper's tables and figures from the runs that are done: plain values, as study.json holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from othink_ray.config.schema import StudyConfig
from othink_ray.study.paper_numbers import FIG_7, TABLE_1
from othink_ray.study.plan import GR, METHODS, VC, own_beta, swept_seeds
from othink_ray.study.results import FinishedRun, Value, held_out_curve, mean_curve, over_seeds

Row = dict[str, Any]


class Tables:
    """What is asked of the finished runs, by task, method and swept value."""

    def __init__(self, study: StudyConfig, done: Sequence[FinishedRun]) -> None:
        self.study, self.done = study, done

    def runs(self, task: str, method: str, *, alpha: float = 1.0, beta: float | None = None) -> list[FinishedRun]:
        """Of all seeds; a constant KL weight that is not given is the baseline's own."""
        if method == "grpo" and beta is None:
            beta = own_beta(self.study.counting if task == VC else self.study.geometry)
        wanted = (task, method, alpha, beta)
        return [one for one in self.done if (one.run.task, one.run.method, one.run.alpha, one.run.beta) == wanted]

    def same_task(self, task: str, method: str) -> Value | None:
        """Accuracy after training on the task itself; that of the base model is the same before every run."""
        if method == "base":
            return over_seeds([one for one in self.done if one.run.task == task][:1], lambda one: one.own("before"))
        return over_seeds(self.runs(task, method), lambda one: one.own("after"))

    def cross_task(self, train: str, method: str) -> Value | None:
        """Accuracy on the other task than the one trained on."""
        if method == "base":
            return over_seeds([one for one in self.done if one.run.task == train][:1], lambda one: one.other("before"))
        return over_seeds(self.runs(train, method), lambda one: one.other("after"))

    def of_alpha(self, alpha: float, name: str = "accuracy") -> Value | None:
        return over_seeds(self._swept(alpha=alpha), lambda one: one.own("after", name))

    def of_beta(self, beta: float) -> Value | None:
        return over_seeds(self._swept(beta=beta), lambda one: one.own("after"))

    def _swept(self, *, alpha: float = 1.0, beta: float | None = None) -> list[FinishedRun]:
        """The seeds that every value of a sweep has."""
        return [one for one in self.runs(GR, "grpo", alpha=alpha, beta=beta) if one.run.seed in swept_seeds(self.study)]

    def all(self) -> Row:
        """Every table and figure of the experiments that are part of the study."""
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


_REWARDS = ("accuracy", "format")


def relative(ours: Value | None, other: Value | None) -> float | None:
    """The relative change of a mean; None where there is nothing to compare with."""
    if ours is None or other is None or other.mean == 0:
        return None
    return ours.mean / other.mean - 1


def _plain(value: Value | None) -> Row | None:
    return None if value is None else asdict(value)

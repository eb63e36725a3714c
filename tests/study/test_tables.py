"""Tables, figures and verdicts computed from synthetic runs with known numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from othink_ray.config.load import load
from othink_ray.core.intervals import wilson
from othink_ray.study.claims import HELD, NOT_HELD, NOT_RUN, OPEN, claims
from othink_ray.study.page import write_study_report
from othink_ray.study.plan import GR, VC, StudyRun, planned
from othink_ray.study.results import FinishedRun, read_finished_run
from othink_ray.study.tables import Tables, relative

STUDY = load([]).study
QUESTIONS = 20_000


def evaluation(accuracy: float) -> dict[str, float]:
    lo, hi = wilson(accuracy * QUESTIONS, QUESTIONS)
    return {"accuracy": accuracy, "lo": lo, "hi": hi, "format": 0.9, "n": QUESTIONS, "tokens_mean": 20.0}


def finished_run(folder: Path, run: StudyRun, trained_task: float, other_task: float) -> FinishedRun:
    """Write the files of a finished run with these accuracies and read them back."""
    folder.mkdir()
    also = {"the other": {"before": evaluation(0.2), "after": evaluation(other_task)}}
    summary = {"steps": 2, "before": evaluation(0.4), "after": evaluation(trained_task), "also": also}
    lines = [
        {"step": 0, "reward/accuracy": 0.1, "reward/format": 0.5, "eval/accuracy": None},
        {"step": 1, "reward/accuracy": trained_task, "reward/format": 1.0, "eval/accuracy": trained_task},
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_finished_run(folder, run)


Score = Callable[[StudyRun], tuple[float, float]]


@pytest.fixture
def tables_of(tmp_path: Path) -> Callable[[Score], Tables]:
    def make(score: Score) -> Tables:
        runs = planned(STUDY, [])
        return Tables(STUDY, [finished_run(tmp_path / run.name, run, *score(run)) for run in runs])

    return make


def as_in_the_paper(run: StudyRun) -> tuple[float, float]:
    """Return (trained task, other task) accuracies: GRPO-D above SFT above GRPO by five points each.

    Every method has the same spread over seeds; SFT forgets the other task.
    """
    seed_offset = 0.01 * run.seed
    if run.method == "grpo" and (run.alpha != 1 or run.beta not in (0.01, 0.04)):
        assert run.beta is not None
        return 0.3 + 0.2 * run.alpha - 60 * (run.beta - 0.02) ** 2 * 4, 0.2
    level = {"grpo": 0.5, "sft": 0.55, "grpo_d": 0.6}[run.method]
    return level + seed_offset, {"grpo": 0.25, "sft": 0.05, "grpo_d": 0.3}[run.method] + seed_offset


def verdicts(tables: Tables, experiment: str) -> list[str]:
    return [claim["verdict"] for claim in claims(tables) if claim["experiment"] == experiment]


def test_table_1_has_every_method_and_the_papers_numbers(tables_of: Callable[[Score], Tables]) -> None:
    rows = tables_of(as_in_the_paper).all()["table1"]
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method) for task in (VC, GR) for method in ("base", "grpo", "sft", "grpo_d")
    ]
    found = {(row["task"], row["method"]): row for row in rows}
    assert found[VC, "grpo_d"]["ours"]["mean"] == pytest.approx(0.61)
    assert found[VC, "grpo_d"]["ours"]["values"] == pytest.approx((0.6, 0.61, 0.62))
    assert found[GR, "base"]["ours"]["mean"] == 0.4
    assert (found[VC, "grpo_d"]["paper"], found[GR, "sft"]["paper_7b"]) == (76.5, 43.5)


def test_a_claim_holds_if_the_difference_interval_is_above_0(tables_of: Callable[[Score], Tables]) -> None:
    tables = tables_of(as_in_the_paper)
    assert verdicts(tables, "RQ2") == [HELD] * 6
    assert verdicts(tables, "RQ3") == [HELD] * 5


def test_a_claim_fails_if_the_difference_interval_is_below_0(tables_of: Callable[[Score], Tables]) -> None:
    def reversed_order(run: StudyRun) -> tuple[float, float]:
        trained_task, other_task = as_in_the_paper(run)
        return 0.9 - trained_task, 0.5 - other_task if run.method == "grpo_d" else 0.45

    tables = tables_of(reversed_order)
    assert verdicts(tables, "RQ2") == [NOT_HELD] * 6
    assert verdicts(tables, "RQ3")[1] == NOT_HELD


def test_seeds_that_disagree_leave_a_claim_unsettled(tables_of: Callable[[Score], Tables]) -> None:
    def noisy(run: StudyRun) -> tuple[float, float]:
        return 0.4 + (0.3 if (run.seed + len(run.method)) % 3 == 0 else 0.0), 0.2

    assert verdicts(tables_of(noisy), "RQ2") == [OPEN] * 6


def test_claims_without_runs_are_marked_and_the_page_is_written(tmp_path: Path) -> None:
    tables = Tables(STUDY, [])
    assert {claim["verdict"] for claim in claims(tables)} == {NOT_RUN}
    (tmp_path / "study.json").write_text(json.dumps(study_json(tables)))
    assert "not run" in write_study_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("at_zero", "peak", "at_end", "verdict"),
    [(0.2, 0.6, 0.2, HELD), (0.8, 0.5, 0.2, NOT_HELD), (0.5, 0.502, 0.5, OPEN)],
    ids=["peak inside", "falls from the start", "flat"],
)
def test_a_rise_and_fall_needs_a_peak_above_both_ends(
    tables_of: Callable[[Score], Tables], at_zero: float, peak: float, at_end: float, verdict: str
) -> None:
    def swept(run: StudyRun) -> tuple[float, float]:
        return {0.0: at_zero, 0.02: peak, 0.05: at_end}.get(run.beta or 0.0, (at_zero + at_end) / 2), 0.2

    assert verdicts(tables_of(swept), "RQ1b") == [verdict]


@pytest.mark.parametrize(("with_format", "verdict"), [(0.8, HELD), (0.2, NOT_HELD), (0.5, OPEN)])
def test_the_format_reward_helps_if_alpha_1_beats_alpha_0(
    tables_of: Callable[[Score], Tables], with_format: float, verdict: str
) -> None:
    tables = tables_of(lambda run: (with_format if run.alpha == 1 else 0.5, 0.2))
    assert verdicts(tables, "RQ1a") == [verdict]


def test_a_claim_has_a_sentence_with_verdict_and_numbers(tables_of: Callable[[Score], Tables]) -> None:
    first = next(claim for claim in claims(tables_of(as_in_the_paper)) if claim["experiment"] == "RQ2")
    assert first["ours"].startswith("It held here: 61.0 % against 40.0 %, +21.0 points (95 % interval ")
    assert first["ours"].endswith("3 seeds)")


def test_sweeps_produce_figures_4_to_6(tables_of: Callable[[Score], Tables]) -> None:
    tables = tables_of(as_in_the_paper)
    figures = tables.all()
    assert [row["alpha"] for row in figures["fig4"]] == list(STUDY.alphas)
    assert all(len(row["accuracy"]["values"]) == STUDY.sweep_seeds for row in figures["fig4"])
    assert figures["fig5"][0]["format"] == [(1, 0.5), (2, 1.0)]
    assert [row["beta"] for row in figures["fig6"]] == list(STUDY.betas)


def test_figure_1_has_sft_and_grpo_from_the_base_model_on(tables_of: Callable[[Score], Tables]) -> None:
    [sft, grpo] = tables_of(as_in_the_paper).all()["fig1"]
    assert (sft["method"], grpo["method"]) == ("sft", "grpo")
    assert [point[0] for point in sft["points"]] == [0, 2]
    assert sft["points"][0][1] == pytest.approx(0.4)
    assert sft["points"][1][1] == pytest.approx(0.56)


def test_figure_7_is_the_relative_change_on_the_other_task(tables_of: Callable[[Score], Tables]) -> None:
    rows = tables_of(as_in_the_paper).all()["fig7"]
    [row] = [row for row in rows if (row["train"], row["method"]) == (GR, "grpo_d")]
    assert row["over_base"] == pytest.approx(0.31 / 0.2 - 1)
    assert row["over_sft"] == pytest.approx(0.31 / 0.06 - 1)
    assert (row["paper_over_base"], row["paper_over_sft"]) == (63.53, 61.63)
    assert relative(None, None) is None


def test_a_study_of_one_experiment_has_only_its_figures(tables_of: Callable[[Score], Tables]) -> None:
    all_experiments = tables_of(as_in_the_paper)
    beta_only = Tables(replace(STUDY, experiments=("beta",)), all_experiments.finished)
    assert [name for name, rows in beta_only.all().items() if rows] == ["fig6"]
    assert {claim["experiment"] for claim in claims(beta_only)} == {"RQ1b"}


def test_the_page_renders_the_computed_tables(tables_of: Callable[[Score], Tables], tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps(study_json(tables_of(as_in_the_paper))))
    page = write_study_report(tmp_path).read_text()
    assert "no run done" not in page
    assert page.count("GRPO-D is better than") == 10


def study_json(tables: Tables) -> dict[str, Any]:
    """Return study.json as a study writes it, with a single run."""
    run = {"name": "GR-grpo-seed0", "status": "done", "reason": None, "seconds": 9.0, "folder": "runs/GR-grpo-seed0"}
    run |= {"command": "python", "experiments": ["beta"], "accuracy": 0.5, "has_report": False}
    return {
        "name": "paper",
        "size": "full",
        "finished": True,
        "seconds": 1.0,
        "command": "python -m othink_ray.main mode=study",
        "model": "tiny",
        "seeds": [0, 1, 2],
        "steps": 2,
        "questions": QUESTIONS,
        "tasks": {"VC": "counting", "GR": "geometry"},
        "runs": [run],
        **tables.all(),
        "claims": claims(tables),
    }

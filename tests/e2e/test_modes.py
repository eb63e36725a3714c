"""SFT, evaluation and a study through the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.conftest import Run, StartRun

STUDY = (
    *("mode=study", "study=beta", "study.betas=[0.02]", "study.size=small"),
    *("study.geometry.data=counting", "study.counting.data=both", "train.steps=2", "rollout=hf"),
)


@pytest.fixture(scope="module")
def sft_run(start_run: StartRun) -> Run:
    """SFT of an untrained model on both tasks, evaluated by the plain engine."""
    return start_run(
        "mode=sft",
        "rollout=hf",
        "data=both",
        "model.tiny.warm_steps=0",
        "train.steps=6",
        "train.prompts_per_step=32",
        "learner.lr=2e-3",
        "learner.lr_schedule=linear",
        "eval.also=[counting]",
        "eval.every=3",
    )


def test_supervised_training_is_logged_by_its_loss(sft_run: Run) -> None:
    losses = [line["loss"] for line in sft_run.steps]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    assert not any(name.startswith(("reward/", "kl/", "ratio/")) for line in sft_run.steps for name in line)
    rates = [line["lr"] for line in sft_run.steps]
    assert rates == pytest.approx([2e-3 * (1 - step / 6) for step in range(6)])


def test_it_is_evaluated_saved_and_exported_like_any_run(sft_run: Run) -> None:
    assert sft_run.summary["mode"] == "sft"
    assert set(sft_run.summary["also"]) == {"counting"}
    assert [line["step"] for line in sft_run.steps if "eval/accuracy/counting" in line] == [2, 5]
    for name in ("report.html", "export/config.json", "checkpoints/step_6/state.json"):
        assert (sft_run.folder / name).is_file()


@pytest.fixture(scope="module")
def evaluated(plain_run: Run, sft_run: Run, start_run: StartRun) -> Run:
    models = f"eval.models=[{plain_run.folder},{sft_run.folder}]"
    return start_run("mode=eval", models, "eval.samples=2", "data=counting")


def cells(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run.folder / "evaluation.json").read_text())["results"]
    return found


def test_evaluation_of_a_run_gives_its_final_accuracy(evaluated: Run, plain_run: Run) -> None:
    [first, second] = cells(evaluated)
    assert (first["model"], first["data"]) == (str(plain_run.folder), "counting")
    assert {name: first[name] for name in ("accuracy", "format", "n", "tokens_mean")} == {
        name: plain_run.summary["after"][name] for name in ("accuracy", "format", "n", "tokens_mean")
    }
    assert first["mean_at"]["2"] == pytest.approx(first["pass_at"]["1"])
    assert 0 <= first["pass_at"]["1"] <= first["pass_at"]["2"] <= 1
    assert second["n"] == 16


def test_every_question_is_a_line_with_its_answers(evaluated: Run) -> None:
    for cell in cells(evaluated):
        _, *lines = (evaluated.folder / cell["answers"]).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len({row["id"] for row in rows}) == 16
        assert all(len(row["sampled"]) == 2 and row["question"] and row["answer"] for row in rows)
        assert sum(row["greedy"]["accuracy"] for row in rows) / 16 == cell["accuracy"]
    page = (evaluated.folder / "report.html").read_text()
    assert all(cell["model"] in page for cell in cells(evaluated))


@pytest.mark.slow
def test_an_evaluation_resumes_where_it_stopped(evaluated: Run, start_run: StartRun) -> None:
    file = evaluated.folder / cells(evaluated)[0]["answers"]
    whole = file.read_text()
    file.write_text(whole[: whole.rindex("{") + 40])  # the last line is torn
    before = cells(evaluated)
    again = start_run(
        "mode=eval",
        f"eval.models=[{','.join(cell['model'] for cell in before)}]",
        "eval.samples=2",
        "data=counting",
        "run.resume=auto",
        folder=evaluated.folder,
    )
    assert "evaluating 1 questions of counting" in again.screen and "evaluating 16" not in again.screen
    assert cells(again) == before
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())


@pytest.fixture(scope="module")
def study(plain_run: Run, start_run: StartRun) -> Run:
    """Study of one run of two steps, with the plain engine, in a separate process."""
    return start_run(*STUDY, f"model.path={plain_run.folder}")


@pytest.mark.slow
def test_a_study_does_each_run_once_and_shows_it(study: Run, plain_run: Run, start_run: StartRun) -> None:
    found = json.loads((study.folder / "study.json").read_text())
    assert found["finished"] and [run["status"] for run in found["runs"]] == ["done"]
    assert all(0 <= row["accuracy"]["mean"] <= 1 for row in found["fig6"])
    assert study.screen.count(": done in") == 1 and (study.folder / "report.html").is_file()
    again = start_run(*STUDY, f"model.path={plain_run.folder}", folder=study.folder)
    assert ": done in" not in again.screen
    assert json.loads((study.folder / "study.json").read_text())["fig6"] == found["fig6"]


@pytest.mark.slow
def test_the_plain_engine_samples_from_the_same_policy(study: Run) -> None:
    [run] = (Run(folder=folder, screen="") for folder in (study.folder / "runs").iterdir())
    assert len(run.steps) == 2
    assert all(line["audit/logp_gap_mean"] < 1e-4 for line in run.steps)
    assert all(line["sampler/logp_gap_max"] < 1e-3 for line in run.steps)

"""Path resolution: in a Ray job, inputs are searched in the job's folder first, and outputs go to the home folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from othink_ray.command_line import _prepare_study
from othink_ray.config import paths
from othink_ray.config.load import load


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a run of an earlier job in it."""
    (tmp_path / "home" / "runs" / "a").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def job(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ray's copy of a job's working directory, with a data file in it."""
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    (copy / "data").mkdir(parents=True)
    (copy / "data" / "own.jsonl").touch()
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize("path", ["runs/a", "/disk/a", "data/*.jsonl"])
def test_outside_a_job_paths_are_unchanged(
    path: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths.input_path(path) == paths.output_path(path) == path
    assert paths.input_path("~/a") == paths.output_path("~/a") == str(home / "a")


def test_output_of_a_job_goes_to_the_home_folder(job: Path, home: Path) -> None:
    assert paths.output_path("runs/first") == str(home / "runs/first")
    assert paths.output_path("/disk/first") == "/disk/first"


@pytest.mark.parametrize("path", ["data/own.jsonl", "data", "data/*.jsonl", "/disk/a", "owner/name", ""])
def test_files_of_a_job_and_hub_names_are_unchanged(path: str, job: Path) -> None:
    assert paths.input_path(path) == path


@pytest.mark.parametrize("path", ["runs/a", "runs/nothing", "runs/*"])
def test_output_of_an_earlier_job_is_found(path: str, job: Path, home: Path) -> None:
    assert paths.input_path(path) == str(home / path)


def test_all_paths_of_a_configuration_are_resolved(job: Path, home: Path) -> None:
    config = load(
        [
            *("data=custom", "data.train.files.path=data/own.jsonl", "data.train.files.image_root=runs/a"),
            *("model.path=runs/a", "eval.models=[runs/a]", "run.dir=runs/b", "run.resume=runs/a", "run.cache_dir=kept"),
        ]
    )
    assert config.data.train.files is not None
    assert (config.data.train.files.path, config.data.train.files.image_root) == (
        "data/own.jsonl",
        str(home / "runs/a"),
    )
    assert config.model.path == config.run.resume == config.eval.models[0] == str(home / "runs/a")
    assert (config.run.dir, config.run.cache_dir) == (str(home / "runs/b"), str(home / "kept"))
    assert load(["run.resume=auto"]).run.resume == "auto"


def test_a_study_without_run_dir_goes_to_the_home_folder(job: Path, home: Path) -> None:
    overrides = ["mode=study", "study=beta"]
    config, found = _prepare_study(load(overrides), overrides)
    assert not found
    assert config.run.dir == str(home / "runs/study_beta_full")

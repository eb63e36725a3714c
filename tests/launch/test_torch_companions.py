"""torchvision and its users can be imported here, whichever builds of torch's companion packages are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *flags: str, folder: Path = ROOT) -> str:
    """Run code in a fresh interpreter of this environment; return its output."""
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_without_pth_files(code: str) -> str:
    """Run code without .pth files, so that neither set-up's copy nor an installed package helps."""
    paths = [str(ROOT), str(Path(shutil.__file__).parent), *sys.path]
    return run(f"import sys; sys.path[:0] = {paths!r}\n{code}", "-S")


def test_torchvision_imports_once_othink_ray_is_imported() -> None:
    code = "import othink_ray, torch, torchvision; print(hasattr(torch.ops.torchvision, 'nms'))"
    assert run_without_pth_files(code) == "True"


def test_operators_are_declared_once() -> None:
    code = (
        "from othink_ray.torch_companions import declare_if_missing\n"
        "first, second = declare_if_missing(), declare_if_missing()\n"
        "import torch, torchvision\n"
        "print(first and second, hasattr(torch.ops.torchvision, 'nms'), declare_if_missing())"
    )
    assert run_without_pth_files(code) == "False True False"


@pytest.mark.parametrize("broken", ["torchaudio", "torchcodec"])
def test_a_companion_that_does_not_load_looks_absent(broken: str, tmp_path: Path) -> None:
    (tmp_path / broken).mkdir()
    (tmp_path / broken / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import othink_ray, transformers.audio_utils\n"
        f"from importlib.util import find_spec; print(find_spec({broken!r}))"
    )
    assert run(code) == "None"


def test_a_companion_that_loads_stays(tmp_path: Path) -> None:
    (tmp_path / "torchaudio.py").touch()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import othink_ray, transformers\n"
        "from importlib.util import find_spec; print(find_spec('torchaudio').name)"
    )
    assert run(code) == "torchaudio"


def test_a_copy_works_without_the_package_and_imports_lightly(tmp_path: Path) -> None:
    shutil.copy(ROOT / "othink_ray" / "torch_companions.py", tmp_path / "copied_companions.py")
    code = (
        "import sys, copied_companions; copied_companions.install(); copied_companions.install()\n"
        "from importlib.util import find_spec\n"
        "found = find_spec('torchvision') is not None\n"
        "finders = [it.__name__ for it in sys.meta_path if getattr(it, '__module__', '') == 'copied_companions']\n"
        "print(found, finders, sorted(name for name in ('torch', 'torchvision', 'othink_ray') if name in sys.modules))"
    )
    assert run(code, "-S", folder=tmp_path) == "False ['CompanionFinder'] []"


def test_other_packages_and_absent_ones_are_left_alone() -> None:
    code = (
        "import sys; from othink_ray.torch_companions import CompanionFinder\n"
        "sys.path[:] = []\n"
        "print(CompanionFinder.find_spec('json'), CompanionFinder.find_spec('torchvision'))"
    )
    assert run(code) == "None None"

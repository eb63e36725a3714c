"""torchvision and what needs it import in this environment, whichever torchvision build was to be had."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *flags: str) -> str:
    """Output of a fresh interpreter in this environment."""
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_imports_after_the_declaration_alone() -> None:
    # -S leaves .pth files out, so neither the hook nor an installed package helps.
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(shutil.__file__).parent)!r}, *{sys.path!r}]\n"
        "from othink_ray.torchvision_ops import declare_if_missing\n"
        "first, second = declare_if_missing(), declare_if_missing()\n"
        "import torch, torchvision\n"
        "print(first and second, hasattr(torch.ops.torchvision, 'nms'), declare_if_missing())"
    )
    assert run(code, "-S") == "False True False"


def test_the_hook_loads_nothing_until_torchvision_is_imported() -> None:
    code = (
        "import sys; sys.path.insert(0, 'launch'); before = set(sys.modules)\n"
        "import torchvision_hook\n"
        "from importlib.util import find_spec\n"
        "found = find_spec('torchvision') is not None\n"
        "print(found, sorted(name for name in ('torch', 'torchvision', 'othink_ray') if name in sys.modules))"
    )
    assert run(code) == "True []"


def test_the_hook_leaves_other_packages_and_absent_ones_alone() -> None:
    code = (
        "import importlib.machinery, sys; sys.path.insert(0, 'launch')\n"
        "from torchvision_hook import TorchvisionFinder\n"
        "sys.path[:] = []\n"
        "print(TorchvisionFinder.find_spec('json'), TorchvisionFinder.find_spec('torchvision'))"
    )
    assert run(code) == "None None"

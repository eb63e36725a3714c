"""Import hook that lets a CPU torch coexist with CUDA builds of torchvision, torchaudio and torchcodec.

PyPI has only CUDA builds of them. The module is self-contained: set-up also copies it into the environment, where a
.pth file installs it at every interpreter start, so it imports nothing heavy before one of these packages is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# Nothing here needs the optional packages, but the importers load them wherever they are installed.
_OPTIONAL = ("torchaudio", "torchcodec")
_IMPORTERS = ("transformers", "vllm", "datasets")
# torchvision's import attaches fake kernels to these operators, even if its extension failed to define them.
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
# The schemas live as long as their Library object.
_libraries: list[object] = []


class CompanionFinder:
    """Meta path finder that runs the workarounds just before the affected packages are imported."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in _IMPORTERS:
            hide_broken()
        return _declaring_spec() if name == "torchvision" else None


def install() -> None:
    """Install the import hook; call it before transformers, torchvision or vLLM is imported."""
    if not any(getattr(finder, "__name__", "") == CompanionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, CompanionFinder)


def hide_broken() -> None:
    """Make torchaudio and torchcodec look absent if they do not load with a CPU torch."""
    for name in _OPTIONAL:
        if name in sys.modules or PathFinder.find_spec(name) is None or not _torch_is_for_cpu():
            continue
        try:
            import_module(name)
        except Exception:  # an extension built for another torch may raise anything
            sys.modules[name] = None  # type: ignore[assignment]  # None makes `import` raise ModuleNotFoundError


def declare_if_missing() -> bool:
    """Declare torchvision's operators if its extension cannot load with a CPU torch; return whether this call did.

    Call it before the first `import torchvision`. It does nothing if torchvision matches torch, is absent or is loaded.
    """
    if "torchvision" in sys.modules and not _is_being_imported("torchvision"):
        return False
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None or not _torch_is_for_cpu():
        return False
    if any(_loads(Path(folder)) for folder in spec.submodule_search_locations):
        return False
    import torch

    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + _SCHEMA)
    _libraries.append(library)
    return True


def _declaring_spec() -> ModuleSpec | None:
    """Return torchvision's spec, with a loader that declares the missing operators before it runs the module."""
    spec = PathFinder.find_spec("torchvision")
    if spec is not None and spec.loader is not None:
        run_module = spec.loader.exec_module

        def declare_then_run(module: ModuleType) -> None:
            declare_if_missing()
            run_module(module)

        spec.loader.exec_module = declare_then_run  # type: ignore[method-assign]
    return spec


def _torch_is_for_cpu() -> bool:
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def _is_being_imported(name: str) -> bool:
    spec = sys.modules[name].__spec__
    return bool(getattr(spec, "_initializing", False))


def _loads(folder: Path) -> bool:
    """Return whether torchvision's compiled extension in this folder loads; loading it twice is harmless."""
    import torch

    for suffix in EXTENSION_SUFFIXES:
        extension = folder / f"_C{suffix}"
        if extension.exists():
            try:
                torch.ops.load_library(str(extension))
            except (ImportError, OSError):
                return False
            return True
    return False

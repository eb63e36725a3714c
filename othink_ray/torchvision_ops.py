"""Makes torchvision importable beside a CPU torch when only its CUDA build could be had (PyPI ships no other)."""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

# While torchvision is imported it attaches fake kernels to these two, even where its extension could not define them.
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
# The schemas live as long as their Library object.
_KEPT_ALIVE: list[object] = []


def declare_if_missing() -> bool:
    """Declare torchvision's operators if its extension cannot load beside a CPU torch; True when this call did it.

    Call it before the first `import torchvision`. It does nothing where torchvision fits torch, is absent or loaded.
    """
    if "torchvision" in sys.modules and not _is_being_imported("torchvision"):
        return False
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        return False
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    if any(_loads(Path(folder)) for folder in spec.submodule_search_locations):
        return False
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + _SCHEMA)
    _KEPT_ALIVE.append(library)
    return True


def _is_being_imported(name: str) -> bool:
    spec = sys.modules[name].__spec__
    return bool(getattr(spec, "_initializing", False))


def _loads(folder: Path) -> bool:
    """Whether torchvision's compiled extension in this folder loads; loading it twice is harmless."""
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

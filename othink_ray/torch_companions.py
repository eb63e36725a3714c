"""Makes torch's companions harmless beside a CPU torch when only their CUDA builds could be had (PyPI has no others).

It stands alone: set-up also copies it into the environment, where a .pth file installs it at every interpreter start.
So it imports nothing heavy before one of its packages is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# Nothing here needs these two, but these three import them wherever they are.
_NOT_NEEDED = ("torchaudio", "torchcodec")
_IMPORT_THEM = ("transformers", "vllm", "datasets")
# While torchvision is imported it attaches fake kernels to these two, even where its extension could not define them.
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")
# The schemas live as long as their Library object.
_KEPT_ALIVE: list[object] = []


class CompanionFinder:
    """Finds nothing itself: it acts just before one of these packages runs."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in _IMPORT_THEM:
            hide_unfit()
        return _declaring_spec() if name == "torchvision" else None


def install() -> None:
    """From now on this process can import transformers, torchvision and vLLM; called before any of them is."""
    if not any(getattr(finder, "__name__", "") == CompanionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, CompanionFinder)


def hide_unfit() -> None:
    """Make torchaudio and torchcodec look absent where they do not load beside a CPU torch."""
    for name in _NOT_NEEDED:
        if name in sys.modules or PathFinder.find_spec(name) is None or not _torch_is_for_cpu():
            continue
        try:
            import_module(name)
        except Exception:  # a compiled part built for another torch raises almost anything
            sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of what is not to be found


def declare_if_missing() -> bool:
    """Declare torchvision's operators if its extension cannot load beside a CPU torch; True when this call did it.

    Call it before the first `import torchvision`. It does nothing where torchvision fits torch, is absent or loaded.
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
    _KEPT_ALIVE.append(library)
    return True


def _declaring_spec() -> ModuleSpec | None:
    """torchvision's own spec, whose code runs after its missing operators are declared."""
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

"""Prints which of torch's companions are installed but cannot be imported beside this torch; called by setup_env.sh."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def imports(name: str) -> bool:
    """Whether the package imports; a compiled part built for another torch raises almost anything."""
    try:
        import_module(name)
    except Exception:
        return False
    return True


if __name__ == "__main__":
    import torch  # noqa: F401  (without it they could not load either)

    print(*(name for name in COMPANIONS if find_spec(name) and not imports(name)))

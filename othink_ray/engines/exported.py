"""A run's export: how it takes its place, and how engines open that of a run with adapters in bfloat16.

These take the base model with the adapter unmerged. The export itself is merged in float32; cast to bfloat16 most of
what was trained would round away.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from othink_ray.config.model_rules import ADAPTER_FOLDER, adapter_settings, merged_in_float32
from othink_ray.engines.base import ServedAdapters

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The folder or hub name of the base model, and what a push of the adapter to an engine of it brings."""

    base: str
    adapters: ServedAdapters
    factors: Sequence[tuple[str, Tensor]]


def replace_export(folder: Path, aside: Path) -> None:
    """Move an export that is complete from `aside`, inside `folder`, to its place, and remove the earlier one there.

    `config.json`, without which nothing opens the folder as a model, is removed first and arrives last. Weight files
    are removed and not written over: a learner that started from them may still have them mapped.
    """
    (folder / _CONFIG).unlink(missing_ok=True)
    for weights in folder.glob("*.safetensors*"):  # the index, too
        weights.unlink()
    shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
    for file in sorted(aside.iterdir(), key=lambda file: file.name == _CONFIG):
        if file.is_dir():
            shutil.rmtree(folder / file.name, ignore_errors=True)
        file.replace(folder / file.name)
    aside.rmdir()


def read_exported(path: str, dtype: str) -> Exported | None:
    """None where `path` as it is, loaded in `dtype`, is the exact policy."""
    if not merged_in_float32(path, dtype):
        return None
    folder = Path(path) / ADAPTER_FOLDER
    settings = adapter_settings(path)
    scale = settings["lora_alpha"] / settings["r"]
    factors, layers = [], []
    for name, factor in load_file(folder / "adapter_model.safetensors").items():
        layer, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
        factors.append((f"{layer}.lora_{kind}", factor * scale if kind == "B.weight" else factor))
        if kind == "B.weight":
            layers.append(layer)  # the settings have peft's abbreviations of these
    return Exported(
        base=settings["base_model_name_or_path"],
        adapters=ServedAdapters(rank=settings["r"], layers=tuple(layers)),
        factors=factors,
    )

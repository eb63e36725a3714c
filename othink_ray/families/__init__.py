"""Model families, by the name that `model.family` gives."""

from __future__ import annotations

from collections.abc import Callable

from othink_ray.config.schema import ModelConfig
from othink_ray.families.base import Family
from othink_ray.families.qwen3_vl import Qwen3VL
from othink_ray.families.qwen_vl import QwenVL

FAMILIES: dict[str, Callable[..., Family]] = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": Qwen3VL,
}


class ModelError(ValueError):
    """A folder or hub name that holds no model of the family, or cannot be reached."""


def open_family(model: ModelConfig, path: str) -> Family:
    """The family of `model`, bound to the folder or hub name `path`."""
    try:
        return FAMILIES[model.family](path, min_pixels=model.min_pixels, max_pixels=model.max_pixels)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model.path = {path} cannot be opened as {model.family}: {reason}; check the path, or for a name on the "
            "hub the network and the spelling"
        ) from error

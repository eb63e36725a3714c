"""Registry of model families, keyed by `model.family`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig
from transformers.utils import cached_file

from othink_ray.config.schema import ModelConfig
from othink_ray.families.base import Family, ModelError
from othink_ray.families.internvl import InternVL
from othink_ray.families.qwen_vl import Qwen3VL, QwenVL

# Keys are the `model_type` of transformers' config.json.
FAMILIES: dict[str, Callable[..., Family]] = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": Qwen3VL,
    "internvl": InternVL,
}


def open_family(model: ModelConfig, path: str) -> Family:
    """Return the family of `model`, bound to the folder or hub name `path`."""
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
        if found == model.family:
            return FAMILIES[found](path, min_pixels=model.min_pixels, max_pixels=model.max_pixels)
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model.path = {path} cannot be opened as {model.family}: {reason}; check the path or, for a hub name, "
            "the spelling and the network"
        ) from error
    remedy = f"set model.family={found}" if found in FAMILIES else f"supported families are {', '.join(FAMILIES)}"
    raise ModelError(f"model.path = {path} is of the family {found}, but model.family = {model.family}: {remedy}")


def cached_folder(name: str) -> Path | None:
    """Return the newest snapshot of a hub model in the local cache, or None without its weights; never downloads."""
    try:
        folder = Path(cached_file(name, "config.json", local_files_only=True)).parent
    except OSError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None  # loading only the config also leaves a snapshot

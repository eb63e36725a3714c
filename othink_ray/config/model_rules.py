"""Rules on the model section, and the resolution of model paths."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from othink_ray.config.errors import Problem, broken
from othink_ray.config.schema import Config

VISION_HEAD = 32  # head size of the tiny model's vision tower
_RECIPE = 4  # raise it when the code builds a different model from the same configuration
_OPTIMIZER_KEYS = ("adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "max_grad_norm")
ADAPTER_FOLDER = "adapter"  # in an export, beside the merged weights
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TINY_BYTES = 64 * 2**20  # of safetensors files: the tiny model has 5 MB, the smallest public models hundreds
_HELD_OUT = ("test", "blind")  # keys of the data section that do not affect training
_MAX_LR = {"train": 3e-5, "sft": 5e-5}  # full fine-tuning of a pretrained model; R1-V uses 1e-6 and 2e-5
_MAX_LORA_LR = 2e-3


def model_folder(path: str) -> str:
    """Return the Hugging Face folder of a path: the export of a run, or the folder itself; hub names are unchanged."""
    folder = Path(path).absolute()
    export = folder / "export"
    if (export / "config.json").is_file():
        return str(export)
    return str(folder) if folder.is_dir() else path


def merged_in_float32(path: str, dtype: str) -> bool:
    """Return whether `path` is a LoRA run's export, whose merged float32 weights a cast to `dtype` would change."""
    return dtype != "float32" and (Path(path) / ADAPTER_FOLDER / "adapter_config.json").is_file()


def adapter_settings(folder: str) -> dict[str, Any]:
    """Return the peft configuration of the adapter in an export."""
    found: dict[str, Any] = json.loads((Path(folder) / ADAPTER_FOLDER / "adapter_config.json").read_text())
    return found


def base_model_folder(config: Config) -> Path:
    """Return the cache folder of the base model; its name hashes every setting that the model depends on."""
    optimizer = {name: value for name, value in asdict(config.learner).items() if name in _OPTIMIZER_KEYS}
    data = {name: value for name, value in asdict(config.data).items() if name not in _HELD_OUT}
    # The spelling of the keys is part of the digest: another spelling would miss models that are already cached.
    recipe = {"recipe": _RECIPE, "model": asdict(config.model), "data": data, "optimiser": optimizer}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return Path(config.run.cache_dir).expanduser().absolute() / f"{config.model.name}-{config.data.name}-{digest}"


def model_rules(config: Config) -> Iterator[Problem]:
    """Yield the problems of model paths, of the learning rate for the model, and of the sizes of the tiny model."""
    tiny, path = config.model.tiny, config.model.path
    if path is not None:
        found = [*_path(config, "model.path", path)]
        yield from found or [*_tiny_settings(config, path), *_learning_rate(config)]
        if config.mode != "eval" and merged_in_float32(model_folder(path), config.model.dtype):
            rule = (
                f"is a LoRA run whose export is merged in float32; training it in {config.model.dtype} would round its "
                "small updates away"
            )
            remedy = (
                "Resume the run itself with run.resume, or set model.dtype=float32. To accept the rounding, move "
                "adapter/ out of the export."
            )
            yield Problem(subject=f"model.path = {path}", rule=rule, remedy=remedy)
    elif tiny is None:
        rule = "builds the tiny model, but model.tiny is null too"
        yield broken(config, "model.path", rule, "Use model=tiny, or give a Hugging Face folder or hub name.")
    else:
        yield from _learning_rate(config)
    for path in config.eval.models:
        yield from _path(config, "eval.models", path)
    if config.mode == "eval":
        evaluated = [("eval.models", each) for each in config.eval.models] or [("model.path", path or "")]
        for key, each in evaluated:
            yield from _adapter_base(config, key, each)
    if tiny is not None:
        yield from _sizes(config)


def _tiny_settings(config: Config, path: str) -> Iterator[Problem]:
    """Reject training another model with model=tiny, whose Adam settings and dtype suit only the tiny model."""
    if config.mode != "eval" and config.model.name == "tiny" and _is_real(path):
        rule = f"is for the tiny model of a million parameters: its Adam settings and dtype do not suit {path}"
        remedy = (
            "Also set model to the option closest to this checkpoint, such as model=qwen2_vl_2b; for a checkpoint of a "
            "model=smol run, set model=smol."
        )
        yield Problem(subject="model = tiny", rule=rule, remedy=remedy)


def _learning_rate(config: Config) -> Iterator[Problem]:
    """Reject learning rates that suit only the tiny model, for checkpoints in model.path and for model=smol."""
    learner, path = config.learner, config.model.path
    mode = "train" if config.mode == "check" else config.mode
    if mode not in _MAX_LR or not (_is_real(path) if path else config.model.smol):
        return
    highest_lr = _MAX_LORA_LR if learner.lora.rank else _MAX_LR[mode]
    if learner.lr > highest_lr:
        usual = "1e-4" if learner.lora.rank else "1e-6" if mode == "train" and path else "2e-5"
        which = f"model.path = {path}" if path else f"model = {config.model.name}"
        rule = f"must be at most {highest_lr:g} with {which}: higher rates suit only the tiny model"
        yield broken(config, "learner.lr", rule, f"Set learner.lr={usual}.")


def _is_real(path: str) -> bool:
    """Return whether the path has another model than the tiny one: weights of 64 MiB or more, or a hub name."""
    sizes = [file.stat().st_size for file in Path(model_folder(path)).glob("*.safetensors")]
    return not sizes or sum(sizes) >= _TINY_BYTES


def _path(config: Config, key: str, path: str) -> Iterator[Problem]:
    on_the_hub = _HUB_NAME.fullmatch(path) and not Path(path).parent.is_dir()
    if on_the_hub or (Path(model_folder(path)) / "config.json").is_file():
        return
    rule = (
        "must be a Hugging Face model folder (with config.json), a run folder with an export, or a hub name "
        f"(owner/name); {path} is none of these"
    )
    yield Problem(subject=f"{key} = {path}", rule=rule, remedy="Check the path; a run writes its export at the end.")


def _adapter_base(config: Config, key: str, path: str) -> Iterator[Problem]:
    """Check that the base model of a LoRA run's export exists: engines load the base model and the adapter."""
    if merged_in_float32(model_folder(path), config.model.dtype):
        base = adapter_settings(model_folder(path))["base_model_name_or_path"]
        if not (_HUB_NAME.fullmatch(base) or (Path(base) / "config.json").is_file()):
            rule = f"is an adapter on {base}, which does not exist, and its merged weights are for float32 only"
            remedy = f"Restore that model, or set model.dtype=float32 (now {config.model.dtype})."
            yield Problem(subject=f"{key} = {path}", rule=rule, remedy=remedy)


def _sizes(config: Config) -> Iterator[Problem]:
    tiny = config.model.tiny
    assert tiny is not None
    heads, left = divmod(tiny.text_width, max(tiny.head_dim, 1))
    if left:
        rule = f"must be a multiple of model.tiny.head_dim = {tiny.head_dim}"
        yield broken(config, "model.tiny.text_width", rule, f"Set model.tiny.text_width={(heads + 1) * tiny.head_dim}.")
    elif tiny.kv_heads >= 1 and heads % tiny.kv_heads:
        rule = f"must divide the {heads} heads (model.tiny.text_width / model.tiny.head_dim)"
        yield broken(config, "model.tiny.kv_heads", rule, f"Set model.tiny.kv_heads={heads} or a divisor of it.")
    if tiny.vision_width % VISION_HEAD:
        rule = f"must be a multiple of {VISION_HEAD}, the head size of the vision tower"
        yield broken(config, "model.tiny.vision_width", rule, "Set model.tiny.vision_width=96.")

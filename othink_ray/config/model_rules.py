"""Rules between the settings of the model, and what a model's path may be."""

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
_RECIPE = 4  # raise it when the code makes another model of the same configuration
_OPTIMISER = ("adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "max_grad_norm")
ADAPTER_FOLDER = "adapter"  # in an export; beside it the weights are merged
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TINY_BYTES = 64 * 2**20  # of safetensors files: the embedded model has 5 MB, the smallest public ones hundreds
_HELD_OUT = ("test", "blind")  # parts of the data that teach nothing
_HIGHEST_RATE = {"train": 3e-5, "sft": 5e-5}  # of all weights of a real model; R1-V trains at 1e-6 and 2e-5
_HIGHEST_LORA_RATE = 2e-3


def model_folder(path: str) -> str:
    """The Hugging Face folder that a path means: itself, or a run's export; a hub name stays as it is."""
    folder = Path(path).absolute()
    export = folder / "export"
    if (export / "config.json").is_file():
        return str(export)
    return str(folder) if folder.is_dir() else path


def merged_in_float32(path: str, dtype: str) -> bool:
    """Whether a folder is the export of a run with adapters, which casting its weights to `dtype` would change."""
    return dtype != "float32" and (Path(path) / ADAPTER_FOLDER / "adapter_config.json").is_file()


def adapter_settings(folder: str) -> dict[str, Any]:
    """peft's, of the adapter in an export."""
    found: dict[str, Any] = json.loads((Path(folder) / ADAPTER_FOLDER / "adapter_config.json").read_text())
    return found


def base_model_folder(config: Config) -> Path:
    """Where the base model of this configuration is kept; the name changes with all that shapes it."""
    optimiser = {name: value for name, value in asdict(config.learner).items() if name in _OPTIMISER}
    lessons = {name: value for name, value in asdict(config.data).items() if name not in _HELD_OUT}
    shape = {"recipe": _RECIPE, "model": asdict(config.model), "data": lessons, "optimiser": optimiser}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]
    return Path(config.run.cache_dir).expanduser().absolute() / f"{config.model.name}-{config.data.name}-{digest}"


def model_rules(config: Config) -> Iterator[Problem]:
    """What is wrong with the path of a model, or with the sizes of the one to be made."""
    tiny, path = config.model.tiny, config.model.path
    if path is not None:
        wrong = [*_path(config, "model.path", path)]
        yield from wrong or [*_chosen(config, path), *_rate(config)]
        if config.mode != "eval" and merged_in_float32(model_folder(path), config.model.dtype):
            rule = (
                f"is a run with adapters, whose export is merged in float32: as a start of training in "
                f"{config.model.dtype} small updates of it would round away"
            )
            remedy = (
                "Go on with the run itself by run.resume, or set model.dtype=float32. Who wants it rounded moves the "
                "export's adapter/ away."
            )
            yield Problem(subject=f"model.path = {path}", rule=rule, remedy=remedy)
    elif tiny is None:
        rule = "is null, so the embedded model must be made, but model.tiny is null too"
        yield broken(config, "model.path", rule, "Use model=tiny, or give a Hugging Face folder or hub name.")
    else:
        yield from _rate(config)
    for path in config.eval.models:
        yield from _path(config, "eval.models", path)
    if config.mode == "eval":
        asked = [("eval.models", each) for each in config.eval.models] or [("model.path", path or "")]
        for key, each in asked:
            yield from _base_of(config, key, each)
    if tiny is not None:
        yield from _sizes(config)


def _chosen(config: Config, path: str) -> Iterator[Problem]:
    """Refuses to train a real model at the settings of the embedded one: its Adam, its rate and float32."""
    if config.mode != "eval" and config.model.name == "tiny" and _is_real(path):
        rule = f"is for the embedded model of a million weights: its Adam and its precision do not suit {path}"
        remedy = (
            "Choose the nearest file of conf/model beside the path, such as model=qwen2_vl_2b, or smol for a run of it."
        )
        yield Problem(subject="model = tiny", rule=rule, remedy=remedy)


def _rate(config: Config) -> Iterator[Problem]:
    """Refuses for a real model the learning rates that suit the embedded one, which are 60 to 200 times too high."""
    learner, path = config.learner, config.model.path
    mode = "train" if config.mode == "check" else config.mode
    if mode not in _HIGHEST_RATE or not (_is_real(path) if path else config.model.smol):
        return
    highest = _HIGHEST_LORA_RATE if learner.lora.rank else _HIGHEST_RATE[mode]
    if learner.lr > highest:
        usual = "1e-4" if learner.lora.rank else "1e-6" if mode == "train" and path else "2e-5"
        which = f"model.path = {path}" if path else f"model = {config.model.name}"
        rule = f"must be at most {highest:g} where {which}: it suits the embedded model of a million weights"
        yield broken(config, "learner.lr", rule, f"Set learner.lr={usual}.")


def _is_real(path: str) -> bool:
    """Whether this is another model than the embedded one or a run of it: by the size of its files."""
    sizes = [file.stat().st_size for file in Path(model_folder(path)).glob("*.safetensors")]
    return not sizes or sum(sizes) >= _TINY_BYTES


def _path(config: Config, key: str, path: str) -> Iterator[Problem]:
    on_the_hub = _HUB_NAME.fullmatch(path) and not Path(path).parent.is_dir()
    if on_the_hub or (Path(model_folder(path)) / "config.json").is_file():
        return
    rule = (
        "must be a folder with a config.json of Hugging Face, a run with an export in it, or owner/name on the hub; "
        f"{path} is none of these"
    )
    yield Problem(subject=f"{key} = {path}", rule=rule, remedy="Check the path: a run has its export when it is done.")


def _base_of(config: Config, key: str, path: str) -> Iterator[Problem]:
    """Engines open the export of a run with adapters as its base model with its adapter."""
    if merged_in_float32(model_folder(path), config.model.dtype):
        base = adapter_settings(model_folder(path))["base_model_name_or_path"]
        if not (_HUB_NAME.fullmatch(base) or (Path(base) / "config.json").is_file()):
            rule = f"has its adapter for {base}, which is not there, and its merged weights are for float32"
            remedy = f"Bring that model back, or set model.dtype=float32 (now {config.model.dtype})."
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

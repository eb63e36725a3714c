"""Learner checkpoints and exported models.

A checkpoint stores the trained parameters and Adam's moments independently of rank count and ZeRO stage: each rank
writes a shard of full tensors as safetensors, and on loading reads its partition from all shards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from othink_ray.config.model_rules import ADAPTER_FOLDER, adapter_settings, merged_in_float32
from othink_ray.engines.base import ServedAdapters
from othink_ray.tracing import span

_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHT = "weight"
# Attributes of DeepSpeed's optimizers that hold this rank's float32 weights.
_FLAT_PARTITIONS = (
    "fp32_partitioned_groups_flat",  # ZeRO 3
    "single_partition_of_fp32_groups",  # ZeRO 1 and 2
    "fp32_groups_flat_partition",  # ZeRO 1 of bfloat16 weights
)


class StateError(ValueError):
    """Raised where a checkpoint does not fit the model that resumes from it."""


class ZeroState:
    """Access to a DeepSpeed engine's float32 weights and Adam's moments. All public methods are collective."""

    def __init__(
        self, deepspeed: Any, engine: Any, network: nn.Module, *, stage: int, rank: int, world_size: int
    ) -> None:
        self.fragments: Any = deepspeed.utils
        self.whole: Any = deepspeed.zero.GatheredParameters
        self.optimizer, self.stage, self.rank, self.world_size = engine.optimizer, stage, rank, world_size
        self.trained = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]

    def shard(self) -> tuple[dict[str, Tensor], int]:
        """Return copies of this rank's tensors as `name/weight`, `name/exp_avg`, ..., and the number of Adam steps."""
        steps = self._adam_steps()
        if steps:
            self.link_moments()
        kinds = (_WEIGHT, *_MOMENTS) if steps else (_WEIGHT,)
        held, kept = [0] * self.world_size, {}
        for name, parameter in self.trained:
            owner = held.index(min(held))
            for kind in kinds:
                whole = self._gathered(parameter, kind)
                held[owner] += whole.numel()
                if owner == self.rank:
                    kept[f"{name}/{kind}"] = whole.detach().to("cpu", copy=True).contiguous()
        return kept, steps

    def restore(self, stored: StoredState) -> None:
        """Load a checkpoint; StateError if its parameters are not those of this network."""
        stored.require({name: getattr(weight, "ds_shape", weight.shape) for name, weight in self.trained})
        if stored.steps:
            self._open_moments(stored.steps)
        for name, parameter in self.trained:
            weight = stored.read(name, _WEIGHT)
            with torch.no_grad(), self.whole([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.copy_(weight)
            self._scatter(parameter, weight, _WEIGHT)
            for kind in _MOMENTS if stored.steps else ():
                self._scatter(parameter, stored.read(name, kind), kind)

    def _gathered(self, parameter: Tensor, kind: str) -> Tensor:
        found: Tensor
        if kind == _WEIGHT:
            found = self.fragments.safe_get_full_fp32_param(parameter)
        else:
            found = self.fragments.safe_get_full_optimizer_state(parameter, kind)
        return found

    def _scatter(self, parameter: Any, whole: Tensor, kind: str) -> None:
        if self.stage < 3:
            if kind == _WEIGHT:
                self.fragments.safe_set_full_fp32_param(parameter, whole)
            else:
                self.fragments.safe_set_full_optimizer_state(parameter, whole, kind)
            return
        # DeepSpeed's setter for full tensors fails on the last rank where the size does not divide evenly.
        size = parameter.ds_tensor.numel()
        padded = pad(whole.flatten(), (0, size * self.world_size - whole.numel()))
        shard = padded[self.rank * size : (self.rank + 1) * size]
        if kind == _WEIGHT:
            self.fragments.safe_set_local_fp32_param(parameter, shard)
        else:
            self.fragments.safe_set_local_optimizer_state(parameter, shard, kind)

    def _flat_partitions(self) -> list[Tensor]:
        """Return the flat tensors on which Adam steps."""
        [flat] = [getattr(self.optimizer, name) for name in _FLAT_PARTITIONS if hasattr(self.optimizer, name)]
        found: list[Tensor] = flat
        return found

    def _adam_steps(self) -> int:
        states = [self.optimizer.optimizer.state.get(flat) for flat in self._flat_partitions()]
        return max((int(state["step"]) for state in states if state), default=0)

    def _open_moments(self, steps: int) -> None:
        """Create Adam's state, which exists only after the first step: a resumed run fills it before that."""
        for flat in self._flat_partitions():
            moments = {kind: torch.zeros_like(flat) for kind in _MOMENTS}
            step = torch.tensor(float(steps), device=flat.device)  # fused AdamW counts its steps on the device
            self.optimizer.optimizer.state[flat] = {"step": step, **moments}
        self.link_moments()

    def link_moments(self) -> None:
        """Link each parameter to its moments in DeepSpeed.

        DeepSpeed links once, after the step of the first parameter group, when other groups have no moments yet.
        """
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


class CheckpointWriter:
    """Writes this rank's shard on a background thread while training goes on."""

    def __init__(self, folder: Path, rank: int, tensors: dict[str, Tensor], steps: int) -> None:
        self.path = folder / f"learner_{rank}.safetensors"
        self.digest = ""
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._write, args=(tensors, steps), name="checkpoint")
        self.thread.start()

    @span("write checkpoint")
    def _write(self, tensors: dict[str, Tensor], steps: int) -> None:
        try:
            save_file(tensors, self.path, metadata={"steps": str(steps)})
            with self.path.open("rb") as written:
                os.fsync(written.fileno())
                self.digest = hashlib.file_digest(written, "sha256").hexdigest()
        except BaseException as error:  # raised again by `finish`
            self.error = error

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def finish(self) -> dict[str, str]:
        """Wait for the write; return file name -> SHA-256, or raise OSError where it failed."""
        self.thread.join()
        if self.error is not None:
            raise OSError(f"{self.path.name}: {self.error}") from self.error
        return {self.path.name: self.digest}


class StoredState:
    """Reader of a checkpoint's shards, for any number of ranks that wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [safe_open(path, framework="pt") for path in sorted(folder.glob("learner_*.safetensors"))]
        self.file_of = {key: file for file in self.files for key in file.keys()}  # noqa: SIM118 (not a mapping)
        self.steps = max((int(file.metadata()["steps"]) for file in self.files), default=0)

    def require(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise StateError unless exactly these parameters are stored, in these shapes."""
        stored = {key.rpartition("/")[0] for key in self.file_of}
        missing, unknown = sorted(set(shapes) - stored), sorted(stored - set(shapes))
        other = [name for name in sorted(stored & set(shapes)) if self._shape(name) != list(shapes[name])]
        if missing or unknown or other:
            raise StateError(
                f"run.resume: {self.folder} does not fit this learner: {_few(missing)} missing, {_few(unknown)} "
                f"unexpected, {_few(other)} of another shape; resume with the model, learner.freeze and learner.lora "
                "of the run that saved it"
            )

    def _shape(self, name: str) -> list[int]:
        key = f"{name}/{_WEIGHT}"
        shape: list[int] = self.file_of[key].get_slice(key).get_shape()
        return shape

    def read(self, name: str, kind: str) -> Tensor:
        tensor: Tensor = self.file_of[f"{name}/{kind}"].get_tensor(f"{name}/{kind}")
        return tensor


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} parameters ({', '.join(names[:2])}{' …' * (len(names) > 2)})" if names else "none"


_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An exported adapter: its base model, and the factors that a push brings to an engine of that model."""

    base: str  # folder or hub name
    adapters: ServedAdapters
    factors: Sequence[tuple[str, Tensor]]


def replace_export(folder: Path, partial: Path) -> None:
    """Move a complete export from `partial`, inside `folder`, into `folder`, and remove the earlier export there.

    `config.json`, which makes the folder loadable as a model, is removed first and arrives last. Weight files are
    unlinked and not overwritten: a learner that started from them may still have them memory-mapped.
    """
    (folder / _CONFIG).unlink(missing_ok=True)
    for weights in folder.glob("*.safetensors*"):  # the index, too
        weights.unlink()
    shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == _CONFIG):
        if file.is_dir():
            shutil.rmtree(folder / file.name, ignore_errors=True)
        file.replace(folder / file.name)
    partial.rmdir()


def read_exported(path: str, dtype: str) -> Exported | None:
    """Return the adapter to serve on the base model, or None where `path` loaded in `dtype` is the exact policy."""
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
            layers.append(layer)  # full paths; peft's settings abbreviate them
    return Exported(
        base=settings["base_model_name_or_path"],
        adapters=ServedAdapters(rank=settings["r"], layers=tuple(layers)),
        factors=factors,
    )

"""A run that goes on with other settings than before: told, or refused where its weights would mean another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from othink_ray.config.load import to_yaml
from othink_ray.config.schema import Config
from othink_ray.driver.checkpoint import ResumeError

_ANYWHERE = ("run.", "wandb.", "cluster.")  # where a run is made and kept, not what it is
_OF_ADAPTERS = ("model.path", "model.tiny.", "learner.lora.")


def compare_settings(checkpoint: Path, config: Config, tell: Callable[[str], None]) -> None:
    """With those that lie beside the checkpoint, where they do."""
    file = checkpoint.parent.parent / "config.yaml"
    if not file.exists():
        return
    changed = dict(differences(file.read_text(), to_yaml(config)))
    if config.learner.lora.rank:
        for key in changed:
            if key.startswith(_OF_ADAPTERS):
                raise ResumeError(
                    f"run.resume: {checkpoint} holds adapters, which mean something else with another {key} "
                    f"({changed[key]}): set it as it was, or go on from the run's export by model.path"
                )
    if changed:
        told = ", ".join(f"{key} {change}" for key, change in changed.items())
        tell(f"it goes on with other settings than before: {told}")


def differences(before: str, now: str) -> Iterator[tuple[str, str]]:
    """Keys of both, and what became of their values; a key that only one version of the program knows is none."""
    from omegaconf import OmegaConf

    old, new = (dict(_flat(OmegaConf.to_container(OmegaConf.create(text)))) for text in (before, now))
    for key in new:
        if key in old and old[key] != new[key] and not key.startswith(_ANYWHERE):
            yield key, f"{old[key]} -> {new[key]}"


def _flat(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value

"""LoRA by peft, in place: weights keep the names of the plain network. The only module to import peft."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from othink_ray.config.bounds import FROZEN
from othink_ray.config.errors import Problem
from othink_ray.config.schema import LearnerConfig, LoraConfig
from othink_ray.engines.base import ServedAdapters
from othink_ray.families.base import Family, modules_by_part

_NAME = "default"  # peft's name for the only adapter


class AdapterError(ValueError):
    """Raised where `learner.lora.targets` names layers that the network does not have or the engine cannot serve."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem.subject} {self.problem.rule}. {self.problem.remedy}"


def add_adapters(network: nn.Module, rank: int, alpha: float, layers: Sequence[str]) -> None:
    """Add adapters to these layers (paths) and freeze everything else. A new adapter adds 0: its B is 0."""
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers))
    peft.inject_adapter_in_model(settings, network, adapter_name=_NAME)


def adapted_layers(family: Family, network: nn.Module, lora: LoraConfig, frozen: Collection[str]) -> tuple[str, ...]:
    """Return the paths of the linear layers that `lora.targets` names."""
    known = _adaptable(family, network, frozen)
    _require_known(lora.targets, sorted(set().union(*known.values())), frozen)
    return tuple(path for path, names in known.items() if not names.isdisjoint(lora.targets))


def _adaptable(family: Family, network: nn.Module, frozen: Collection[str]) -> dict[str, set[str]]:
    """Return path -> {part, name} of the linear layers that may have an adapter; a numeric name is left out."""
    blocks = [*family.layers(network), *family.projectors(network)]
    inside = {id(module) for block in blocks for module in block.modules()}
    found = {}
    for part, path, module in modules_by_part(family, network):
        if isinstance(module, nn.Linear) and id(module) in inside and part not in frozen:
            name = path.rpartition(".")[2]
            found[path] = {part} if name.isdecimal() else {part, name}
    return found


def _require_known(targets: Sequence[str], known: Sequence[str], frozen: Collection[str]) -> None:
    for target in targets:
        if target not in known:
            near = get_close_matches(target, known, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            where = f" outside of the parts that learner.freeze freezes ({', '.join(frozen)})" if frozen else ""
            raise AdapterError(
                Problem(
                    subject=f"learner.lora.targets = [{', '.join(targets)}]",
                    rule=f"must be parts or names of the model's linear layers, but the model has no {target}{where}",
                    remedy=f"{hint}It has: {', '.join(known)}.",
                )
            )


class WithoutAdapters:
    """The policy before training: calls the same network with its adapters disabled."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.layers = [layer for _, layer in _adapted(policy.module.network)]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        for layer in self.layers:
            layer.enable_adapters(False)
        try:
            return self.policy(*inputs, **named)
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Factors of one adapted layer, to whose weight they add scale * up @ down."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)
    scale: float  # alpha / rank


def adapters(network: nn.Module) -> dict[str, Adapter]:
    """Return the adapter of each adapted layer, by the layer's path."""
    found = {}
    for path, layer in _adapted(network):
        up, down = _factors(layer)
        found[path] = Adapter(up=up, down=down, scale=layer.scaling[_NAME])
    return found


def _adapted(network: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in network.named_modules() if isinstance(module, LoraLayer)]


def _factors(layer: Any) -> tuple[Tensor, ...]:
    return layer.lora_B[_NAME].weight, layer.lora_A[_NAME].weight


def adapter_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the factors of all adapters under their names in peft's files."""
    for path, layer in _adapted(network):
        for kind, factor in zip(("lora_B", "lora_A"), _factors(layer), strict=True):
            yield f"base_model.model.{path}.{kind}.weight", factor


def write_adapter(folder: Path, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write an adapter folder that peft loads onto the model that training began with."""
    trained: Any = network
    settings = replace(
        trained.peft_config[_NAME], base_model_name_or_path=trained.config.name_or_path, inference_mode=True
    )
    settings.save_pretrained(folder)
    save_file(dict(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def served_adapters(family: Family, learner: LearnerConfig) -> ServedAdapters | None:
    """Return the adapters that engines must serve, or None without LoRA."""
    if not learner.lora.rank:
        return None
    layers = adapted_layers(family, family.meta_network(), learner.lora, FROZEN[learner.freeze])
    return ServedAdapters(rank=learner.lora.rank, layers=layers)


def require_servable(family: Family, learner: LearnerConfig, engine: str) -> None:
    """Raise AdapterError where the network lacks a target layer, or the rollout engine cannot serve its adapter."""
    served = served_adapters(family, learner)
    if served is None or engine != "vllm" or family.vllm_adapts_tower:
        return
    parts = {path: part for part, path, _ in modules_by_part(family, family.meta_network())}
    outside = [layer for layer in served.layers if parts[layer] != "text"]
    if outside:
        rule = f"has {len(outside)} layers outside of the text network ({outside[0]}), where vLLM serves no adapters"
        remedy = "Set learner.lora.targets=[text] and learner.freeze=projector, or use rollout=hf."
        subject = f"learner.lora.targets = [{', '.join(learner.lora.targets)}]"
        raise AdapterError(Problem(subject=subject, rule=rule, remedy=remedy))

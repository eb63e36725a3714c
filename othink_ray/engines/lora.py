"""Trained and frozen parameters, and LoRA by peft in place: weights keep the names of the plain network."""

from __future__ import annotations

from collections import defaultdict
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
        return f"{self.problem.subject} {self.problem.rule}; {self.problem.remedy}"


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
                    rule=f"must be parts or names of the model's linear layers, and it has no {target}{where}",
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
class Trained:
    """A trained tensor, and the factor by which a push scales it."""

    name: str
    parameter: Tensor
    scale: float = 1.0

    def pushed(self) -> Tensor:
        """Return the scaled tensor in the learner's compute dtype."""
        weight = self.parameter.detach()
        return weight if self.scale == 1.0 else weight * self.scale


def trained_weights(network: nn.Module) -> Iterator[Trained]:
    """Yield the trained tensors in a fixed order.

    Of an adapter these are A and B, with the scale alpha / rank applied to B, so that engines add B A unscaled.
    """
    adapted = _adapted(network)
    for path, layer in adapted:
        up, down = _factors(layer)
        yield Trained(name=f"{path}.lora_A.weight", parameter=down)
        yield Trained(name=f"{path}.lora_B.weight", parameter=up, scale=layer.scaling[_NAME])
    if not adapted:
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                yield Trained(name=name, parameter=parameter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight of the plain network; an adapter adds scale * up @ down to it."""

    name: str
    base: Tensor
    factors: tuple[Tensor, ...]  # up (out, rank), down (rank, in); empty without an adapter
    scale: float

    @property
    def parts(self) -> list[Tensor]:
        return [self.base, *self.factors]

    def merged(self) -> Tensor:
        """Return the weight with its adapter merged, in float32 then: in bfloat16 small updates would round away."""
        if not self.factors:
            return self.base.detach()
        up, down = (factor.detach().float() for factor in self.factors)
        return self.base.detach().float() + self.scale * (up @ down)


def plain_weights(network: nn.Module) -> Iterator[Weight]:
    """Yield all weights in a fixed order, under the names that they have without adapters."""
    adapted = {f"{path}.base_layer": layer for path, layer in _adapted(network)}
    factors = {id(factor) for layer in adapted.values() for factor in _factors(layer)}
    for name, parameter in network.named_parameters():
        if id(parameter) in factors:
            continue
        owner, _, kind = name.rpartition(".")
        layer = adapted.get(owner)
        yield Weight(
            name=name if layer is None else f"{owner.removesuffix('.base_layer')}.{kind}",
            base=parameter,
            factors=() if layer is None or kind != "weight" else _factors(layer),
            scale=1.0 if layer is None else layer.scaling[_NAME],
        )


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


def choose_trained(family: Family, network: nn.Module, learner: LearnerConfig) -> None:
    """Add adapters or freeze parts: afterwards exactly the trained parameters require gradients."""
    frozen, lora = FROZEN[learner.freeze], learner.lora
    if lora.rank:
        add_adapters(network, lora.rank, lora.alpha, adapted_layers(family, network, lora, frozen))
    else:
        for part, _, module in modules_by_part(family, network):
            if part in frozen:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)


def parameter_groups(family: Family, network: nn.Module, learner: LearnerConfig) -> list[dict[str, Any]]:
    """Return optimizer parameter groups, one per learning rate: learner.lr times the group's `lr_scale`."""
    scales = {"vision": learner.vision_lr_scale, "projector": learner.projector_lr_scale}
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    grouped: set[int] = set()  # a tied weight belongs to several modules
    for part, _, module in modules_by_part(family, network):
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in grouped:
                grouped.add(id(parameter))
                groups[scales.get(part, 1.0)].append(parameter)
    return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]


def trains_all(learner: LearnerConfig) -> bool:
    """Return whether every push brings every weight: there are no adapters, and no part is frozen."""
    return not learner.lora.rank and not FROZEN[learner.freeze]


def count_trained(family: Family, learner: LearnerConfig) -> int:
    """Return the number of trained elements without loading weights; AdapterError where there is nothing to adapt."""
    network = family.skeleton()
    choose_trained(family, network, learner)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def served_adapters(family: Family, learner: LearnerConfig) -> ServedAdapters | None:
    """Return the adapters that engines must serve, or None without LoRA."""
    if not learner.lora.rank:
        return None
    layers = adapted_layers(family, family.skeleton(), learner.lora, FROZEN[learner.freeze])
    return ServedAdapters(rank=learner.lora.rank, layers=layers)


def require_servable(family: Family, learner: LearnerConfig, engine: str) -> None:
    """Raise AdapterError where the network lacks a target layer, or the rollout engine cannot serve its adapter."""
    served = served_adapters(family, learner)
    if served is None or engine != "vllm" or family.vllm_adapts_tower:
        return
    parts = {path: part for part, path, _ in modules_by_part(family, family.skeleton())}
    outside = [layer for layer in served.layers if parts[layer] != "text"]
    if outside:
        rule = f"has {len(outside)} layers outside of the text network ({outside[0]}), where vLLM serves no adapters"
        remedy = "Set learner.lora.targets=[text] and learner.freeze=projector, or use rollout=hf."
        subject = f"learner.lora.targets = [{', '.join(learner.lora.targets)}]"
        raise AdapterError(Problem(subject=subject, rule=rule, remedy=remedy))


def features_frozen(family: Family, network: nn.Module) -> bool:
    """Return whether image features are constant during training: vision tower and projector are frozen."""
    return not any(
        parameter.requires_grad
        for part, _, module in modules_by_part(family, network)
        for parameter in module.parameters(recurse=False)
        if part != "text"
    )

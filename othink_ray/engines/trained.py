"""What of a network is trained: all of it, all but frozen parts, or adapters in its place."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from othink_ray.config.bounds import FROZEN
from othink_ray.config.problem import Problem
from othink_ray.config.schema import LearnerConfig
from othink_ray.engines.adapters import AdapterError, adapted_layers, add_adapters
from othink_ray.engines.base import ServedAdapters
from othink_ray.families.base import Family
from othink_ray.families.parts import modules_by_part


def choose_trained(family: Family, network: nn.Module, learner: LearnerConfig) -> None:
    """Afterwards what is not trained asks for no gradient."""
    frozen, lora = FROZEN[learner.freeze], learner.lora
    if lora.rank:
        add_adapters(network, lora.rank, lora.alpha, adapted_layers(family, network, lora, frozen))
    else:
        for part, _, module in modules_by_part(family, network):
            if part in frozen:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)


def parameter_groups(family: Family, network: nn.Module, learner: LearnerConfig) -> list[dict[str, Any]]:
    """What is trained, as an optimizer takes it: parts that learn at the same rate together.

    The rate of a group is learner.lr times its `lr_scale`.
    """
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
    """Whether every push brings every weight: no adapters in their place, and no part is frozen."""
    return not learner.lora.rank and not FROZEN[learner.freeze]


def count_trained(family: Family, learner: LearnerConfig) -> int:
    """How many numbers are trained, before any weight is loaded; AdapterError where there is nothing to adapt."""
    network = family.skeleton()
    choose_trained(family, network, learner)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def served_adapters(family: Family, learner: LearnerConfig) -> ServedAdapters | None:
    """What engines are opened for; None where whole weights are trained."""
    if not learner.lora.rank:
        return None
    layers = adapted_layers(family, family.skeleton(), learner.lora, FROZEN[learner.freeze])
    return ServedAdapters(rank=learner.lora.rank, layers=layers)


def require_servable(family: Family, learner: LearnerConfig, engine: str) -> None:
    """AdapterError where the network lacks a layer that is to be adapted, or the sampling engine cannot adapt it."""
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


def features_stay(family: Family, network: nn.Module) -> bool:
    """Whether training changes nothing between the pixels and the features of an image."""
    return not any(
        parameter.requires_grad
        for part, _, module in modules_by_part(family, network)
        for parameter in module.parameters(recurse=False)
        if part != "text"
    )

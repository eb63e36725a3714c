"""The parts of a network that a user speaks of: the vision tower, its projector, and the text network around them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from othink_ray.families.base import Family


def modules_by_part(family: Family, network: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Each module with its part (text, vision or projector) and its path."""
    projector = {id(module) for module in family.projector(network).modules()}
    tower = {id(module) for module in family.vision_tower(network).modules()}
    for path, module in network.named_modules():
        part = "projector" if id(module) in projector else "vision" if id(module) in tower else "text"
        yield part, path, module

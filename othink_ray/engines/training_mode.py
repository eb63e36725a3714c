"""The trained network in training mode, which gradient checkpointing needs, computing what it does in eval mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def train_without_dropout(network: nn.Module) -> None:
    """Switch to training mode with every dropout rate set to 0, and warn where one was not.

    An update compares the policy's logprobs with those of the sampler, the old policy and the reference. With dropout
    equal weights would give other logprobs, and two passes over one token would disagree.
    """
    dropouts = list(_dropout_rates(network))
    for _, module, name, _ in dropouts:
        setattr(module, name, 0.0)
    if dropouts:
        path, _, name, rate = dropouts[0]
        warnings.warn(
            f"the model has {len(dropouts)} dropout rates above 0 ({path}.{name} = {rate}, ...): it is trained without "
            "dropout, because its logprobs are compared with the sampler's",
            stacklevel=2,
        )
    network.train()


def _dropout_rates(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, float]]:
    """(module path, module, attribute, rate) of each rate above 0: of dropout modules, and those given to attention."""
    for path, module in network.named_modules():
        for name, rate in vars(module).items():
            is_rate = "dropout" in name or "drop_path" in name or (name == "p" and isinstance(module, _DropoutNd))
            if is_rate and isinstance(rate, float) and rate > 0:
                yield path, module, name, rate


def checkpoint_layers(network: nn.Module) -> None:
    """Keep a layer's input alone for backward, where its forward pass is repeated. Works in training mode only."""
    model: Any = network
    model.gradient_checkpointing_enable({"use_reentrant": False})

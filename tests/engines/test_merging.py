"""Weights as they are pushed and exported, without a learner: what is trained, and adapters merged into matrices."""

from __future__ import annotations

import torch
from torch import nn

from othink_ray.engines.lora import Weight, trained_weights


def test_without_adapters_every_trained_weight_is_pushed_under_its_own_name() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    network[0].weight.requires_grad_(False)
    pushed = {one.name: one.parameter for one in trained_weights(network)}
    assert list(pushed) == ["0.bias", "1.weight", "1.bias"]
    assert all(parameter is network.get_parameter(name) for name, parameter in pushed.items())


def test_an_adapter_is_merged_in_float32_and_rounded_nowhere() -> None:
    draw = torch.Generator().manual_seed(0)
    base, up, down = (
        torch.randn(shape, generator=draw).bfloat16().requires_grad_() for shape in ((5, 7), (5, 3), (3, 7))
    )
    merged = Weight(name="w", base=base, factors=(up, down), scale=0.3).merged()
    exact = base.double() + 0.3 * (up.double() @ down.double())
    assert merged.dtype == torch.float32 and not merged.requires_grad
    torch.testing.assert_close(merged.double(), exact.detach(), rtol=1e-6, atol=1e-6)


def test_a_weight_without_an_adapter_is_pushed_as_it_is() -> None:
    base = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    merged = Weight(name="w", base=base, factors=(), scale=1.0).merged()
    assert merged.dtype == torch.bfloat16 and merged.data_ptr() == base.data_ptr() and not merged.requires_grad

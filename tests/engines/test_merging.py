"""Pushed and exported weights without a learner: trained weights, and adapters merged into matrices."""

from __future__ import annotations

import torch
from torch import nn

from othink_ray.engines.policy import PlainWeight, trained_weights


def test_without_adapters_trained_weights_keep_their_names() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    network[0].weight.requires_grad_(False)
    pushed = {weight.name: weight.parameter for weight in trained_weights(network)}
    assert list(pushed) == ["0.bias", "1.weight", "1.bias"]
    assert all(parameter is network.get_parameter(name) for name, parameter in pushed.items())


def test_an_adapter_is_merged_in_float32_without_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    base, up, down = (
        torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in ((5, 7), (5, 3), (3, 7))
    )
    merged = PlainWeight(name="w", base=base, factors=(up, down), scale=0.3).merged()
    exact = base.double() + 0.3 * (up.double() @ down.double())
    assert merged.dtype == torch.float32 and not merged.requires_grad
    torch.testing.assert_close(merged.double(), exact.detach(), rtol=1e-6, atol=1e-6)


def test_a_weight_without_an_adapter_is_not_copied() -> None:
    base = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    merged = PlainWeight(name="w", base=base, factors=(), scale=1.0).merged()
    assert merged.dtype == torch.bfloat16 and merged.data_ptr() == base.data_ptr() and not merged.requires_grad

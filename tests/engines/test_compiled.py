"""Compiled layers multiply with oneDNN and keep their results; no test compiles a whole learner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from othink_ray.cpu import kernels
from othink_ray.engines.compiled import compile_layers
from othink_ray.families.base import Family


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.down(nn.functional.silu(self.up(tokens)))


class LayersOnly:
    """The part of a family that `compile_layers` uses."""

    def layers(self, network: nn.Module) -> list[nn.Module]:
        return list(network.children())


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Record the shapes (rows, inner, columns) of oneDNN's products."""
    shapes: list[tuple[int, ...]] = []
    product = kernels._onednn_linear

    def recording(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
        shapes.append((*left.shape, right.shape[1]))
        return product(left, right, added)

    monkeypatch.setattr(kernels, "_onednn_linear", recording)
    yield shapes
    torch.compiler.reset()


def test_a_compiled_layer_uses_onednn_with_equal_results(multiplied: list[Any]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Layer(), Layer())
    inputs = [torch.randn(length, 6) for length in (50, 30)]  # compiled once for any number of tokens

    def results() -> list[Tensor]:
        network.zero_grad()
        outs = [network(tokens) for tokens in inputs]
        sum(out.pow(2).sum() for out in outs).backward()
        return [*outs, *(parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None)]

    expected = results()
    assert not multiplied
    compile_layers(cast(Family, LayersOnly()), network, by_onednn=True)
    assert_close(results(), expected, atol=1e-4, rtol=1e-5)
    assert (50, 6, 24) in multiplied and (30, 24, 6) in multiplied
    # Two layers, two inputs: two products forward and four backward, one fewer for the first layer's input.
    assert len(multiplied) == 2 * (6 + 5)

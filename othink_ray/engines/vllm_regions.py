"""Where in a worker's parameters each Hugging Face weight lies: vLLM renames, fuses, pads and shards them.

vLLM's own loader says it: it is run once on weights without memory, and each copy that it would make is noted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from othink_ray.weights.digest import TensorDigest, as_matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of a parameter, and which part of a weight, as a matrix (first dimension, all others), it holds."""

    parameter: str
    offset: int  # in elements, from the parameter's first one
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first_row: int
    first_column: int

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What it holds now, (rows, columns)."""
        parameter = parameters[self.parameter].detach()
        offset = parameter.storage_offset() + self.offset
        return as_matrix(parameter.as_strided(self.shape, self.strides, offset))


def find_regions(network: Any, expected: Mapping[str, TensorDigest]) -> dict[str, list[Region]]:
    """The regions of each of these weights, in this worker. The parameters stay as they are."""
    blank = {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in expected.items()}
    names = {_storage(weight): name for name, weight in blank.items()}
    owners = {
        parameter.untyped_storage().data_ptr(): (name, parameter)
        for name, parameter in network.named_parameters(remove_duplicate=False)
    }
    with _NotedCopies() as noted:
        network.load_weights(blank.items())
    regions: dict[str, list[Region]] = {name: [] for name in expected}
    for target, source in noted.copies:
        name = names.get(_storage(source))
        row_length = prod(expected[name].shape[1:]) if name else 0
        if name is None or not _in_order(source, target, row_length):
            raise NotImplementedError(
                f"vLLM changes weights of {type(network).__name__} while it loads them (into a parameter of shape "
                f"{tuple(target.shape)}): that they arrived cannot be proven"
            )
        parameter_name, parameter = owners[target.untyped_storage().data_ptr()]
        first_row, first_column = divmod(source.storage_offset(), row_length)
        regions[name].append(
            Region(
                parameter=parameter_name,
                offset=target.storage_offset() - parameter.storage_offset(),
                shape=tuple(target.shape),
                strides=target.stride(),
                first_row=first_row,
                first_column=first_column,
            )
        )
    return regions


def unreached(network: nn.Module, regions: Iterable[Region]) -> Iterator[str]:
    """Parameters of which no weight is any part, such as a head that no longer is the embedding that it is tied to."""
    reached = {region.parameter for region in regions}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    same = {id(parameters[name]) for name in reached}
    for name, parameter in network.named_parameters():
        if parameter.numel() and id(parameter) not in same:
            yield name


class _NotedCopies(TorchDispatchMode):
    """Notes copies from tensors without memory instead of making them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta:
            self.copies.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata
    return identity


def _in_order(source: Tensor, target: Tensor, row_length: int) -> bool:
    """Whether a copy takes elements of whole rows, or the same range of each, one after the other."""
    if source.shape != target.shape or not source.numel():
        return False
    return bool(source[0].is_contiguous()) and (len(source) == 1 or source.stride(0) == row_length)

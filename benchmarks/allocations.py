"""Counter of what operators allocate and free, tensor by tensor; independent of the memory plan that it verifies."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Count bytes of the CPU storages that operators return while this mode is active: `now`, and `peak` so far.

    A storage counts from its first appearance until it is freed; storages of `known` tensors do not count.
    """

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out

    def note(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the CPU storages of these tensors: results of an operator, or weights loaded before this mode began."""
        for tensor in tensors:
            if tensor.device.type == "cpu":
                self._note(tensor.untyped_storage())

    def _note(self, storage: Any) -> None:
        address = storage.data_ptr()
        if address == 0 or address in self.known or address in self.held:
            return
        self.held[address] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, address)

    def _drop(self, address: int) -> None:
        self.now -= self.held.pop(address)

"""Counts what operators really allocate and free, tensor by tensor; it shares nothing with the planned figures."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of CPU storages that operators return while it is active: `now`, and `peak` so far.

    A storage counts from when it is first seen until it is freed; those of `known` tensors do not count.
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
        """Count these, too, if they are on the CPU: no operator returned them here, such as weights loaded before."""
        for tensor in tensors:
            if tensor.device.type == "cpu":
                self._note(tensor.untyped_storage())

    def _note(self, storage: Any) -> None:
        place = storage.data_ptr()
        if place == 0 or place in self.known or place in self.held:
            return
        self.held[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, place)

    def _drop(self, place: int) -> None:
        self.now -= self.held.pop(place)

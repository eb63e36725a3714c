"""The learner's end of vLLM's weight transfer: NCCL between GPUs, CUDA IPC on a shared GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from othink_ray.engines.base import RendezvousInfo


class Engines(Protocol):
    """The engines' end of a transfer, as vLLM's sender calls it; the runtime implements it over Ray."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


NamedWeights = Callable[[], Iterator[tuple[str, Tensor]]]


class Sender(Protocol):
    """The sending end of a transfer on one learner rank."""

    def send_weights(self) -> None:
        """Send the whole policy. Collective: called on every learner rank."""
        ...


def open_sender(
    backend: str,
    named_weights: NamedWeights,
    engines: Engines,
    rendezvous: RendezvousInfo,
    *,
    port: int,
    receivers: int,
    bucket_bytes: int,
) -> Sender:
    """Rendezvous with the engines and return a sender: rank 0 sends, the other ranks join ZeRO-3's gathers.

    A bucket holds `bucket_bytes`, or a single larger weight.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class PolicySource(WeightSource):  # type: ignore[misc]  # vLLM is untyped here
        """Source of the learner's gathered weights in a fixed order."""

        def __init__(self) -> None:
            self._metadata = [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in named_weights()]

        def metadata(self) -> list[ParamMeta]:
            return self._metadata

        def largest(self) -> int:
            """Return the bytes of the largest weight."""
            return max(int(math.prod(meta.shape)) * int(meta.dtype.itemsize) for meta in self._metadata)

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return named_weights()

    source = PolicySource()
    init_info = {
        "nccl": lambda: NCCLTrainerInitInfo(
            rank=rendezvous.rank,
            master_address=rendezvous.master_address,
            master_port=port,
            world_size=1 + receivers,
            packed_buffer_size_bytes=bucket_bytes,
        ),
        # IPC's buffer has a fixed size and refuses a larger weight, where NCCL's grows for it. Every rank knows all
        # shapes and computes the same size: the ranks must cut the weights into the same buckets.
        "ipc": lambda: IPCTrainerInitInfo(
            rank=rendezvous.rank, packed=True, packed_buffer_size_bytes=max(bucket_bytes, source.largest())
        ),
    }
    sender: Sender = WeightTransferTrainerFactory.trainer_init(init_info[backend](), client=engines, source=source)
    return sender

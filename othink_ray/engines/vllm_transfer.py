"""The learner's end of vLLM's own weight transfer: NCCL between GPUs, CUDA IPC on a shared one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

from othink_ray.engines.base import RendezvousInfo


class Engines(Protocol):
    """The engines' end, as vLLM's sender calls it; the runtime provides one over Ray."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


NamedWeights = Callable[[], Iterator[tuple[str, Tensor]]]


class Sender(Protocol):
    """Sends the whole policy; called on every learner rank."""

    def send_weights(self) -> None: ...


def open_sender(
    backend: str,
    named_weights: NamedWeights,
    engines: Engines,
    place: RendezvousInfo,
    *,
    port: int,
    receivers: int,
    bucket_bytes: int,
) -> Sender:
    """Meets the engines and returns a sender; rank 0 sends, the others join its gathering under ZeRO-3.

    A bucket holds `bucket_bytes`, or the largest weight alone where that is more.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class PolicySource(WeightSource):  # type: ignore[misc]  # vLLM is untyped here
        """The learner's weights, whole, in one fixed order."""

        def __init__(self) -> None:
            self._metadata = [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in named_weights()]

        def metadata(self) -> list[ParamMeta]:
            return self._metadata

        def largest(self) -> int:
            """Bytes of the largest weight."""
            return max(int(math.prod(one.shape)) * int(one.dtype.itemsize) for one in self._metadata)

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return named_weights()

    source = PolicySource()
    meeting = {
        "nccl": lambda: NCCLTrainerInitInfo(
            rank=place.rank,
            master_address=place.master_address,
            master_port=port,
            world_size=1 + receivers,
            packed_buffer_size_bytes=bucket_bytes,
        ),
        # Its buffer has a fixed size and refuses a weight that is larger, where NCCL's grows by that one weight. Every
        # rank has all shapes and comes to the same size: they must cut the weights into the same buckets.
        "ipc": lambda: IPCTrainerInitInfo(
            rank=place.rank, packed=True, packed_buffer_size_bytes=max(bucket_bytes, source.largest())
        ),
    }
    sender: Sender = WeightTransferTrainerFactory.trainer_init(meeting[backend](), client=engines, source=source)
    return sender

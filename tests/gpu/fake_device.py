"""A fake GPU device in host memory, so that vLLM's GPU code runs between real processes on CPUs.

Only what needs a device is replaced: a CUDA IPC handle is a file that two processes map, NCCL is vLLM's
StatelessProcessGroup over sockets, and the sleep-mode allocator overwrites the weights.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = "GPU-0000"  # the same UUID in both processes
FOLDER = "PRETEND_FOLDER"  # environment variable with the folder of the handles
_MODULES = (
    *(f"vllm.distributed.weight_transfer.{name}" for name in ("base", "ipc_engine", "nccl_engine", "nccl_common")),
    "vllm.distributed.weight_transfer.packed_tensor",
    "vllm.v1.worker.gpu_worker",
)


class Stream:
    """A CUDA stream on which all work has finished."""

    def __init__(self, device: int = 0) -> None: ...

    def synchronize(self) -> None: ...


class PretendedTorch:
    """The torch module with one fake device, for vLLM's modules."""

    def __init__(self, meta: bool) -> None:
        self.meta = meta  # device tensors are meta tensors
        self.cuda = SimpleNamespace(
            Stream=Stream,
            current_stream=Stream,
            get_device_properties=lambda _index: SimpleNamespace(uuid=DEVICE),
            ipc_collect=lambda: None,
            is_available=lambda: True,
            stream=lambda _stream: contextlib.nullcontext(),
            synchronize=lambda: None,
        )
        self.accelerator = SimpleNamespace(
            current_device_index=lambda: 0, get_memory_info=lambda: (0, 0), synchronize=lambda: None
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, *, dtype: torch.dtype, device: Any) -> Tensor:
        if self.meta:
            return torch.empty(size, dtype=dtype, device="meta")
        return _file_of(size, dtype) if device == "cuda" else torch.empty(size, dtype=dtype)


_numbers = itertools.count()
_files: dict[int, Path] = {}  # by the address of their first byte


def _file_of(size: int, dtype: torch.dtype) -> Tensor:
    path = Path(os.environ[FOLDER]) / f"{os.getpid()}_{next(_numbers)}"
    memory = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    _files[memory.data_ptr()] = path
    return memory


def _export(memory: Tensor) -> tuple[None, tuple[Any, ...]]:
    """Replace torch's `reduce_tensor`: return a function and the arguments to rebuild the tensor elsewhere."""
    path = None if memory.is_meta else str(_files[memory.data_ptr()])
    return None, (path, memory.numel(), memory.dtype, None, None, None, 0)


def _import(path: str | None, size: int, dtype: torch.dtype, *_rest: Any) -> Tensor:
    if path is None:
        return torch.empty(size, dtype=dtype, device="meta")
    return torch.from_file(path, shared=True, size=size, dtype=dtype)


class SocketCommunicator:
    """Replaces NCCL's communicator by vLLM's process group, which broadcasts over sockets."""

    def __init__(self, group: Any, device: Any) -> None:
        self.group = group

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        tensor.copy_(self.group.broadcast(tensor, src))

    def destroy(self) -> None: ...


class PretendedMemory:
    """Fake of vLLM's sleep-mode allocator: level 1 keeps the weights on the host, level 2 loses them."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.kept: dict[str, Tensor] = {}
        self.calls: list[str] = []

    def suspend(self, level: int) -> None:
        self.calls.append(f"suspend at level {level}")
        tensors = self._weights()
        self.kept = {name: tensor.detach().clone() for name, tensor in tensors.items()} if level == 1 else {}
        for tensor in tensors.values():
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)

    def resume(self, tags: list[str] | None) -> None:
        self.calls.append(f"resume {tags}")
        if tags is None or "weights" in tags:
            for name, tensor in self._weights().items():
                if name in self.kept:
                    tensor.data.copy_(self.kept[name])
            self.kept = {}

    def _weights(self) -> dict[str, Tensor]:
        """Return all tensors that vLLM allocates while it builds the network."""
        network = self.worker.model_runner.get_model()
        return dict(network.named_parameters()) | dict(network.named_buffers()) | plain_tensors(network)


def plain_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return tensors in list attributes of modules, which are neither parameters nor buffers."""
    return {
        f"{path}.{name}.{index}".lstrip("."): tensor
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, list)
        for index, tensor in enumerate(value)
        if isinstance(tensor, Tensor)
    }


@contextlib.contextmanager
def device(*, meta: bool = False) -> Iterator[None]:
    """Let vLLM's weight transfer find a GPU in this process, inside this context."""
    from importlib import import_module

    from torch.multiprocessing import reductions
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    pretended = PretendedTorch(meta)
    with contextlib.ExitStack() as undo:
        for name in _MODULES:
            _replace(undo, import_module(name), "torch", pretended)
        _replace(undo, packed_tensor, "reduce_tensor", _export)
        _replace(undo, reductions, "rebuild_cuda_tensor", _import)
        _replace(undo, pynccl, "PyNcclCommunicator", SocketCommunicator)
        # The CPU worker ignores sleep; these tests check the GPU worker's code.
        memory = property(lambda worker: worker.__dict__.setdefault("pretended", PretendedMemory(worker)))
        _replace(undo, CPUWorker, "sleep_mode_backend", memory)
        for verb in ("sleep", "wake_up"):
            _replace(undo, CPUWorker, verb, getattr(Worker, verb))
        _replace(undo, CPUWorker, "synchronize_device", lambda worker: None)
        _replace(undo, CPUWorker, "finish_weight_update", _finish)
        packed_tensor._get_streams.cache_clear()
        yield
        packed_tensor._get_streams.cache_clear()


def _finish(worker: Any) -> None:
    """Finish an update and repack the matrices for the CPU kernels; GPU kernels have no packed copies."""
    from vllm.v1.worker.gpu_worker import Worker

    from othink_ray.engines.vllm_worker import _pack

    Worker.finish_weight_update(worker)
    for _, module in worker.packed:
        _pack(module, remove_weight=False)


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    had = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    undo.callback(lambda: setattr(owner, name, before) if had else delattr(owner, name))


def with_transfer(arguments: dict[str, Any], transport: str) -> dict[str, Any]:
    """Add the GPU engine's transfer arguments to a CPU engine's arguments."""
    return arguments | ({"weight_transfer_config": {"backend": transport}} if transport in ("ipc", "nccl") else {})


def serve(pipe: Any, setup: Any, transport: str, gpu: int | None, changes: dict[str, Any]) -> None:
    """Run the GPU check's engine process with the fake device."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.gpu import engine_process
    from othink_ray.engines.vllm_rollout import VLLMRollout

    plain = VLLMRollout.arguments

    def arguments(*inputs: Any, **named: Any) -> dict[str, Any]:
        return with_transfer(plain(*inputs, **named), transport)

    VLLMRollout.arguments = staticmethod(arguments)  # type: ignore[method-assign]
    with device():
        engine_process.serve_engine(pipe, setup, transport, None, changes)

"""An engine in a separate process, as CUDA IPC requires, called through a pipe, one method at a time."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from benchmarks.gpu.generating import open_engine
from benchmarks.gpu.rows import failed
from benchmarks.gpu.setup import Setup

_STOP_SECONDS = 20


class EngineError(RuntimeError):
    """The engine's process raised an error or exited."""


class EngineProcess:
    """Context manager of an engine's process; also the engines' end of vLLM's weight transfer."""

    def __init__(self, setup: Setup, *, transport: str, gpu: int | None = None, **changes: Any) -> None:
        """Start the process; `gpu` is the index of a separate device."""
        spawn = multiprocessing.get_context("spawn")
        self.pipe, child_end = spawn.Pipe()
        self.process = spawn.Process(target=serve_engine, args=(child_end, setup, transport, gpu, changes))
        self.process.start()
        child_end.close()  # otherwise recv would not see EOF when the process exits

    def __enter__(self) -> Self:
        self._result()  # the engine is open
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pipe.close()
        self.process.join(_STOP_SECONDS)
        self.process.kill()
        self.process.join()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine and return its result."""
        self.pipe.send((method, arguments))
        return self._result()

    def _result(self) -> Any:
        try:
            succeeded, result = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise EngineError(f"the engine's process exited with status {self.process.exitcode}") from None
        if not succeeded:
            raise EngineError(result)
        return result

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("transfer", "init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self.call("transfer", "start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.call("transfer", "update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("transfer", "finish_weight_update")


def serve_engine(pipe: Connection, setup: Setup, transport: str, gpu: int | None, changes: dict[str, Any]) -> None:
    """Open an engine and serve calls from the pipe until it closes."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    try:
        engine: Any = open_engine(setup, transport=transport, **changes)
        pipe.send((True, None))
    except Exception as error:
        pipe.send((False, failed("", error).error))
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = getattr(engine, method)(*arguments)
            pipe.send((True, list(result) if method == "generate" else result))
        except Exception as error:
            pipe.send((False, failed("", error).error))

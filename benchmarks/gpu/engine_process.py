"""An engine in a process of its own, which CUDA IPC needs: asked through a pipe, one verb at a time."""

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
    """What the engine's process said, or that it is gone."""


class EngineProcess:
    """Open it with `with`. It is the engines' end of vLLM's weight transfer too."""

    def __init__(self, setup: Setup, *, transport: str, gpu: int | None = None, **changes: Any) -> None:
        """`gpu` is the number of a device of its own."""
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve_engine, args=(theirs, setup, transport, gpu, changes))
        self.process.start()
        theirs.close()  # or the end of the process would not be the end of the pipe

    def __enter__(self) -> Self:
        self._answer()  # that it is open
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pipe.close()
        self.process.join(_STOP_SECONDS)
        self.process.kill()
        self.process.join()

    def ask(self, verb: str, *arguments: Any) -> Any:
        self.pipe.send((verb, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            done, found = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise EngineError(f"the engine's process ended with {self.process.exitcode}") from None
        if not done:
            raise EngineError(found)
        return found

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.ask("transfer", "init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self.ask("transfer", "start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.ask("transfer", "update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.ask("transfer", "finish_weight_update")


def serve_engine(pipe: Connection, setup: Setup, transport: str, gpu: int | None, changes: dict[str, Any]) -> None:
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
            verb, arguments = pipe.recv()
        except EOFError:
            return
        try:
            found = getattr(engine, verb)(*arguments)
            pipe.send((True, list(found) if verb == "generate" else found))
        except Exception as error:
            pipe.send((False, failed("", error).error))

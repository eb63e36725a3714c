"""Compare answers with math-verify in a separate process that can be killed: an expression may never finish."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

from othink_ray.rewards.base import GradingFailed

_START_TIMEOUT_S = 120  # importing sympy takes about a second, and much longer on an overloaded machine
_WALL_PER_CPU = 10  # wall-clock limit as a multiple of an answer's CPU limit; past it the whole process is killed

SymbolicVerdict: TypeAlias = Literal["right", "wrong", "timeout", "crash"]
_VERDICTS: dict[bytes, SymbolicVerdict] = {b"1": "right", b"0": "wrong", b"t": "timeout", b"c": "crash"}


class SymbolicProcess:
    """math-verify behind a pipe, started on the first call; not thread-safe."""

    worker = Path(__file__).with_name("sandbox_worker.py")  # the script that the process runs

    def __init__(self, *, answer_cpu_s: float, memory_mb: int) -> None:
        self.answer_cpu_s, self.memory_mb = answer_cpu_s, memory_mb
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the grading process, or None while it is not running."""
        return self._process.pid if self._process else None

    def equal(self, truth: str, stated: str) -> SymbolicVerdict:
        """Return the verdict on one answer after at most `answer_cpu_s` of CPU time, start-up excluded.

        `crash` means that the process ended for another reason than the time limit, e.g. memory above its limit. If
        math-verify catches the MemoryError itself, the verdict is `wrong`.
        """
        line = json.dumps([truth, stated]).encode() + b"\n"
        for _ in range(2):  # retry once: a process that died while idle is restarted
            process = self._ensure_started()
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                self.close()
                continue
            reply = self._read(process, _WALL_PER_CPU * self.answer_cpu_s)
            if reply in _VERDICTS:
                return _VERDICTS[reply]
            self.close()
            return "timeout" if reply is None else "crash"
        raise GradingFailed(
            "the grading process exited twice right after it started. If memory ran out, raise algo.reward.memory_mb "
            f"(now {self.memory_mb})."
        )

    def close(self) -> None:
        """Kill the process and its child."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads its own session, so this reaches the child too
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # unflushed input of the killed process
                pipe.close()
        process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ensure_started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        with tempfile.TemporaryFile() as stderr:
            # -P keeps this folder off sys.path: its modules (numbers.py) would shadow the standard library.
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", str(self.worker), str(self.answer_cpu_s), str(self.memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # one process group to kill; Ctrl-C reaches only the main process
            )
            if self._read(process, _START_TIMEOUT_S) != b"+":
                self.close()
                stderr.seek(0)
                timed_out = f"not ready within {_START_TIMEOUT_S} s"
                last = stderr.read().decode(errors="replace").strip().splitlines()[-1:] or [timed_out]
                raise GradingFailed(
                    f"the grading process did not start: {last[0]}. Is math-verify installed? If memory ran out, "
                    f"raise algo.reward.memory_mb (now {self.memory_mb})."
                )
        return process

    @staticmethod
    def _read(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        """Read one byte; return b"" if the process ended and None on timeout."""
        assert process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                return os.read(process.stdout.fileno(), 1)
        return None

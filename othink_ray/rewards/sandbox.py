"""Symbolic comparison in a process that can be killed: an answer may be a computation without an end."""

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

_PROGRAM = Path(__file__).with_name("sandbox_worker.py")
_START_TIMEOUT_S = 120  # loading sympy takes a second; on a crowded machine, many
_CROWDED = 10  # the clock may run this much longer than an answer's CPU time before all is killed from here

Outcome: TypeAlias = Literal["right", "wrong", "timeout", "crash"]
_OUTCOMES: dict[bytes, Outcome] = {b"1": "right", b"0": "wrong", b"t": "timeout", b"c": "crash"}


class GradingFailed(RuntimeError):
    """The grading process does not work at all: the installation's fault, not an answer's."""


class SymbolicProcess:
    """math-verify behind a pipe, started when it is first asked; not for several threads."""

    def __init__(self, *, answer_cpu_s: float, memory_mb: int) -> None:
        self.answer_cpu_s, self.memory_mb = answer_cpu_s, memory_mb
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def equal(self, truth: str, stated: str) -> Outcome:
        """Over within `answer_cpu_s`, start-up aside.

        `crash`: its process ended of something else, memory above the limit for one; where math-verify catches that
        itself, the answer is `wrong`.
        """
        line = json.dumps([truth, stated]).encode() + b"\n"
        for _ in range(2):  # a process that ended while idle is replaced
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                self.close()
                continue
            answer = self._read(process, _CROWDED * self.answer_cpu_s)
            if answer in _OUTCOMES:
                return _OUTCOMES[answer]
            self.close()
            return "timeout" if answer is None else "crash"
        raise GradingFailed("the grading process ends as soon as it starts")

    def close(self) -> None:
        """Ends the process and its child, whatever they do."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: all its processes
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a line that nobody will read
                pipe.close()
        process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        with tempfile.TemporaryFile() as complaints:
            # -P: the folder of the program, with our modules of everyday names, stays off the import path.
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(self.answer_cpu_s), str(self.memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,  # one group to kill, and Ctrl-C is the run's to handle
            )
            if self._read(process, _START_TIMEOUT_S) != b"+":
                self.close()
                complaints.seek(0)
                last = complaints.read().decode(errors="replace").strip().splitlines()[-1:] or ["it was too slow"]
                raise GradingFailed(
                    f"the grading process did not start: {last[0]}. Is math-verify installed? If memory ran out, "
                    f"raise algo.reward.memory_mb (now {self.memory_mb})."
                )
        return process

    @staticmethod
    def _read(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        """One byte; empty when the process ended, None when the time was over."""
        assert process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                return os.read(process.stdout.fileno(), 1)
        return None

"""Runs tests over a copy of the tree in which one file is mutated: a worker's tree, and what its tests say of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.mutants.changes import Mutant
from tests.mutants.table import Table

_LINKED = ("conf", "docs", "launch", "Makefile", "README.md", "pyproject.toml")


class Trials:
    """One worker: its tree, and for the pure rooms its fork server. Leaves nothing behind."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._place = tempfile.TemporaryDirectory(prefix="mutants_")
        self.tree = Path(self._place.name) / "tree"
        self.tree.mkdir()
        for part in ("othink_ray", "tests"):  # tests find the package beside them: a link would lead to the true one
            shutil.copytree(table.root / part, self.tree / part)
        for part in _LINKED:
            (self.tree / part).symlink_to(table.root / part)
        self._environment = os.environ | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the tests' bytecode is for all mutants
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._server.wait(5)
            self._server.kill()
        self._place.cleanup()

    def status(self, file: str, mutant: Mutant | None, timeout_s: float, tests: Sequence[str] = ()) -> int | None:
        """Pytest's exit status with the mutant (None: as it is); None where it had to be stopped."""
        target = self.tree / "othink_ray" / file
        true = target.read_text()
        self._write(target, mutant.source if mutant else true)
        try:
            run = self._forked if file in self._table.pure else self._alone
            return run(list(tests or self._table.covering(file)), timeout_s)
        finally:
            self._write(target, true)

    def _write(self, target: Path, source: str) -> None:
        """Bytecode goes too: made within the same second, a mutant's may pass for that of the next one."""
        target.write_text(source)
        for stale in target.parent.glob(f"__pycache__/{target.stem}.*"):
            stale.unlink()

    @property
    def screen(self) -> Path:
        """What the last tests printed."""
        return Path(self._place.name) / "screen.txt"

    def _forked(self, tests: list[str], timeout_s: float) -> int | None:
        server = self._server or self._serve()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps({"tests": tests, "timeout_s": timeout_s, "screen": str(self.screen)}) + "\n")
        server.stdin.flush()
        status: Any = json.loads(server.stdout.readline())
        return None if status is None else int(status)

    def _serve(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.mutants.fork_server"]
        # Ctrl-C is for the program alone, which then lets its workers end.
        self._server = subprocess.Popen(
            command,
            cwd=self.tree,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self._server.stdout is not None
        if self._server.stdout.readline().strip() != "ready":
            raise RuntimeError("the fork server did not start: python -m tests.mutants.fork_server")
        return self._server

    def _alone(self, tests: list[str], timeout_s: float) -> int | None:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
        with self.screen.open("w") as screen:
            process = subprocess.Popen(
                command,
                cwd=self.tree,
                env=self._environment,
                stdout=screen,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.terminate()  # Ray's processes go when their driver does
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                return None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

"""Runs tests on a copy of the tree in which one file is mutated."""

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
    """One worker: its tree and, for pure files, its fork server; removes both at the end."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._place = tempfile.TemporaryDirectory(prefix="mutants_")
        self.tree = Path(self._place.name) / "tree"
        self.tree.mkdir()
        for part in ("othink_ray", "tests"):  # copies: through a link the tests would import the original package
            shutil.copytree(table.root / part, self.tree / part)
        for part in _LINKED:
            (self.tree / part).symlink_to(table.root / part)
        self._environment = os.environ | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)  # all mutants share the tests' bytecode
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
        """Return pytest's exit status with the mutant (None: unchanged code); None if it was stopped at the limit."""
        target = self.tree / "othink_ray" / file
        true = target.read_text()
        self._write(target, mutant.source if mutant else true)
        try:
            run = self._forked if file in self._table.pure else self._alone
            return run(list(tests or self._table.covering(file)), timeout_s)
        finally:
            self._write(target, true)

    def _write(self, target: Path, source: str) -> None:
        """Write the file and delete its bytecode: a mutant's bytecode of the same second could pass for the next's."""
        target.write_text(source)
        for stale in target.parent.glob(f"__pycache__/{target.stem}.*"):
            stale.unlink()

    @property
    def screen(self) -> Path:
        """File with the output of the last tests."""
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
        # In a new session: Ctrl-C must reach only the program, which lets its workers finish.
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
                process.terminate()  # Ray's processes end with their driver
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                return None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

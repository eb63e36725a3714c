"""JSONL files of a run, a line a step: without gap or double even where it stops or its disk is full for a while."""

from __future__ import annotations

import errno
import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path

from othink_ray.whole_file import write_whole

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_MOST_WAITING = 1000  # lines; those of samples.jsonl hold images


class StepLines:
    """Appends whole lines or none: what finds no room waits for it in memory."""

    def __init__(self, path: Path, last_kept_step: int, tell: Callable[[str], None]) -> None:
        """The file goes on after `last_kept_step`; later and torn lines are set aside in `*.discarded.jsonl`."""
        self._path, self._tell = path, tell
        _cut_after(path, last_kept_step)
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._waiting: deque[bytes] = deque()

    def append(self, line: str) -> None:
        waited = len(self._waiting)
        self._waiting.append(line.encode() + b"\n")
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._file.truncate(self._size)
            if error.errno not in _NO_ROOM or waited >= _MOST_WAITING:
                raise
            if not waited:
                self._tell(f"{self._path.name} has no room on the disk: its lines wait in memory until there is some")
            return
        if waited:
            self._tell(f"{self._path.name} is written again, lines that waited first ({waited})")

    def _write(self, line: bytes) -> None:
        written = 0
        while written < len(line):
            written += self._file.write(line[written:])
        self._size += written

    def close(self) -> None:
        self._file.close()


def _cut_after(path: Path, last_kept_step: int) -> None:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.split("\n") if line]
    discarded = [line for line in lines if _step_of(line) > last_kept_step]
    if discarded:
        with path.with_name(f"{path.stem}.discarded.jsonl").open("a", encoding="utf-8") as aside:
            aside.writelines(line + "\n" for line in discarded)
    kept = "".join(line + "\n" for line in lines if _step_of(line) <= last_kept_step)
    if kept != text:
        write_whole(path, kept)


def _step_of(line: str) -> float:
    """The step of a JSONL line; infinity for a torn one, which is beyond every step."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else math.inf

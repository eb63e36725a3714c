"""Atomic file replacement: a reader sees the old content or the new one, never a partial write."""

from __future__ import annotations

import os
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Write `text` to a `.part` file beside `path`, fsync it and rename it over `path`."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # the disk may be full: free the space
        partial.unlink(missing_ok=True)
        raise

"""A reward of the user's own: a function in a Python file, named by `algo.reward.own`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomReward:
    """Read where the run starts: the processes that grade need no such file on their nodes."""

    name: str
    file: str
    source: str

    def function(self) -> Callable[[str, str], float]:
        """Of a completion's text and the true answer. Runs the user's file; what a model wrote is never run."""
        names: dict[str, Any] = {"__name__": "own_reward", "__file__": self.file}
        exec(compile(self.source, self.file, "exec"), names)
        function: Callable[[str, str], float] = names[self.name]
        return function


def parts_of(own: str) -> tuple[Path, str]:
    """FILE.py:FUNCTION."""
    file, _, name = own.rpartition(":")
    return Path(file).expanduser(), name


def load_custom_reward(own: str | None) -> CustomReward | None:
    if own is None:
        return None
    file, name = parts_of(own)
    return CustomReward(name=name, file=str(file), source=file.read_text(encoding="utf-8"))

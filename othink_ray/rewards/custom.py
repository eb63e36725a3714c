"""Load a custom reward: a function in a Python file, named by `algo.reward.custom=FILE.py:FUNCTION`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomReward:
    """Source of a custom reward, read on the driver so that reward actors on other nodes do not need the file."""

    name: str
    file: str
    source: str

    def function(self) -> Callable[[str, str], float]:
        """Execute the file and return its function (completion text, true answer) -> reward.

        Only the user's file is executed, never text that a model wrote.
        """
        names: dict[str, Any] = {"__name__": "own_reward", "__file__": self.file}
        exec(compile(self.source, self.file, "exec"), names)
        function: Callable[[str, str], float] = names[self.name]
        return function


def load_custom_reward(spec: str | None) -> CustomReward | None:
    """Read the file of a FILE.py:FUNCTION spec; return None without a spec."""
    if spec is None:
        return None
    file, name = _parse_spec(spec)
    return CustomReward(name=name, file=str(file), source=file.read_text(encoding="utf-8"))


def _parse_spec(spec: str) -> tuple[Path, str]:
    file, _, name = spec.rpartition(":")
    return Path(file).expanduser(), name

"""Counting and geometry in turn: for a model that is to be examined in both."""

from __future__ import annotations

from othink_ray.config.schema import DataConfig
from othink_ray.data.geometry_scenes import GeometryScenes
from othink_ray.data.prompts import Split
from othink_ray.data.scenes import SceneCounting
from othink_ray.types import Prompt


class BothScenes:
    """Even rows count, odd rows are geometry; they are the first ones of the two tasks."""

    def __init__(self, data: DataConfig, split: Split) -> None:
        size = data.part(split).size
        assert size is not None, "config.check: generated questions have a size"
        self._size = size
        self._tasks = (SceneCounting(data, split), GeometryScenes(data, split))

    def __len__(self) -> int:
        return self._size

    def prompt(self, index: int) -> Prompt:
        if not 0 <= index < self._size:
            raise IndexError(f"both_scenes has rows 0 to {self._size - 1}, not {index}")
        number, task = divmod(index, len(self._tasks))
        return self._tasks[task].prompt(number)

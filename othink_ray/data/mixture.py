"""Mixture of the counting and geometry tasks, for a model evaluated on both."""

from __future__ import annotations

from othink_ray.config.schema import DataConfig
from othink_ray.data.prompts import Split
from othink_ray.data.scenes.counting import SceneCounting
from othink_ray.data.scenes.geometry import GeometryScenes
from othink_ray.types import Prompt

GEOMETRY_ROWS = 3  # per counting row: geometry takes that much longer to learn


class BothScenes:
    """Interleaves one counting row with three geometry rows, taking the first rows of each task in order."""

    def __init__(self, data: DataConfig, split: Split) -> None:
        size = data.part(split).size
        assert size is not None, "config.check: generated questions have a size"
        self._size = size
        self._counting, self._geometry = SceneCounting(data, split), GeometryScenes(data, split)

    def __len__(self) -> int:
        return self._size

    def prompt(self, index: int) -> Prompt:
        if not 0 <= index < self._size:
            raise IndexError(f"both_scenes has rows 0 to {self._size - 1}, not {index}")
        block, offset = divmod(index, 1 + GEOMETRY_ROWS)
        return self._geometry.prompt(block * GEOMETRY_ROWS + offset - 1) if offset else self._counting.prompt(block)

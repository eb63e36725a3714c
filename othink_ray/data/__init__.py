"""Questions with images: sources, the rows they hold, and the order in which they are asked."""

from __future__ import annotations

from collections.abc import Callable

from othink_ray.config.schema import DataConfig
from othink_ray.data.prompts import BadRow, Source, Split, validate, worked_answer
from othink_ray.data.scenes import SceneCounting
from othink_ray.data.stream import PromptStream

SOURCES: dict[str, Callable[[DataConfig, Split], Source]] = {
    "scenes": SceneCounting,
}


def open_source(data: DataConfig, split: Split) -> Source:
    """The split of the data set that the config names."""
    if data.source not in SOURCES:
        raise ValueError(f"data.source={data.source!r} is not a data source; choose one of: {', '.join(SOURCES)}")
    return SOURCES[data.source](data, split)


__all__ = ["SOURCES", "BadRow", "PromptStream", "Source", "Split", "open_source", "validate", "worked_answer"]

"""Data sets of prompts with images: sources, validated rows, and the shuffled stream that training reads."""

from __future__ import annotations

from collections.abc import Callable

from othink_ray.config.schema import DataConfig
from othink_ray.data.mixture import BothScenes
from othink_ray.data.prompt_stream import LengthFilter, PromptStream, StreamingRows
from othink_ray.data.prompts import BadRow, Source, Split, validate, worked_answer
from othink_ray.data.scenes.counting import SceneCounting
from othink_ray.data.scenes.geometry import GeometryScenes
from othink_ray.data.sources import FileRows
from othink_ray.data.tables import SourceError

SOURCES: dict[str, Callable[[DataConfig, Split], Source]] = {
    "scenes": SceneCounting,
    "geometry_scenes": GeometryScenes,
    "both_scenes": BothScenes,
    "hub": FileRows,
    "parquet": FileRows,
    "jsonl": FileRows,
    "disk": FileRows,
    "easy_vqa": FileRows,
}


def open_source(data: DataConfig, split: Split) -> Source:
    """Return the configured data set's split with random access by row number."""
    name = data.part(split).source
    if name not in SOURCES:
        raise ValueError(f"data.{split}.source={name!r} is not a data source; choose one of: {', '.join(SOURCES)}")
    return SOURCES[name](data, split)


def open_training(data: DataConfig) -> Source | StreamingRows:
    """Return the training split: streamed if `data.train.files.stream_buffer` is set, else with random access."""
    files = data.train.files
    return StreamingRows(data, "train") if files and files.stream_buffer else open_source(data, "train")


__all__ = [
    "SOURCES",
    "BadRow",
    "LengthFilter",
    "PromptStream",
    "Source",
    "SourceError",
    "Split",
    "open_source",
    "open_training",
    "validate",
    "worked_answer",
]

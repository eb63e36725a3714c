"""From a raw row of a data set to the question that is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from othink_ray.config.schema import DataConfig
from othink_ray.data.image_files import ImageFiles, UnreadableImage
from othink_ray.data.prompts import BadRow, Split, validate
from othink_ray.data.tables import SourceError, find_files, image_columns
from othink_ray.types import Message, Prompt

MARKER = "<image>"  # many data sets mark with it where an image belongs; here images stand before the text
_WORKED = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


class RowReader:
    """Makes prompts of one split's rows: columns, images, and the solution taken apart."""

    def __init__(self, data: DataConfig, split: Split) -> None:
        part = data.part(split)
        assert part.files is not None, "config.check: a source of files has its files section"
        self._data = data
        self._columns = part.files.columns
        self._image_columns = image_columns(part.files)
        root = image_root(part.source, part.files.path, part.files.image_root, f"data.{split}.files")
        self._files = ImageFiles(root, outside=data.images_outside_root)

    def prompt(self, row_id: str, row: Mapping[str, Any]) -> Prompt:
        """The validated question; BadRow names what is wrong with it."""
        images = tuple(
            image
            for column in self._image_columns
            for value in _listed(row.get(column))
            for image in [self._image(row_id, column, value)]
        )
        if self._image_columns and not images:
            reason = f"it holds no image in column {' or '.join(self._image_columns)}"
            raise BadRow(row_id, reason, "fill it in or remove the row")
        question = _text(row.get(self._columns.question))
        marked = question.count(MARKER)
        if marked and marked != len(images):
            reason = f"its question has {marked} {MARKER} marker(s) but the row holds {len(images)} image(s)"
            raise BadRow(row_id, reason, "mend the question, or the column mapping")
        question = question.replace(MARKER, "").strip()
        thought, answer = solution(_text(row.get(self._columns.answer)))
        text = f"{question} {self._data.prompt_suffix}".strip() if question else ""
        return validate(
            Prompt(
                id=row_id,
                messages=(Message(role="user", text=text, images=len(images)),),
                images=images,
                answer=answer,
                task=self._data.task,
                thought=thought,
            )
        )

    def _image(self, row_id: str, column: str, value: Any) -> bytes:
        """An image as bytes, as {bytes, path}, or as a path from the image root."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise BadRow(row_id, f"column {column} holds no image but {value!r}", "give bytes or a path")
        try:
            return self._files.read(value)
        except UnreadableImage as error:
            raise BadRow(row_id, str(error), error.remedy) from error


def image_root(source: str, path: str, configured: str | None, key: str) -> Path:
    """The folder from which image paths start: the configured one, or that of the file they are written in."""
    if configured is not None:
        if not Path(configured).is_dir():
            raise SourceError(f"{key}.image_root = {configured} is not a folder; paths start from {Path.cwd()}")
        return Path(configured)
    if source in ("parquet", "jsonl"):
        return find_files(source, path, key)[0].parent
    return Path(path) if source == "disk" else Path()


def solution(text: str) -> tuple[str, str]:
    """Thought and answer of a solution: `3`, `<answer> 3 </answer>`, or `<think> … </think><answer> 3 </answer>`."""
    worked = _WORKED.fullmatch(text)
    if worked is not None:
        return worked["thought"].strip(), worked["answer"].strip()
    return "", text.strip().removeprefix("<answer>").removesuffix("</answer>").strip()


def _listed(value: Any) -> list[Any]:
    """The images of one column: none, one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _text(value: Any) -> str:
    return "" if value is None else str(value)

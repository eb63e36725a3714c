"""From a raw row of a data set to the question that is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from othink_ray.config.schema import DataConfig
from othink_ray.data.images import ImageFiles, UnreadableImage
from othink_ray.data.prompts import BadRow, Split, validate
from othink_ray.data.tables import SourceError, find_files, image_columns, open_table
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


class FileRows:
    """One split of a hub, parquet, JSONL or disk data set.

    A row is named by its number, or by its id column. Where that column repeats a value, or has none, the row's number
    is added, so that no two rows share a name.
    """

    def __init__(self, data: DataConfig, split: Split) -> None:
        part = data.part(split)
        assert part.files is not None, "config.check: a source of files has its files section"
        self._reader = RowReader(data, split)
        self._table = open_table(part.source, part.files, f"data.{split}.files")
        self._size = min(len(self._table), part.size or len(self._table))
        self._name = f"{data.name}/{split}"
        self._ids: list[str] | None = None
        if part.files.columns.id is not None:
            self._ids = unique(self._table.column(part.files.columns.id)[: self._size])

    def __len__(self) -> int:
        return self._size

    def prompt(self, index: int) -> Prompt:
        """Row `index`; a row that cannot be read is a BadRow like any other."""
        if not 0 <= index < self._size:
            raise IndexError(f"{self._name} has rows 0 to {self._size - 1}, not {index}")
        row_id = f"{self._name}/{index:06d}" if self._ids is None else f"{self._name}/{self._ids[index]}"
        try:
            row = self._table.row(index)
        except ValueError as error:
            raise BadRow(row_id, f"it cannot be read: {error}", "mend it or remove it") from error
        return self._reader.prompt(row_id, row)


def unique(values: list[object]) -> list[str]:
    """The values as text, each with its row number where it is missing or was there before."""
    seen: set[str] = set()
    names: list[str] = []
    for index, value in enumerate(values):
        name = "" if value is None else str(value)
        if not name or name in seen:
            name = f"{name}#{index:06d}"
        seen.add(name)
        names.append(name)
    return names

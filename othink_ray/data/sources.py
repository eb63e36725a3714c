"""Conversion of raw data set rows to prompts, reading of image files, and the file-based sources."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from othink_ray.config.schema import DataConfig
from othink_ray.data.prompts import BadRow, Split, validate
from othink_ray.data.tables import SourceError, find_files, image_columns, open_table
from othink_ray.types import Message, Prompt

MARKER = "<image>"  # marks an image's position in many data sets; here all images precede the text
MAX_FILE_BYTES = 256 * 2**20  # an uncompressed image of 50 million RGB pixels is 150 MB
_WORKED = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


class UnreadableImage(ValueError):
    """An image file that cannot be read, with the reason and the remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class ImageFiles:
    """Reads regular files below a root folder, symlinks resolved; other files only if `outside` is true."""

    def __init__(self, root: Path, *, outside: bool) -> None:
        self._root, self._real_root, self._outside = root, root.resolve(), outside

    def read(self, name: str) -> bytes:
        """Return the file's bytes, without blocking on devices or pipes."""
        path = self._root / name
        try:
            if not (self._outside or path.resolve().is_relative_to(self._real_root)):
                raise UnreadableImage(
                    f"image file {path} is outside {self._root}",
                    "move it there, set image_root, or set data.images_outside_root=true if you trust these paths",
                )
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UnreadableImage(f"image file {path} is not a regular file", "give the path of an image file")
                data = file.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:
            if isinstance(error, UnreadableImage):
                raise
            raise UnreadableImage(
                f"image file {path} cannot be read: {error.__class__.__name__}",
                "check that it exists, or set image_root: image paths are relative to it",
            ) from error
        if len(data) > MAX_FILE_BYTES:
            raise UnreadableImage(
                f"image file {path} is larger than {MAX_FILE_BYTES >> 20} MiB", "use a smaller image file"
            )
        return data


class RowReader:
    """Converts raw rows of one split to prompts: maps columns, loads images, splits the solution."""

    def __init__(self, data: DataConfig, split: Split) -> None:
        part = data.part(split)
        assert part.files is not None, "config.check: a source of files has its files section"
        self._data = data
        self._columns = part.files.columns
        self._image_columns = image_columns(part.files)
        root = image_root(part.source, part.files.path, part.files.image_root, f"data.{split}.files")
        self._files = ImageFiles(root, outside=data.images_outside_root)

    def prompt(self, row_id: str, row: Mapping[str, Any]) -> Prompt:
        """Return the validated prompt of a row, or raise BadRow with the reason."""
        images = tuple(
            image
            for column in self._image_columns
            for value in _as_list(row.get(column))
            for image in [self._image(row_id, column, value)]
        )
        if self._image_columns and not images:
            reason = f"no image in column {' or '.join(self._image_columns)}"
            raise BadRow(row_id, reason, "fill it in or remove the row")
        question = _text(row.get(self._columns.question))
        markers = question.count(MARKER)
        if markers and markers != len(images):
            reason = f"its question has {markers} {MARKER} marker(s) but the row has {len(images)} image(s)"
            raise BadRow(row_id, reason, "fix the question or the column mapping")
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
        """Return the image's bytes; `value` is bytes, a {bytes, path} struct, or a path relative to the image root."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise BadRow(row_id, f"column {column} must hold image bytes or a path, not {value!r}", "fix the row")
        try:
            return self._files.read(value)
        except UnreadableImage as error:
            raise BadRow(row_id, str(error), error.remedy) from error


def image_root(source: str, path: str, configured: str | None, key: str) -> Path:
    """Return the folder that image paths are relative to: the configured one, else the data file's folder."""
    if configured is not None:
        if not Path(configured).is_dir():
            raise SourceError(
                f"{key}.image_root = {configured} is not a folder; relative paths start from {Path.cwd()}"
            )
        return Path(configured)
    if source in ("parquet", "jsonl"):
        return find_files(source, path, key)[0].parent
    return Path(path) if source == "disk" else Path()


def solution(text: str) -> tuple[str, str]:
    """Split `3`, `<answer> 3 </answer>` or `<think> … </think><answer> 3 </answer>` into (thought, answer)."""
    match = _WORKED.fullmatch(text)
    if match is not None:
        return match["thought"].strip(), match["answer"].strip()
    return "", text.strip().removeprefix("<answer>").removesuffix("</answer>").strip()


def _as_list(value: Any) -> list[Any]:
    """Return the images of one column as a list: none, one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


class FileRows:
    """One split of a hub, parquet, JSONL or disk data set.

    A row's id is its number, or its value in the id column. The row number is appended to repeated and missing values,
    so that ids are unique.
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
            self._ids = unique_ids(self._table.column(part.files.columns.id)[: self._size])

    def __len__(self) -> int:
        return self._size

    def prompt(self, index: int) -> Prompt:
        """Return the prompt of row `index`; raise BadRow if it is invalid or cannot be read."""
        if not 0 <= index < self._size:
            raise IndexError(f"{self._name} has rows 0 to {self._size - 1}, not {index}")
        row_id = f"{self._name}/{index:06d}" if self._ids is None else f"{self._name}/{self._ids[index]}"
        try:
            row = self._table.row(index)
        except ValueError as error:
            raise BadRow(row_id, f"it cannot be read: {error}", "fix it or remove it") from error
        return self._reader.prompt(row_id, row)


def unique_ids(values: list[object]) -> list[str]:
    """Return the values as strings, with the row number appended where a value is missing or repeated."""
    seen: set[str] = set()
    names: list[str] = []
    for index, value in enumerate(values):
        name = "" if value is None else str(value)
        if not name or name in seen:
            name = f"{name}#{index:06d}"
        seen.add(name)
        names.append(name)
    return names

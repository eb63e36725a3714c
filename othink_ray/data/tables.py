"""Raw rows of file-based data sets (hub, parquet, JSONL, disk, easy-VQA), by row number or streamed."""

from __future__ import annotations

import glob
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from othink_ray.config.schema import FilesConfig
from othink_ray.data.wheels import EasyVQATable, WheelError

if TYPE_CHECKING:  # imported lazily: the generated data sets do not need it
    from datasets import Dataset, IterableDataset

Row = dict[str, Any]

SUFFIXES = {"parquet": ("*.parquet",), "jsonl": ("*.jsonl", "*.ndjson")}


class SourceError(ValueError):
    """An unusable data set; the message names the config key, the reason and the remedy."""


class Table(Protocol):
    """Rows by number, images still encoded; `row` raises ValueError for a row that cannot be read."""

    columns: Sequence[str]

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row: ...

    def column(self, name: str) -> list[Any]:
        """Return one value per row; None where it is missing or the row cannot be read."""
        ...


class ArrowTable:
    """A memory-mapped Arrow data set: no memory per row, constant-time access."""

    def __init__(self, rows: Dataset) -> None:
        self.columns = rows.column_names
        self._rows = rows.with_format("arrow")  # raw values: images stay encoded

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        [row] = self._rows[index].to_pylist()
        return dict(row)

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self._rows.select_columns([name])[:].column(name).to_pylist()
        return values


class JsonLines:
    """JSONL files parsed line by line: a truncated line or a value of another type affects only its row."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [file.open("rb") for file in files]
        self._offsets = array("q")  # flattened pairs (file number, byte offset), one per line
        for number, file in enumerate(self._files):
            start = 0
            for line in file:
                if line.strip():
                    self._offsets.extend((number, start))
                start += len(line)
        self.columns: Sequence[str] = self._first_columns()

    def __len__(self) -> int:
        return len(self._offsets) // 2

    def row(self, index: int) -> Row:
        file = self._files[self._offsets[2 * index]]
        file.seek(self._offsets[2 * index + 1])
        try:
            row = json.loads(file.readline())
        except RecursionError as error:
            raise ValueError(str(error)) from error
        if not isinstance(row, dict):
            raise ValueError(f"it is a JSON {type(row).__name__}, not an object")
        return row

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self._readable(range(len(self)))]

    def _first_columns(self) -> list[str]:
        for row in self._readable(range(len(self))):
            if row:
                return list(row)
        return []

    def _readable(self, indices: range) -> Iterator[Row]:
        """Yield each row, or an empty one where it cannot be read."""
        for index in indices:
            try:
                yield self.row(index)
            except ValueError:
                yield {}


# ---- opening


def open_table(source: str, files: FilesConfig, key: str) -> Table:
    """Open a data set for access by row number; `key` is its config key, for messages."""
    table = OPENERS[source](files, key)
    if len(table) == 0:
        raise no_rows(files, key)
    check_columns(files, table.columns, key)
    return table


def _open_hub(files: FilesConfig, key: str) -> Table:
    return ArrowTable(_load(files, key, files.path, name=files.subset, split=files.split))


def _open_parquet(files: FilesConfig, key: str) -> Table:
    return ArrowTable(_load(files, key, "parquet", data_files=_non_empty(files, key), split="train"))


def _open_jsonl(files: FilesConfig, key: str) -> Table:
    return JsonLines(find_files("jsonl", files.path, key))


def _open_disk(files: FilesConfig, key: str) -> Table:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(files.path)
    except Exception as error:
        raise _unreadable(files, key, error, "give a folder written by save_to_disk") from error
    if isinstance(found, Dataset):
        return ArrowTable(found)
    if files.split not in found:
        raise SourceError(
            f"{key}.split = {files.split} is not a split of {files.path}; choose one of: {', '.join(map(str, found))}"
        )
    return ArrowTable(found[files.split])


def _open_easy_vqa(files: FilesConfig, key: str) -> Table:
    try:
        return EasyVQATable(files)
    except WheelError as error:
        raise SourceError(f"{key}.path = {files.path}: {error}") from error


OPENERS: dict[str, Callable[[FilesConfig, str], Table]] = {
    "hub": _open_hub,
    "parquet": _open_parquet,
    "jsonl": _open_jsonl,
    "disk": _open_disk,
    "easy_vqa": _open_easy_vqa,
}


def open_streaming(source: str, files: FilesConfig, key: str) -> IterableDataset:
    """Open a hub or parquet data set for streaming; nothing is cached on disk."""
    if source == "hub":
        rows = _load(files, key, files.path, name=files.subset, split=files.split, streaming=True)
    else:
        rows = _load(files, key, "parquet", data_files=_non_empty(files, key), split="train", streaming=True)
    if rows.column_names is not None:
        check_columns(files, rows.column_names, key)
    return rows.with_format("arrow")


def find_files(source: str, path: str, key: str) -> list[Path]:
    """Return the files that a file path, folder or glob pattern stands for, sorted by path."""
    given = Path(path)
    if given.is_file():
        return [given]
    patterns = [str(given / "**" / suffix) for suffix in SUFFIXES[source]] if given.is_dir() else [path]
    found = sorted(Path(file) for pattern in patterns for file in glob.glob(pattern, recursive=True))
    files = [file for file in found if file.is_file()]
    if not files:
        reason = (
            f"contains no {' or '.join(SUFFIXES[source])} file"
            if given.is_dir()
            else "is not a file, a folder or a glob pattern that matches files"
        )
        raise SourceError(f"{key}.path = {path} {reason}; relative paths start from {Path.cwd()}")
    return files


def _non_empty(files: FilesConfig, key: str) -> list[str]:
    """Return the parquet files that have rows: `datasets` fails on empty ones."""
    from pyarrow.parquet import read_metadata

    found = find_files("parquet", files.path, key)
    try:
        non_empty = [str(file) for file in found if read_metadata(file).num_rows]
    except (OSError, ValueError) as error:
        raise _unreadable(files, key, error, "copy or export the file again") from error
    if not non_empty:
        raise no_rows(files, key)
    return non_empty


def no_rows(files: FilesConfig, key: str) -> SourceError:
    return SourceError(f"{key}.path = {files.path}: the data set has 0 rows; check the path and the split")


def check_columns(files: FilesConfig, columns: Sequence[str], key: str) -> None:
    """Raise SourceError, suggesting the closest name, if a configured column does not exist."""
    if not columns:
        raise SourceError(f"{key}.path = {files.path}: no line is a readable JSON object; write one object per line")
    configured = {"question": [files.columns.question], "answer": [files.columns.answer]}
    configured |= {"image": image_columns(files), "id": [files.columns.id] if files.columns.id else []}
    for role, names in configured.items():
        for name in names:
            if name not in columns:
                closest = get_close_matches(name, columns, n=1)
                hint = f"did you mean {closest[0]}? " if closest else ""
                raise SourceError(
                    f"{key}.columns.{role} = {name} is not a column of {files.path}; "
                    f"{hint}its columns: {', '.join(columns)}"
                )


def image_columns(files: FilesConfig) -> list[str]:
    """Return the names of the image columns, in the configured order."""
    return [name.strip() for name in (files.columns.image or "").split(",") if name.strip()]


def _load(files: FilesConfig, key: str, builder: str, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(builder, **options)
    # `datasets` passes on whatever its readers raise: OSError, ValueError, Arrow and hub errors.
    except Exception as error:
        if "split" in str(error).lower() and isinstance(error, ValueError):
            raise SourceError(f"{key}.split = {files.split}: {error}") from error
        raise _unreadable(
            files, key, error, "check the path, or the network and access rights of a hub name"
        ) from error


def _unreadable(files: FilesConfig, key: str, error: Exception, remedy: str) -> SourceError:
    cause = error.__cause__ or error
    text = f"{type(cause).__name__}: {cause}".removesuffix(".")
    return SourceError(f"{key}.path = {files.path} cannot be read: {text}; {remedy}")

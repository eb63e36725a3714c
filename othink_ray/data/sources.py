"""Questions from data sets that are not generated, by row number."""

from __future__ import annotations

from othink_ray.config.schema import DataConfig
from othink_ray.data.prompts import BadRow, Split
from othink_ray.data.rows import RowReader
from othink_ray.data.tables import open_table
from othink_ray.types import Prompt


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

"""Large data sets, read on the fly: no random access, yet an order that is seeded and can be resumed exactly."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from othink_ray.config.schema import DataConfig
from othink_ray.data.prompts import Split
from othink_ray.data.rows import RowReader
from othink_ray.data.tables import Row, SourceError, no_rows, open_passing
from othink_ray.types import Prompt


class PassingRows:
    """One split of a hub or parquet data set that is read while it is asked, shuffled in a buffer.

    Going back to a position means reading the rows before it again: exact, for the price of the reading.
    """

    def __init__(self, data: DataConfig, split: Split) -> None:
        part = data.part(split)
        assert part.files is not None and part.files.stream_buffer is not None
        self._key = f"data.{split}.files"
        self._files = part.files
        self._reader = RowReader(data, split)
        self._rows = open_passing(part.source, part.files, self._key)
        self._limit = part.size
        self._buffer_size = part.files.stream_buffer
        self._name = f"{data.name}/{split}"

    def order(self, seed: int) -> PassingOrder:
        return PassingOrder(self, seed)

    def epoch(self, seed: int, epoch: int) -> Iterator[Row]:
        """All rows once: shards in a shuffled order, and their rows shuffled in the buffer, both from (seed, epoch)."""
        # Not the library's own shuffle: its order may change with its version, and a run must resume in any of them.
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
        buffer: list[Row] = []
        for row in self._read(rng):
            if len(buffer) < self._buffer_size:
                buffer.append(row)
                continue
            place = int(rng.integers(len(buffer)))
            yield buffer[place]
            buffer[place] = row
        for place in rng.permutation(len(buffer)):
            yield buffer[place]

    def _read(self, rng: np.random.Generator) -> Iterator[Row]:
        """All rows shard by shard; the first so many, as they lie, where a size is set."""
        shards = self._rows.num_shards
        order = range(shards) if self._limit is not None else rng.permutation(shards).tolist()
        tables = (table for shard in order for table in self._rows.shard(shards, shard))
        for table in itertools.islice(tables, self._limit):
            [row] = table.to_pylist()
            yield row

    def prompt(self, row: Row) -> Prompt:
        """The question of a row, named by its id column, else by what it asks: rows that pass have no number."""
        return self._reader.prompt(f"{self._name}/{self._row_id(row)}", row)

    def none_found(self) -> SourceError:
        return no_rows(self._files, self._key)

    def _row_id(self, row: Row) -> str:
        named = self._files.columns.id
        if named is not None and row.get(named) is not None:
            return str(row[named])
        return hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()[:12]


class PassingOrder:
    """All epochs of a passing data set, one after the other."""

    def __init__(self, source: PassingRows, seed: int) -> None:
        self.rows: int | None = None  # of an epoch; None until its end was seen
        self._source = source
        self._seed = seed
        self._epoch = 0
        self._place = -1  # of the row at hand in its epoch
        self._reading: Iterator[Row] = source.epoch(seed, 0)
        self._row: dict[str, Any] = {}

    def prompt(self, position: int) -> Prompt:
        """The question at `position`; asked in order, each row is read once."""
        self._go_to(position)
        return self._source.prompt(self._row)

    def _go_to(self, position: int) -> None:
        if self.rows is None:
            self._advance(position)
        if self.rows is not None:
            epoch, place = divmod(position, self.rows)
            if epoch != self._epoch or place < self._place:
                self._begin(epoch)
            self._advance(place)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._place = epoch, -1
        self._reading = self._source.epoch(self._seed, epoch)

    def _advance(self, place: int) -> None:
        """Read on to `place` of this epoch, or learn that the epoch is shorter."""
        if place < self._place:
            self._begin(self._epoch)
        while self._place < place:
            row = next(self._reading, None)
            if row is None:
                self.rows = self._place + 1
                if self.rows == 0:
                    raise self._source.none_found()
                return
            self._row = row
            self._place += 1

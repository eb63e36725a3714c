"""Questions read before they are asked for: engines would idle while images are drawn, decoded and screened."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from othink_ray.config.schema import DataConfig
from othink_ray.data.prompts import BadRow, Source, Split
from othink_ray.data.sources import RowReader
from othink_ray.data.tables import Row, SourceError, no_rows, open_passing
from othink_ray.types import Prompt


class ReadAhead:
    """Reads by position, as `read` does, in a thread of its own, which is always so many rows ahead.

    One thread, in order: what reads need not be safe for several. A failure is raised when its row is asked for.
    """

    def __init__(self, read: Callable[[int], Prompt], rows: int) -> None:
        self._read, self._rows = read, rows
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="questions")
        self._coming: dict[int, Future[Prompt]] = {}

    def __call__(self, position: int) -> Prompt:
        for row in range(position, position + self._rows + 1):
            if row not in self._coming:
                self._coming[row] = self._thread.submit(self._read, row)
        self._coming.pop(position - 1, None)
        return self._coming[position].result()

    def read(self, position: int) -> list[Prompt]:
        """Of the rows from here on the good ones, up to the first that is not there yet."""
        prompts = []
        for row in range(position, position + self._rows):
            if row not in self._coming or not self._coming[row].done():
                break
            if self._coming[row].exception() is None:
                prompts.append(self._coming[row].result())
        return prompts

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


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


LengthFilter = Callable[[Prompt], None]
"""Raises BadRow for a prompt that the model has no room for."""


class Order(Protocol):
    """The rows of all epochs, one after the other."""

    @property
    def rows(self) -> int | None:
        """How many make an epoch; None while that is not known."""
        ...

    def prompt(self, position: int) -> Prompt: ...


class Permutations:
    """Every epoch shows each row once, in an order made from (seed, epoch)."""

    def __init__(self, source: Source, seed: int) -> None:
        self.rows = len(source)
        if self.rows == 0:
            raise SourceError("the data source has 0 rows: a stream needs at least 1; check data.train")
        self._source = source
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def prompt(self, position: int) -> Prompt:
        epoch, place = divmod(position, self.rows)
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self._seed, epoch))))
            self._order = rng.permutation(self.rows).tolist()
            self._epoch = epoch
        return self._source.prompt(self._order[place])


class PromptStream:
    """Good rows in a seeded order; a position is all it takes to go on."""

    def __init__(
        self,
        source: Source | PassingRows,
        *,
        seed: int,
        on_bad_row: str,
        position: int = 0,
        screen: LengthFilter | None = None,
        ahead: int = 0,
    ) -> None:
        """`ahead`: rows that are read before they are asked for, until `close`."""
        if on_bad_row not in ("drop", "stop"):
            raise ValueError(f"data.on_bad_row={on_bad_row!r} must be drop or stop; choose one of them")
        if position < 0:
            raise ValueError(f"data position {position} must be 0 or more; resume from another checkpoint")
        self._order: Order = source.order(seed) if isinstance(source, PassingRows) else Permutations(source, seed)
        self._stop = on_bad_row == "stop"
        self._screen = screen
        self._ahead = ReadAhead(self._read, ahead) if ahead else None
        self._position = position
        self._bad_run = 0
        self._dropped: dict[str, str] = {}

    @property
    def position(self) -> int:
        """Rows consumed so far, dropped ones included."""
        return self._position

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """(id, reason) of each row dropped since this stream was made, named once however often it came."""
        return list(self._dropped.items())

    def take(self, n: int, beside: Sequence[Prompt] = ()) -> list[Prompt]:
        """The next n good rows; a bad one on the way is dropped, or raises BadRow and the position stays before it.

        A row that comes again, here or after `beside` (what was asked before in the same step), gets `#2` on its id:
        seeds, rewards and packing tell prompts apart by it.
        """
        prompts: list[Prompt] = []
        while len(prompts) < n:
            try:
                prompt = (self._ahead or self._read)(self._position)
            except BadRow as bad:
                if self._stop:
                    raise
                self._drop(bad)
            else:
                prompts.append(prompt)
                self._bad_run = 0
            self._position += 1
        return told_apart(prompts, beside)

    def upcoming(self) -> list[Prompt]:
        """Of what `take` will give next that which has been read by now."""
        return told_apart(self._ahead.read(self._position)) if self._ahead else []

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def _read(self, position: int) -> Prompt:
        prompt = self._order.prompt(position)
        if self._screen is not None:
            self._screen(prompt)
        return prompt

    def _drop(self, bad: BadRow) -> None:
        self._dropped[bad.row_id] = bad.reason
        self._bad_run += 1
        rows = self._order.rows
        # Only at the end of an epoch: two epochs may meet in a run of bad rows that is longer than one of them.
        if rows is not None and self._bad_run >= rows and (self._position + 1) % rows == 0:
            raise SourceError(
                f"all {rows} rows of the data source are bad, the last one {bad.row_id}: {bad.reason}; "
                "check data.train, or set data.on_bad_row=stop to see the first"
            ) from bad


def told_apart(prompts: Iterable[Prompt], beside: Iterable[Prompt] = ()) -> list[Prompt]:
    """The prompts, each with an id that no other of them and none of `beside` has: a taken one gets `#2`, `#3` ..."""
    taken = {prompt.id for prompt in beside}
    result = []
    for prompt in prompts:
        name, number = prompt.id, 1
        while name in taken:
            number += 1
            name = f"{prompt.id}#{number}"
        taken.add(name)
        result.append(prompt if number == 1 else replace(prompt, id=name))
    return result

"""The stream of training prompts: seeded epochs over a source, streamed or by row number, and a prefetch thread.

Prefetching keeps the engines busy while images are generated, decoded and checked.
"""

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
from othink_ray.data.tables import Row, SourceError, no_rows, open_streaming
from othink_ray.types import Prompt

LengthFilter = Callable[[Prompt], None]
"""Raises BadRow for a prompt that does not fit the model's context."""


class PromptPrefetcher:
    """Calls `read(position)` in a background thread that stays `rows` positions ahead.

    A single thread reads in order, so `read` need not be thread-safe. An exception is raised when its position is
    requested.
    """

    def __init__(self, read: Callable[[int], Prompt], rows: int) -> None:
        self._read, self._rows = read, rows
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")
        self._pending: dict[int, Future[Prompt]] = {}

    def __call__(self, position: int) -> Prompt:
        for upcoming in range(position, position + self._rows + 1):
            if upcoming not in self._pending:
                self._pending[upcoming] = self._thread.submit(self._read, upcoming)
        self._pending.pop(position - 1, None)
        return self._pending[position].result()

    def read(self, position: int) -> list[Prompt]:
        """Return the valid prompts from `position` on, up to the first that is still being read."""
        prompts = []
        for upcoming in range(position, position + self._rows):
            if upcoming not in self._pending or not self._pending[upcoming].done():
                break
            if self._pending[upcoming].exception() is None:
                prompts.append(self._pending[upcoming].result())
        return prompts

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class StreamingRows:
    """One split of a hub or parquet data set, streamed and shuffled in a buffer.

    Resuming at a position reads the rows before it again: exact, at the cost of that reading.
    """

    def __init__(self, data: DataConfig, split: Split) -> None:
        part = data.part(split)
        assert part.files is not None and part.files.stream_buffer is not None
        self._key = f"data.{split}.files"
        self._files = part.files
        self._reader = RowReader(data, split)
        self._rows = open_streaming(part.source, part.files, self._key)
        self._limit = part.size
        self._buffer_size = part.files.stream_buffer
        self._name = f"{data.name}/{split}"

    def order(self, seed: int) -> StreamingOrder:
        return StreamingOrder(self, seed)

    def epoch(self, seed: int, epoch: int) -> Iterator[Row]:
        """Yield every row once, shuffling shards and, in the buffer, rows; both are seeded by (seed, epoch)."""
        # Not the shuffle of `datasets`: its order may change between versions, and a run must resume under any of them.
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
        buffer: list[Row] = []
        for row in self._read(rng):
            if len(buffer) < self._buffer_size:
                buffer.append(row)
                continue
            index = int(rng.integers(len(buffer)))
            yield buffer[index]
            buffer[index] = row
        for index in rng.permutation(len(buffer)):
            yield buffer[index]

    def _read(self, rng: np.random.Generator) -> Iterator[Row]:
        """Yield all rows shard by shard; with a size limit, the first rows in file order."""
        shards = self._rows.num_shards
        order = range(shards) if self._limit is not None else rng.permutation(shards).tolist()
        tables = (table for shard in order for table in self._rows.shard(shards, shard))
        for table in itertools.islice(tables, self._limit):
            [row] = table.to_pylist()
            yield row

    def prompt(self, row: Row) -> Prompt:
        """Return the prompt of a row, its id taken from the id column or else a hash: streamed rows have no number."""
        return self._reader.prompt(f"{self._name}/{self._row_id(row)}", row)

    def no_rows_error(self) -> SourceError:
        return no_rows(self._files, self._key)

    def _row_id(self, row: Row) -> str:
        id_column = self._files.columns.id
        if id_column is not None and row.get(id_column) is not None:
            return str(row[id_column])
        return hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()[:12]


class StreamingOrder:
    """Prompts of a streamed data set by position, across epochs."""

    def __init__(self, source: StreamingRows, seed: int) -> None:
        self.rows: int | None = None  # per epoch; None until the end of an epoch has been reached
        self._source = source
        self._seed = seed
        self._epoch = 0
        self._index = -1  # of the current row in its epoch
        self._iterator: Iterator[Row] = source.epoch(seed, 0)
        self._row: dict[str, Any] = {}

    def prompt(self, position: int) -> Prompt:
        """Return the prompt at `position`; sequential access reads each row once."""
        self._seek(position)
        return self._source.prompt(self._row)

    def _seek(self, position: int) -> None:
        if self.rows is None:
            self._advance(position)
        if self.rows is not None:
            epoch, index = divmod(position, self.rows)
            if epoch != self._epoch or index < self._index:
                self._start(epoch)
            self._advance(index)

    def _start(self, epoch: int) -> None:
        self._epoch, self._index = epoch, -1
        self._iterator = self._source.epoch(self._seed, epoch)

    def _advance(self, index: int) -> None:
        """Read up to row `index` of this epoch; set `rows` if the epoch ends before it."""
        if index < self._index:
            self._start(self._epoch)
        while self._index < index:
            row = next(self._iterator, None)
            if row is None:
                self.rows = self._index + 1
                if self.rows == 0:
                    raise self._source.no_rows_error()
                return
            self._row = row
            self._index += 1


class Order(Protocol):
    """Prompts by position, across epochs."""

    @property
    def rows(self) -> int | None:
        """Number of rows per epoch; None while it is unknown."""
        ...

    def prompt(self, position: int) -> Prompt: ...


class Permutations:
    """Visits each row once per epoch, in a random permutation seeded by (seed, epoch)."""

    def __init__(self, source: Source, seed: int) -> None:
        self.rows = len(source)
        if self.rows == 0:
            raise SourceError("the data source has 0 rows; a stream needs at least 1: check data.train")
        self._source = source
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def prompt(self, position: int) -> Prompt:
        epoch, index = divmod(position, self.rows)
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self._seed, epoch))))
            self._order = rng.permutation(self.rows).tolist()
            self._epoch = epoch
        return self._source.prompt(self._order[index])


class PromptStream:
    """Valid prompts in a seeded order; the position is its whole state, enough to resume."""

    def __init__(
        self,
        source: Source | StreamingRows,
        *,
        seed: int,
        on_bad_row: str,
        position: int = 0,
        length_filter: LengthFilter | None = None,
        prefetch: int = 0,
    ) -> None:
        """`prefetch`: number of rows to read in the background before `take` needs them, until `close`."""
        if on_bad_row not in ("drop", "stop"):
            raise ValueError(f"data.on_bad_row={on_bad_row!r} must be drop or stop")
        if position < 0:
            raise ValueError(f"data position {position} must be 0 or more; resume from another checkpoint")
        self._order: Order = source.order(seed) if isinstance(source, StreamingRows) else Permutations(source, seed)
        self._stop = on_bad_row == "stop"
        self._length_filter = length_filter
        self._prefetcher = PromptPrefetcher(self._read, prefetch) if prefetch else None
        self._position = position
        self._bad_run = 0
        self._dropped: dict[str, str] = {}

    @property
    def position(self) -> int:
        """Number of rows consumed so far, dropped ones included."""
        return self._position

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """(id, reason; remedy) of each row dropped since the stream was created, once per row even if it recurs."""
        return list(self._dropped.items())

    def take(self, n: int, beside: Sequence[Prompt] = ()) -> list[Prompt]:
        """Return the next n valid prompts; a bad row is dropped, or raises BadRow and leaves the position before it.

        A row repeated in this call or in `beside` (prompts requested earlier in the step) gets `#2` appended to its id,
        because seeds, rewards and packing identify prompts by id.
        """
        prompts: list[Prompt] = []
        while len(prompts) < n:
            try:
                prompt = (self._prefetcher or self._read)(self._position)
            except BadRow as bad:
                if self._stop:
                    raise
                self._drop(bad)
            else:
                prompts.append(prompt)
                self._bad_run = 0
            self._position += 1
        return with_unique_ids(prompts, beside)

    def upcoming(self) -> list[Prompt]:
        """Return the prompts that the next `take` starts with, as far as they have been read already."""
        return with_unique_ids(self._prefetcher.read(self._position)) if self._prefetcher else []

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _read(self, position: int) -> Prompt:
        prompt = self._order.prompt(position)
        if self._length_filter is not None:
            self._length_filter(prompt)
        return prompt

    def _drop(self, bad: BadRow) -> None:
        self._dropped[bad.row_id] = bad.text
        self._bad_run += 1
        rows = self._order.rows
        # Only at the end of an epoch: a run of bad rows across two epochs can be longer than an epoch.
        if rows is not None and self._bad_run >= rows and (self._position + 1) % rows == 0:
            raise SourceError(
                f"all {rows} rows of the data source are bad, the last one {bad.row_id}: {bad.reason}; "
                "check data.train, or set data.on_bad_row=stop to see the first"
            ) from bad


def with_unique_ids(prompts: Iterable[Prompt], beside: Iterable[Prompt] = ()) -> list[Prompt]:
    """Return the prompts with ids unique among themselves and `beside`: duplicates get `#2`, `#3` ... appended."""
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

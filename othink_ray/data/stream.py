"""The endless, seeded, resumable order in which the rows of a source are asked."""

from __future__ import annotations

import numpy as np

from othink_ray.data.prompts import BadRow, Source
from othink_ray.types import Prompt


class PromptStream:
    """Every epoch shows each row once, in an order made from (seed, epoch); a position is all it takes to go on."""

    def __init__(self, source: Source, *, seed: int, on_bad_row: str, position: int = 0) -> None:
        if len(source) == 0:
            raise ValueError("the data source has 0 rows: a stream needs at least 1; check data.source and its size")
        if on_bad_row not in ("drop", "stop"):
            raise ValueError(f"data.on_bad_row={on_bad_row!r} must be drop or stop; choose one of them")
        if position < 0:
            raise ValueError(f"data position {position} must be 0 or more; resume from another checkpoint")
        self._source = source
        self._seed = seed
        self._stop = on_bad_row == "stop"
        self._position = position
        self._bad_run = 0
        self._dropped: dict[str, str] = {}
        self._epoch = -1
        self._order: list[int] = []

    @property
    def position(self) -> int:
        """Rows consumed so far, dropped ones included."""
        return self._position

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """(id, reason) of each row dropped since this stream was made, named once however often it came."""
        return list(self._dropped.items())

    def take(self, n: int) -> list[Prompt]:
        """The next n good rows; a bad one on the way is dropped, or raises BadRow and the position stays before it."""
        prompts: list[Prompt] = []
        while len(prompts) < n:
            try:
                prompts.append(self._source.prompt(self._row(self._position)))
            except BadRow as bad:
                if self._stop:
                    raise
                self._drop(bad)
            else:
                self._bad_run = 0
            self._position += 1
        return prompts

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self._source))
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self._seed, epoch))))
            self._order = rng.permutation(len(self._source)).tolist()
            self._epoch = epoch
        return self._order[place]

    def _drop(self, bad: BadRow) -> None:
        self._dropped[bad.row_id] = bad.reason
        self._bad_run += 1
        rows = len(self._source)
        # Only at the end of an epoch: two epochs may meet in a run of bad rows that is longer than one of them.
        if self._bad_run >= rows and (self._position + 1) % rows == 0:
            raise ValueError(
                f"all {rows} rows of the data source are bad, the last one {bad.row_id}: {bad.reason}; "
                "check data.source, or set data.on_bad_row=stop to see the first"
            ) from bad

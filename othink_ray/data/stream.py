"""The endless, seeded, resumable order in which the rows of a source are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from othink_ray.data.passing import PassingRows
from othink_ray.data.prompts import BadRow, Source
from othink_ray.data.read_ahead import ReadAhead
from othink_ray.data.tables import SourceError
from othink_ray.types import Prompt

Screen = Callable[[Prompt], None]
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
        screen: Screen | None = None,
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

    def coming(self) -> list[Prompt]:
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

"""What no optimiser step changes of the rows to come, made on a second thread while an update still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from threading import Event, Lock

import numpy as np
from torch import Tensor

from othink_ray.engines.micro_batch import MicroBatch
from othink_ray.types import Pack


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A micro-batch, and what is known of it already."""

    rows: Sequence[Pack]
    batch: MicroBatch
    features: Tensor | None = None  # of its images, where policy and reference share them
    reference: Tensor | None = None  # its logprobs
    encodes: int = 0  # images that a vision tower has looked at for this


class Ahead:
    """The first micro-batches of the next update, as many as the time of this one is enough for."""

    def __init__(self, make: Callable[[Sequence[Pack], bool], Prepared]) -> None:
        """`make`: of the rows of a micro-batch, with the reference's logprobs or without."""
        self.make = make
        self.made: list[Prepared] = []
        self._most = 0
        self._learning, self._making = Event(), Lock()

    @contextmanager
    def learning(self) -> Iterator[list[Prepared]]:
        """Around an update: gives what was made for it, and lets what comes after it be made meanwhile."""
        with self._making:
            made, self.made = self.made, []
        self._learning.set()
        try:
            yield made
        finally:
            self._learning.clear()

    @property
    def at_work(self) -> bool:
        """Whether an update runs."""
        return self._learning.is_set()

    def prepare(self, updates: Sequence[Sequence[Sequence[Pack]]], *, with_reference: bool) -> None:
        """Until the update has ended, and one micro-batch more than the last time at most.

        What is made now shortens the next update, and so the time for making more: in small steps both settle.
        """
        for rows in list(chain(*updates))[: self._most + 1]:
            with self._making:
                if not self.at_work:
                    break
                self.made.append(self.make(rows, with_reference))
        self._most = len(self.made)


def made_for(rows: Sequence[Pack], made: Sequence[Prepared]) -> Prepared | None:
    """The one of exactly these rows."""
    for one in made:
        if len(one.rows) == len(rows) and all(map(_equal, one.rows, rows)):
            return one
    return None


def _equal(left: Pack, right: Pack) -> bool:
    return all(np.array_equal(getattr(left, one.name), getattr(right, one.name)) for one in fields(Pack))

"""What actors give one after the other, and where it broke off."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import ray

from othink_ray.runtime.futures import Streams


class Giver:
    """Ends its process behind so many results; the last of all is None."""

    def give(self, dies_behind: int) -> Iterator[int | None]:
        for number, result in enumerate((0, 1, 2, None)):
            if number == dies_behind:
                time.sleep(1)  # what was given is on its way by then
                os._exit(1)
            yield result
        if dies_behind == 4:
            time.sleep(1)
            os._exit(1)


@pytest.mark.parametrize("dies_behind", [0, 2, 3, 4, 5])
def test_what_was_given_before_a_death_counts_and_the_end_is_no_result(ray_here: None, dies_behind: int) -> None:
    giver = ray.remote(num_cpus=0)(Giver).remote()
    stream = giver.give.options(num_returns="streaming").remote(dies_behind)
    streams = Streams({7: stream}, "a giver", 20, {7: 3})
    assert ray.get(list(streams)) == [0, 1, 2][:dies_behind]
    assert ray.get(streams.came[7]) == [0, 1, 2][:dies_behind]
    assert list(streams.lost) == ([] if dies_behind == 5 else [7])

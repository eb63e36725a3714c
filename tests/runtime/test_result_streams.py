"""Streams of actor results, and where they break off."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import ray

from othink_ray.runtime.futures import Streams


class Generator:
    """Yields three results and the end marker None; ends its process after so many of them."""

    def results(self, dies_after: int) -> Iterator[int | None]:
        for number, result in enumerate((0, 1, 2, None)):
            if number == dies_after:
                time.sleep(1)  # the results are delivered by then
                os._exit(1)
            yield result
        if dies_after == 4:
            time.sleep(1)
            os._exit(1)


@pytest.mark.parametrize("dies_after", [0, 2, 3, 4, 5])
def test_results_before_a_death_count_but_the_end_marker_not(ray_here: None, dies_after: int) -> None:
    generator = ray.remote(num_cpus=0)(Generator).remote()
    stream = generator.results.options(num_returns="streaming").remote(dies_after)
    streams = Streams({7: stream}, "a generator", 20, {7: 3})
    assert ray.get(list(streams)) == [0, 1, 2][:dies_after]
    assert ray.get(streams.received[7]) == [0, 1, 2][:dies_after]
    assert list(streams.lost) == ([] if dies_after == 5 else [7])

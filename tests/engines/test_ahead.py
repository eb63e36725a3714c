"""What is made for the next update while one runs: how much, for which rows, and when it ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from othink_ray.engines.prefetch import Kept, Made, Prefetched, Prefetcher
from othink_ray.types import Pack

PATIENCE_S = 30


def row(name: str, tokens: Sequence[int] = (1, 2)) -> Pack:
    values = np.zeros(len(tokens))
    return Pack(
        prompt_id=name,
        images=(b"pixels",),
        token_ids=np.array(tokens),
        segments=np.arange(len(tokens), dtype=np.int32),
        loss_weights=values,
        sampler_logprobs=values.astype(np.float32),
        advantages=values,
    )


def prepared(rows: Sequence[Pack], with_reference: bool = True) -> Prefetched:
    named: Any = rows
    return Prefetched(laid_out=named, kept=Kept(encodes=int(with_reference)))


UPDATES = [[[row("a")], [row("b"), row("c")]], [[row("d")]]]


def names(made: Made) -> list[list[str]]:
    return [[own.prompt_id for own in rows] for rows, _ in made.begun]


def test_one_micro_batch_more_than_last_time_is_made_in_their_order() -> None:
    ahead = Prefetcher(prepared)
    found = []
    for _ in range(5):
        found.append(names(ahead.take()))
        ahead.prepare(UPDATES, with_reference=True)
    assert found == [[], [["a"]], [["a"], ["b", "c"]], [["a"], ["b", "c"], ["d"]], [["a"], ["b", "c"], ["d"]]]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_reference_is_asked_as_it_was_told(wanted: bool) -> None:
    ahead = Prefetcher(prepared)
    ahead.prepare(UPDATES, with_reference=wanted)
    found = ahead.take().of(UPDATES[0][0])
    assert found is not None
    assert found.kept.encodes == wanted


def test_the_update_begins_no_more_and_waits_only_for_the_rows_in_the_making() -> None:
    begun, finish = threading.Event(), threading.Event()

    def slowly(rows: Sequence[Pack], with_reference: bool) -> Prefetched:
        if rows[0].prompt_id == "b":
            begun.set()
            assert finish.wait(PATIENCE_S)
        return prepared(rows)

    ahead = Prefetcher(slowly)
    ahead._most = 2
    with ThreadPoolExecutor() as beside:
        preparing = beside.submit(ahead.prepare, UPDATES, with_reference=True)
        assert begun.wait(PATIENCE_S)
        made = ahead.take()
        assert made.of([row("a")])
        assert made.of([row("d")]) is None
        waiting = beside.submit(made.of, [row("b"), row("c")])
        assert not waiting.done()
        finish.set()
        found = waiting.result(PATIENCE_S)
        preparing.result(PATIENCE_S)
    assert found is not None
    assert found.laid_out is UPDATES[0][1]
    assert names(made) == []
    assert names(ahead.take()) == []


def test_what_goes_wrong_is_told_by_whoever_wants_the_rows() -> None:
    def fails(rows: Sequence[Pack], with_reference: bool) -> Prefetched:
        raise ValueError("no such image")

    ahead = Prefetcher(fails)
    with pytest.raises(ValueError, match="no such image"):
        ahead.prepare(UPDATES, with_reference=True)
    made = ahead.take()
    assert made.of([row("d")]) is None
    with pytest.raises(ValueError, match="no such image"):
        made.of([row("a")])


def test_only_what_was_made_of_exactly_these_rows_is_used() -> None:
    ahead = Prefetcher(prepared)
    ahead._most = 1
    ahead.prepare([[[row("a"), row("b")], []]], with_reference=True)
    made = ahead.take()
    assert made.of([row("a"), row("b")])
    assert made.of([])
    changed = [replace(row("b"), **{name: getattr(row("b"), name) + 1}) for name in ("advantages", "loss_weights")]
    for other in (row("c"), row("b", (1, 3)), row("b", (1, 2, 3)), replace(row("b"), images=(b"others",)), *changed):
        assert made.of([row("a"), other]) is None
    assert made.of([row("b"), row("a")]) is None
    assert made.of([row("a")]) is None

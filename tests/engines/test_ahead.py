"""What is made for the next update while one runs: how much, for which rows, and when it ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from othink_ray.engines.ahead import Ahead, Prepared, made_for
from othink_ray.types import Pack

PATIENCE_S = 30
NO_BATCH: Any = None


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


def prepared(rows: Sequence[Pack], with_reference: bool = True) -> Prepared:
    return Prepared(rows=rows, batch=NO_BATCH, encodes=int(with_reference))


UPDATES = [[[row("a")], [row("b"), row("c")]], [[row("d")]]]


def names(made: Sequence[Prepared]) -> list[list[str]]:
    return [[own.prompt_id for own in one.rows] for one in made]


def test_nothing_is_made_while_no_update_runs() -> None:
    ahead = Ahead(prepared)
    ahead.prepare(UPDATES, with_reference=True)
    assert ahead.made == []


def test_one_micro_batch_more_than_last_time_is_made_in_their_order() -> None:
    ahead = Ahead(prepared)
    found = []
    for _ in range(5):
        with ahead.learning() as made:
            found.append(names(made))
            ahead.prepare(UPDATES, with_reference=True)
    assert found == [[], [["a"]], [["a"], ["b", "c"]], [["a"], ["b", "c"], ["d"]], [["a"], ["b", "c"], ["d"]]]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_reference_is_asked_as_it_was_told(wanted: bool) -> None:
    ahead = Ahead(prepared)
    with ahead.learning():
        ahead.prepare(UPDATES, with_reference=wanted)
    assert [one.encodes for one in ahead.made] == [wanted]


def test_the_end_of_the_update_ends_it_and_the_next_one_waits_for_what_is_in_the_making() -> None:
    begun, finish = threading.Event(), threading.Event()

    def slowly(rows: Sequence[Pack], with_reference: bool) -> Prepared:
        begun.set()
        assert finish.wait(PATIENCE_S)
        return prepared(rows)

    ahead = Ahead(slowly)
    ahead._most = 2
    preparing = threading.Thread(target=ahead.prepare, args=(UPDATES,), kwargs={"with_reference": True})
    with ahead.learning():
        preparing.start()
        assert begun.wait(PATIENCE_S)
    threading.Timer(0.1, finish.set).start()
    with ahead.learning() as made:
        assert names(made)[:1] == [["a"]]
    preparing.join(PATIENCE_S)
    assert not preparing.is_alive()


def test_an_update_that_fails_ends_it_too() -> None:
    ahead = Ahead(prepared)
    with pytest.raises(RuntimeError, match="broke"), ahead.learning():
        raise RuntimeError("broke")
    ahead.prepare(UPDATES, with_reference=True)
    assert ahead.made == []


def test_only_what_was_made_of_exactly_these_rows_is_used() -> None:
    made = [prepared([row("a"), row("b")]), prepared([])]
    assert made_for([row("a"), row("b")], made) is made[0]
    assert made_for([], made) is made[1]
    changed = [replace(row("b"), **{name: getattr(row("b"), name) + 1}) for name in ("advantages", "loss_weights")]
    for other in (row("c"), row("b", (1, 3)), row("b", (1, 2, 3)), replace(row("b"), images=(b"others",)), *changed):
        assert made_for([row("a"), other], made) is None
    assert made_for([row("b"), row("a")], made) is None
    assert made_for([row("a")], made) is None

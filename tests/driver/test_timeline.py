"""The timeline of a loop, with a team that only remembers what it was requested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from othink_ray.driver.loop import Step, train
from othink_ray.driver.timeline import Timeline, TracedWorkers
from othink_ray.tracing import Spans, keep, span, take
from tests.driver.fakes import PAPER, Diary, Numbers, ScriptedTeam, recipe_of
from tests.driver.trace_events import spans_in


class Alone:
    """A run without other processes."""

    def spans(self, *, go_on: bool) -> dict[str, Spans]:
        return {}


class Gone:
    """Processes that were there at first."""

    def spans(self, *, go_on: bool) -> dict[str, Spans]:
        assert go_on, "they are not requested at the end"
        return {}


class Reader(Diary):
    """Reads the trace at the end of each step."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.sizes: list[int] = []

    def step(self, seen: Step) -> None:
        super().step(seen)
        self.sizes.append(len(json.loads(self.path.read_text())) if self.path.exists() else 0)


def run(path: Path, *, steps: int, traced: int) -> Reader:
    reader = Reader(path)
    with Timeline(path, Alone(), reader, steps=traced) as timeline:
        train(
            TracedWorkers(ScriptedTeam()),
            Numbers(),
            steps=range(steps),
            recipe=recipe_of(),
            schedule=PAPER,
            schedule_state={},
            lr=lambda step: 1e-3,
            journal=timeline,
        )
    assert [seen.step for seen in reader.steps] == list(range(steps))
    return reader


def test_each_verb_lies_inside_its_step(tmp_path: Path) -> None:
    run(tmp_path / "trace.json", steps=3, traced=9)
    spans = spans_in(tmp_path / "trace.json")
    steps = [one for one in spans if one.name == "step"]
    assert [one.about["step"] for one in steps] == [0, 1, 2]
    for step in steps:
        inside = [one.name for one in spans if step.holds(one) and one is not step]
        assert sorted(inside) == ["generate", "push", "score", "update"]


def test_the_trace_is_whole_after_each_step_and_does_not_grow_after_its_last_one(tmp_path: Path) -> None:
    reader = run(tmp_path / "trace.json", steps=200, traced=3)
    before_any, first, second, *rest = reader.sizes
    assert before_any < first < second < rest[0]
    assert set(rest) == {rest[0]}
    assert [one.about["step"] for one in spans_in(tmp_path / "trace.json") if one.name == "step"] == [0, 1, 2]


def test_without_traced_steps_there_is_no_trace_nor_that_of_an_earlier_start(tmp_path: Path) -> None:
    run(tmp_path / "trace.json", steps=1, traced=1)
    assert set(run(tmp_path / "trace.json", steps=2, traced=0).sizes) == {0}
    assert not (tmp_path / "trace.json").exists()


def test_a_run_that_stops_inside_its_traced_steps_leaves_a_whole_trace(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="lost"),
        Timeline(tmp_path / "trace.json", Gone(), Diary(), steps=9) as timeline,
    ):
        timeline.begin(0)
        with span("update"):
            raise RuntimeError("lost")
    assert [one.name for one in spans_in(tmp_path / "trace.json")] == ["update"]


def test_where_a_trace_cannot_be_written_the_run_goes_on_and_nothing_more_is_kept(tmp_path: Path) -> None:
    run(tmp_path / "no such folder" / "trace.json", steps=3, traced=3)
    keep("late", 0.0)
    assert take(go_on=False).spans == []


def test_nothing_is_kept_where_nobody_asked() -> None:
    take(go_on=False)
    with span("unseen"):
        keep("neither", 0.0)
    assert take(go_on=False).spans == []

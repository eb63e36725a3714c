"""The trace of a loop with scripted workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from othink_ray.driver.callbacks import Timeline
from othink_ray.driver.loop import StepRecord, train
from othink_ray.tracing import Spans, record_span, span, take_spans
from tests.driver.fakes import PAPER, NumberStream, RecordingCallbacks, recipe_of
from tests.driver.scripted_pools import ScriptedPools, worker_group
from tests.driver.trace_events import spans_in


class NoProcesses:
    """A run without other processes."""

    def spans(self, *, keep_recording: bool) -> dict[str, Spans]:
        return {}


class LostProcesses:
    """Processes that cannot be reached at the end."""

    def spans(self, *, keep_recording: bool) -> dict[str, Spans]:
        assert keep_recording, "lost processes must not be called at the end"
        return {}


class TraceReader(RecordingCallbacks):
    """Reads the trace after each step."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.sizes: list[int] = []

    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        self.sizes.append(len(json.loads(self.path.read_text())) if self.path.exists() else 0)


def run(path: Path, *, steps: int, traced: int) -> TraceReader:
    reader = TraceReader(path)
    with Timeline(path, NoProcesses(), reader, steps=traced) as timeline:
        train(
            worker_group(ScriptedPools(signal=1.0)),
            NumberStream(),
            steps=range(steps),
            recipe=recipe_of(),
            schedule=PAPER,
            schedule_state={},
            lr=lambda step: 1e-3,
            callbacks=timeline,
        )
    assert [record.step for record in reader.steps] == list(range(steps))
    return reader


def test_each_verb_span_lies_inside_its_step(tmp_path: Path) -> None:
    run(tmp_path / "trace.json", steps=3, traced=9)
    spans = spans_in(tmp_path / "trace.json")
    steps = [item for item in spans if item.name == "step"]
    assert [step.attributes["step"] for step in steps] == [0, 1, 2]
    for step in steps:
        inside = [item.name for item in spans if step.holds(item) and item is not step]
        assert sorted(inside) == ["generate", "push", "score", "update"]


def test_the_trace_is_valid_after_each_step_and_then_final(tmp_path: Path) -> None:
    reader = run(tmp_path / "trace.json", steps=200, traced=3)
    before_any, first, second, *rest = reader.sizes
    assert before_any < first < second < rest[0]
    assert set(rest) == {rest[0]}
    spans = spans_in(tmp_path / "trace.json")
    assert [item.attributes["step"] for item in spans if item.name == "step"] == [0, 1, 2]


def test_without_traced_steps_an_old_trace_is_deleted(tmp_path: Path) -> None:
    run(tmp_path / "trace.json", steps=1, traced=1)
    assert set(run(tmp_path / "trace.json", steps=2, traced=0).sizes) == {0}
    assert not (tmp_path / "trace.json").exists()


def test_a_run_that_fails_while_traced_leaves_a_valid_trace(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="lost"),
        Timeline(tmp_path / "trace.json", LostProcesses(), RecordingCallbacks(), steps=9) as timeline,
    ):
        timeline.on_start(0)
        with span("update"):
            raise RuntimeError("lost")
    assert [item.name for item in spans_in(tmp_path / "trace.json")] == ["update"]


def test_an_unwritable_trace_stops_recording_not_the_run(tmp_path: Path) -> None:
    run(tmp_path / "no such folder" / "trace.json", steps=3, traced=3)
    record_span("late", 0.0)
    assert take_spans(keep_recording=False).spans == []


def test_without_tracing_no_span_is_kept() -> None:
    take_spans(keep_recording=False)
    with span("unseen"):
        record_span("neither", 0.0)
    assert take_spans(keep_recording=False).spans == []

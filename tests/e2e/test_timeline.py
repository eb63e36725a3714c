"""Timelines of real runs: the spans of every process."""

from __future__ import annotations

from collections.abc import Sequence

from tests.driver.trace_events import Done, spans_in
from tests.e2e.conftest import Run

PHASES = {"prepare", "forward", "backward", "optimizer step", "sum over ranks"}


def named(spans: Sequence[Done], process: str, name: str) -> list[Done]:
    return [span for span in spans if span.process == process and span.name == name]


def test_every_process_has_its_spans_inside_each_step(plain_run: Run) -> None:
    spans = spans_in(plain_run.folder / "trace.json")
    steps = named(spans, "driver", "step")
    assert [step.attributes["step"] for step in steps] == [0, 1, 2, 3]
    for step in steps:
        inside = [span for span in spans if step.holds(span)]
        [generated], [updated] = named(inside, "rollout 0", "generate"), named(inside, "learner 0", "update")
        groups = named(inside, "rollout 0", "group")
        assert len(groups) == len(named(inside, "reward 0", "score")) == 4
        assert all(generated.holds(group) for group in groups)
        assert {span.name for span in inside if span.process == "learner 0" and updated.holds(span)} >= PHASES
        for process, name in (("driver", "push"), ("driver", "audit"), ("rollout 0", "probe"), ("learner 0", "audit")):
            assert len(named(inside, process, name)) == 1
    assert len(named(spans, "driver", "evaluate")) == 2
    assert len(named(spans, "learner 0", "write checkpoint")) == 2


def test_overlap_generates_the_next_step_during_the_update(overlapped: Run) -> None:
    spans = spans_in(overlapped.folder / "trace.json")
    updated = named(spans, "learner 0", "update")
    generated = [span for span in named(spans, "rollout 0", "generate") if span.attributes["answers"] == 4]
    assert len(updated) == len(generated) == 3
    for this, following in zip(updated, generated[1:], strict=False):
        assert this.meets(following)
    assert not updated[0].meets(generated[0])

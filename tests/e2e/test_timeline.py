"""The timelines of real runs: who did what when."""

from __future__ import annotations

from collections.abc import Sequence

from tests.driver.trace_events import Done, spans_in
from tests.e2e.conftest import Run

PHASES = {"prepare", "forward", "backward", "optimiser step", "sum over ranks"}


def of(spans: Sequence[Done], process: str, name: str) -> list[Done]:
    return [one for one in spans if one.process == process and one.name == name]


def test_every_process_has_its_spans_inside_each_step(plain_run: Run) -> None:
    spans = spans_in(plain_run.folder / "trace.json")
    steps = of(spans, "driver", "step")
    assert [step.about["step"] for step in steps] == [0, 1, 2, 3]
    for step in steps:
        inside = [one for one in spans if step.holds(one)]
        [generated], [learned] = of(inside, "rollout 0", "generate"), of(inside, "learner 0", "update")
        groups = of(inside, "rollout 0", "group")
        assert len(groups) == len(of(inside, "reward 0", "score")) == 4
        assert all(generated.holds(group) for group in groups)
        assert {one.name for one in inside if one.process == "learner 0" and learned.holds(one)} >= PHASES
        for process, name in (("driver", "push"), ("driver", "audit"), ("rollout 0", "probe"), ("learner 0", "audit")):
            assert len(of(inside, process, name)) == 1
    assert len(of(spans, "driver", "evaluate")) == 2
    assert len(of(spans, "learner 0", "write checkpoint")) == 2


def test_overlap_generates_the_next_step_during_the_update(overlapped: Run) -> None:
    spans = spans_in(overlapped.folder / "trace.json")
    learned = of(spans, "learner 0", "update")
    generated = [one for one in of(spans, "rollout 0", "generate") if one.about["answers"] == 4]
    assert len(learned) == len(generated) == 3
    for this, following in zip(learned, generated[1:], strict=False):
        assert this.meets(following)
    assert not learned[0].meets(generated[0])

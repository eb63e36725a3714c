"""One real run with overlap: the next step is generated during the update of this one."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import Run


def samples(run: Run) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]


def test_each_step_but_the_first_corrects_stale_answers(overlapped: Run) -> None:
    assert [line["sampler/staleness"] for line in overlapped.steps] == [0, 1, 1]
    assert [sample["version"] for sample in samples(overlapped)] == [0, 0, 1]
    first, *stale = overlapped.steps
    assert first["ratio/used_mean"] == 1.0
    assert first["sampler/logp_gap_max"] < 1e-3
    for line in stale:
        assert line["sampler/logp_gap_max"] > 1e-3
        assert line["ratio/used_mean"] == pytest.approx(line["ratio/truncated_mean"]) != 1.0
        assert line["ratio/truncated_mean"] <= line["ratio/raw_mean"] * (1 + 1e-6)
        assert line["ratio/sequence_truncated_mean"] <= line["ratio/sequence_raw_mean"]


def test_engines_and_learner_agree_after_every_push(overlapped: Run) -> None:
    assert all(line["audit/logp_gap_mean"] < 1e-4 for line in overlapped.steps)


def test_the_first_step_equals_that_of_the_plain_run(overlapped: Run, plain_run: Run) -> None:
    for name in ("reward/mean", "loss", "kl/beta", "ratio/raw_mean", "grad_norm"):
        assert overlapped.steps[0][name] == pytest.approx(plain_run.steps[0][name], rel=1e-6)


def test_hidden_sampling_time_is_not_part_of_the_step_time(overlapped: Run) -> None:
    for line in overlapped.steps:
        laps = [line[f"time/{name}_s"] for name in ("generate", "score", "update", "push")]
        assert line["time/step_s"] == pytest.approx(sum(laps))
        assert line["time/hidden_s"] <= line["time/update_s"]
    assert [line["time/hidden_s"] > 0 for line in overlapped.steps] == [True, True, False]


def test_a_checkpoint_holds_the_data_position_of_its_next_step(overlapped: Run) -> None:
    half = overlapped.folder / "checkpoints" / "step_2"
    assert json.loads((half / "state.json").read_text())["data_position"] == 8


@pytest.mark.slow
def test_prefetching_beside_an_update_changes_no_step(overlapped: Run, overlapped_alone: Run) -> None:
    for line, other in zip(overlapped.steps, overlapped_alone.steps, strict=True):
        for name in ("reward/mean", "loss", "kl/mean", "grad_norm", "ratio/raw_mean", "vision/encodes"):
            assert line[name] == pytest.approx(other[name], rel=1e-6)

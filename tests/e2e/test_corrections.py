"""Whole runs in bfloat16 that mask what engine and learner find too differently likely."""

from __future__ import annotations

import math

import pytest

from tests.e2e.conftest import StartRun

# Rounding alone is to be masked: bfloat16 moves a token's logprob by about 0.01.
LOW, CAP = 0.99, 1.01
RATIOS = (
    *("raw_mean", "raw_max", "clip_frac", "used_mean", "truncated_mean", "truncated_frac", "masked_frac"),
    *("sequence_raw_mean", "sequence_truncated_mean", "sequence_truncated_frac"),
)


@pytest.mark.parametrize("correction", ["icepop", "mis_token"])
def test_a_bfloat16_run_masks_rounding_and_trains_on(correction: str, start_run: StartRun) -> None:
    run = start_run(
        *("model.dtype=bfloat16", "weights.audit_tolerance=0.05", "learner.lr=1e-4"),
        *(f"algo.correction={correction}", f"algo.correction_low={LOW}", f"algo.correction_cap={CAP}"),
        *("train.steps=3", "train.checkpoint_every=0", "eval.questions=4"),
    )
    assert [line["step"] for line in run.steps] == [0, 1, 2]
    for line in run.steps:
        ratio = {name: line[f"ratio/{name}"] for name in RATIOS}
        assert all(math.isfinite(value) for value in ratio.values())
        assert ratio["raw_mean"] == pytest.approx(1.0, abs=0.02)
        assert 1.0 < ratio["raw_max"] < 1.5
        assert ratio["truncated_mean"] <= CAP
        assert 0 < ratio["masked_frac"] < 0.6
        # What is not masked counts by its own ratio, which is near 1.
        assert LOW < ratio["used_mean"] / (1 - ratio["masked_frac"]) < CAP
        if correction == "mis_token":
            assert ratio["masked_frac"] == pytest.approx(ratio["truncated_frac"])
        else:
            assert ratio["masked_frac"] > ratio["truncated_frac"]
        assert 0 < line["grad_norm"] < math.inf
        assert line["audit/verified_weights"] > 0
    assert math.isfinite(run.summary["after"]["accuracy"])

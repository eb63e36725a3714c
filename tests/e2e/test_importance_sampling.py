"""Whole bfloat16 runs with corrections that mask tokens whose policy and sampler logprobs differ too much."""

from __future__ import annotations

import math

import pytest

from tests.e2e.conftest import StartRun

pytestmark = pytest.mark.slow

# On the tiny model engine and learner agree to 1e-8 nats: the ratios come from weights that are one step older.
LOW, CAP = 0.99, 1.01
RATIOS = (
    *("raw_mean", "raw_max", "clip_frac", "used_mean", "truncated_mean", "truncated_frac", "masked_frac"),
    *("sequence_raw_mean", "sequence_truncated_mean", "sequence_truncated_frac"),
)


@pytest.mark.parametrize("mode", ["icepop", "mis_token"])
def test_an_overlapped_bfloat16_run_masks_and_trains_on(mode: str, start_run: StartRun) -> None:
    run = start_run(
        *("model.dtype=bfloat16", "weights.audit_tolerance=0.05", "learner.lr=5e-4", "train.overlap=true"),
        *(f"algo.tis={mode}", f"algo.tis_floor={LOW}", f"algo.tis_cap={CAP}"),
        *("train.steps=3", "train.checkpoint_every=0", "eval.questions=4"),
    )
    assert [line["sampler/staleness"] for line in run.steps] == [0, 1, 1]
    fresh, *stale = [{name: line[f"ratio/{name}"] for name in RATIOS} for line in run.steps]
    assert fresh["raw_mean"] == fresh["used_mean"] == pytest.approx(1.0, abs=1e-4)
    assert fresh["masked_frac"] == 0
    for ratio in stale:
        assert ratio["raw_mean"] == pytest.approx(1.0, abs=0.1)
        assert ratio["raw_max"] > CAP >= ratio["truncated_mean"]
        assert 0 < ratio["masked_frac"] < 0.9
        if mode == "mis_token":  # unmasked tokens are weighted by their ratio
            assert ratio["masked_frac"] == pytest.approx(ratio["truncated_frac"])
            assert ratio["used_mean"] <= CAP * (1 - ratio["masked_frac"])
        else:
            assert ratio["masked_frac"] > ratio["truncated_frac"] > 0
            assert LOW <= ratio["used_mean"] / (1 - ratio["masked_frac"]) <= CAP
    assert all(0 < line["grad_norm"] < math.inf and line["audit/verified_weights"] > 0 for line in run.steps)

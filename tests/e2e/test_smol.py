"""Three steps of the whole system with a pretrained language model (a real vocabulary) and a real data set."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import StartRun

pytestmark = pytest.mark.slow


def test_a_pretrained_language_model_trains_on_easy_vqa(start_run: StartRun) -> None:
    run = start_run(
        *(
            "model=smol",
            "data=easy_vqa",
            "model.tiny.warm_steps=2",
            "model.smol.warm_steps=2",
            "model.smol.warm_batch=4",
        ),
        *("train.steps=3", "train.prompts_per_step=2", "algo.group_size=2", "train.checkpoint_every=0"),
        *("rollout.max_tokens=12", "eval.questions=4", "rollout.max_num_seqs=8"),
    )
    assert len(run.steps) == 3
    for step in run.steps:
        assert step["audit/logp_gap_max"] < 1e-3
        assert step["push/mb"] > 500
    assert set(run.summary["also"]) == {"easy_vqa-blind"}
    config = json.loads((run.folder / "export" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 49_157

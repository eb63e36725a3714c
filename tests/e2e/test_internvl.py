"""A whole run of another family than Qwen: evaluated by real vLLM before and after, audited against the learner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import StartRun
from tests.families.checkpoints import build_checkpoint

pytestmark = pytest.mark.slow


def test_internvl_is_trained_pushed_and_exported(start_run: StartRun, texts: list[str], tmp_path: Path) -> None:
    build_checkpoint("internvl", tmp_path, texts)
    run = start_run(
        "mode=sft",
        "model.family=internvl",
        f"model.path={tmp_path}",
        "model.max_pixels=12544",  # four tiles
        "learner.lr=2e-3",
        "train.prompts_per_step=16",
        "train.steps=6",
    )
    losses = [line["loss"] for line in run.steps]
    assert losses[-1] < 0.7 * losses[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, run.folder / "export"))
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []

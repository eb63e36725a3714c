"""Whole runs with LoRA adapters or frozen parts: real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from othink_ray.main import main
from tests.e2e.conftest import SMALL, Run, StartRun
from tests.e2e.test_run import furthest_apart, weights

pytestmark = pytest.mark.slow

LORA = ("learner.lora.rank=8", "learner.lr=2e-3")


@pytest.fixture(scope="module")
def adapted_run(start_run: StartRun) -> Run:
    return start_run(*LORA, "eval.every=2")


def base_of(run: Run) -> dict[str, Tensor]:
    """Return the weights of the base model that the run began with."""
    [base] = [line for line in run.screen.splitlines() if line.startswith("base model: ")]
    return load_file(f"{base.removeprefix('base model: ').split(' (')[0]}/model.safetensors")


def changed_by(run: Run) -> set[str]:
    before, after = base_of(run), weights(run.folder)
    assert before.keys() == after.keys()
    return {name for name in before if not before[name].equal(after[name])}


def megabytes(run: Run, names: set[str]) -> float:
    return sum(weight.nbytes for name, weight in base_of(run).items() if name in names) / 2**20


def test_engines_and_learner_agree(adapted_run: Run) -> None:
    assert [line["step"] for line in adapted_run.steps] == [0, 1, 2, 3]
    for line in adapted_run.steps:
        assert line["audit/logp_gap_mean"] < 1e-5
        assert line["sampler/logp_gap_max"] < 1e-3


def test_the_policy_diverges_from_a_reference_in_one_network(adapted_run: Run) -> None:
    first, *_, last = adapted_run.steps
    assert first["kl/mean"] == 0.0 < 1e-6 < last["kl/mean"]


def test_only_adapters_are_pushed_and_only_their_matrices_move(adapted_run: Run) -> None:
    adapted = {name for name in base_of(adapted_run) if name.startswith("model.layers.") and "_proj.weight" in name}
    assert changed_by(adapted_run) == adapted
    factors = load_file(adapted_run.folder / "export/adapter/adapter_model.safetensors").values()
    pushed = sum(factor.nbytes for factor in factors) / 2**20
    assert [line["push/mb"] for line in adapted_run.steps] == pytest.approx([pushed] * 4)
    assert pushed < megabytes(adapted_run, adapted) / 3


def test_a_checkpoint_holds_adapters_and_their_moments_alone(adapted_run: Run) -> None:
    with safe_open(adapted_run.folder / "checkpoints/step_2/learner_0.safetensors", framework="pt") as stored:
        owners, kinds = zip(*(key.rsplit("/", 1) for key in stored.keys()), strict=True)  # noqa: SIM118
    assert set(kinds) == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(".lora_A." in name or ".lora_B." in name for name in owners)


def test_other_rank_counts_resume_from_it_and_end_alike(adapted_run: Run, start_run: StartRun) -> None:
    half = adapted_run.folder / "checkpoints" / "step_2"
    resumed = start_run(*LORA, f"run.resume={half}", "learner.world_size=2", "learner.zero_stage=3")
    assert [line["step"] for line in resumed.steps] == [2, 3]
    for one, other in zip(adapted_run.steps[2:], resumed.steps, strict=True):
        assert one["reward/mean"] == other["reward/mean"]
        assert one["kl/mean"] == pytest.approx(other["kl/mean"], rel=1e-2)
    assert furthest_apart(weights(adapted_run.folder), weights(resumed.folder)) < 1e-4


def test_a_plain_vllm_answers_with_the_export_as_the_run_ended(adapted_run: Run) -> None:
    program = [sys.executable, "-m", "tests.e2e.fresh_vllm", str(adapted_run.folder / "export"), "16"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("accuracy ")[-1]) == pytest.approx(adapted_run.summary["after"]["accuracy"])


def test_supervised_training_has_adapters_too(adapted_run: Run, start_run: StartRun) -> None:
    tuned = start_run(*LORA, "mode=sft", "rollout=hf", f"model.path={adapted_run.folder}", "train.prompts_per_step=16")
    losses = [line["loss"] for line in tuned.steps]
    assert losses[-1] < losses[0]
    assert (tuned.folder / "export/adapter/adapter_model.safetensors").is_file()
    one, other = weights(adapted_run.folder), weights(tuned.folder)
    assert {name.rpartition(".")[0].endswith("_proj") for name in one if not one[name].equal(other[name])} == {True}


COARSE = ("learner.lora.rank=8", "model.dtype=bfloat16", "weights.audit_tolerance=0.05")


@pytest.fixture(scope="module")
def coarse_run(start_run: StartRun, adapted_run: Run) -> Run:
    """Run in bfloat16, at a learning rate whose updates are far below the rounding of the adapted matrices."""
    return start_run(*COARSE, "train.steps=3", "learner.lr=1e-5", "train.checkpoint_every=0")


def test_a_bfloat16_run_serves_its_adapters_and_passes_audits(coarse_run: Run) -> None:
    assert len(coarse_run.steps) == 3
    assert all(0 < line["audit/logp_gap_mean"] < 0.02 for line in coarse_run.steps)


def test_the_export_of_a_bfloat16_run_is_merged_in_float32(coarse_run: Run) -> None:
    before, after = base_of(coarse_run), weights(coarse_run.folder)
    moved = {name: after[name].float() - before[name].bfloat16().float() for name in after}
    moved = {name: change for name, change in moved.items() if change.any()}
    assert moved and all(after[name].dtype == torch.float32 for name in moved)
    assert all(change.abs().max() < 1e-4 for change in moved.values())
    plain = AutoModelForImageTextToText.from_pretrained(coarse_run.folder / "export")
    loaded = {name.replace("model.language_model.", "model."): weight for name, weight in plain.state_dict().items()}
    assert all(torch.equal(loaded[name], after[name]) for name in moved)


def test_eval_of_a_bfloat16_run_uses_its_exact_policy(coarse_run: Run, start_run: StartRun) -> None:
    evaluated = start_run("mode=eval", f"model.path={coarse_run.folder}", *COARSE[1:])
    [result] = json.loads((evaluated.folder / "evaluation.json").read_text())["results"]
    assert result["accuracy"] == coarse_run.summary["after"]["accuracy"]


def test_training_from_a_merge_that_would_be_rounded_is_refused(
    coarse_run: Run, ray_here: None, cache: Path, tmp_path: Path
) -> None:
    screen = io.StringIO()
    with redirect_stderr(screen):
        arguments = [
            *SMALL,
            *COARSE,
            f"model.path={coarse_run.folder}",
            f"run.dir={tmp_path}",
            f"run.cache_dir={cache}",
        ]
        assert main(arguments) == 2
    text = " ".join(screen.getvalue().split())
    assert "whose export is merged in float32" in text and "run.resume" in text and "model.dtype=float32" in text


@pytest.mark.parametrize("freeze", ["vision", "projector"])
def test_frozen_parts_are_neither_changed_nor_pushed(start_run: StartRun, freeze: str) -> None:
    run = start_run(f"learner.freeze={freeze}", "train.steps=2", "train.checkpoint_every=0")
    tower = {name for name in base_of(run) if name.startswith("visual.")}
    projector = {name for name in tower if name.startswith("visual.merger.")}
    kept = tower - projector if freeze == "vision" else tower
    trained = base_of(run).keys() - kept
    assert 0 < len(projector) < len(tower) and changed_by(run) == trained
    assert [line["push/mb"] for line in run.steps] == pytest.approx([megabytes(run, trained)] * 2)
    assert all(line["audit/logp_gap_mean"] <= line["audit/tolerance"] < 1e-5 for line in run.steps)
    assert {line["audit/verified_weights"] for line in run.steps} == {len(trained)}  # all others at the first push only


def test_an_unknown_lora_target_ends_the_run_in_one_line(ray_here: None, cache: Path, tmp_path: Path) -> None:
    settings = ["learner.lora.rank=4", "learner.lora.targets=[q_porj]"]
    screen = io.StringIO()
    with redirect_stdout(screen):
        assert main([*SMALL, *settings, f"run.dir={tmp_path}", f"run.cache_dir={cache}"]) == 1
    text = " ".join(screen.getvalue().split())
    assert "stopped: learner.lora.targets = [q_porj] must be" in text and "Did you mean q_proj?" in text
    assert "loading" not in text

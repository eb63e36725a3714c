"""Adapters in whole runs: real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.e2e.conftest import Run, StartRun
from tests.e2e.test_run import furthest_apart, weights

LORA = ("learner.lora.rank=8", "learner.lr=2e-3")


@pytest.fixture(scope="module")
def adapted_run(start_run: StartRun) -> Run:
    return start_run(*LORA, "eval.every=2")


def test_engines_without_adapters_answer_as_the_learner_with_them(adapted_run: Run) -> None:
    assert [line["step"] for line in adapted_run.steps] == [0, 1, 2, 3]
    for line in adapted_run.steps:
        assert line["audit/logp_gap_mean"] < 1e-5
        assert line["sampler/logp_gap_max"] < 1e-3


def test_the_policy_leaves_a_reference_that_is_the_same_network(adapted_run: Run) -> None:
    first, *_, last = adapted_run.steps
    assert first["kl/mean"] == 0.0 < 1e-6 < last["kl/mean"]


def test_only_the_adapted_matrices_are_pushed(adapted_run: Run) -> None:
    [base] = [line for line in adapted_run.screen.splitlines() if line.startswith("base model: ")]
    before = load_file(f"{base.removeprefix('base model: ').split(' (')[0]}/model.safetensors")
    after = weights(adapted_run.folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if name.startswith("model.layers.") and "_proj.weight" in name}
    sent = sum(before[name].nbytes for name in changed) / 2**20
    assert [line["push/mb"] for line in adapted_run.steps] == pytest.approx([sent] * 4)


def test_a_checkpoint_holds_adapters_and_their_moments_alone(adapted_run: Run) -> None:
    with safe_open(adapted_run.folder / "checkpoints/step_2/learner_0.safetensors", framework="pt") as stored:
        owners, kinds = zip(*(key.rsplit("/", 1) for key in stored.keys()), strict=True)  # noqa: SIM118
    assert set(kinds) == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(".lora_A." in name or ".lora_B." in name for name in owners)


def test_other_ranks_go_on_from_it_and_end_alike(adapted_run: Run, start_run: StartRun) -> None:
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
    taught = start_run(*LORA, "mode=sft", "rollout=hf", f"model.path={adapted_run.folder}", "train.prompts_per_step=16")
    losses = [line["loss"] for line in taught.steps]
    assert losses[-1] < losses[0]
    assert (taught.folder / "export/adapter/adapter_model.safetensors").is_file()
    one, other = weights(adapted_run.folder), weights(taught.folder)
    assert {name.rpartition(".")[0].endswith("_proj") for name in one if not one[name].equal(other[name])} == {True}

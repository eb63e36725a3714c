"""One real run: its records, its metrics and its model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from othink_ray.config.load import load
from othink_ray.core.kl import schedule
from othink_ray.data import open_source
from othink_ray.engines.base import Sampling
from othink_ray.engines.hf_rollout import HFRollout
from othink_ray.families import open_family
from othink_ray.rewards import accuracy
from tests.driver.trace_events import spans_in
from tests.e2e.conftest import Run, StartRun

METRICS = (
    *("reward/mean", "reward/accuracy", "reward/format", "kl/beta", "kl/mean"),
    *("audit/logp_gap_mean", "audit/logp_gap_max", "ratio/raw_mean", "ratio/raw_max", "ratio/clip_frac", "entropy"),
    *("tokens/completion_mean", "groups/constant_frac", "time/step_s", "time/generate_s", "time/score_s"),
    *("time/update_s", "time/push_s", "throughput/samples_per_s"),
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def furthest_apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest relative distance of any tensor."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def prefetched(run: Run) -> bool:
    """Return whether engines prepared prompts before they sampled them."""
    spans = spans_in(run.folder / "trace.json")
    return any(each.process.startswith("rollout") and each.name == "prefetch" for each in spans)


def test_each_step_is_one_line_with_every_metric(plain_run: Run) -> None:
    assert [line["step"] for line in plain_run.steps] == [0, 1, 2, 3]
    for line in plain_run.steps:
        assert set(METRICS) <= line.keys()
    assert "eval/accuracy" in plain_run.steps[-1]


def test_beta_follows_the_paper_at_every_step(plain_run: Run) -> None:
    for line in plain_run.steps:
        assert line["kl/beta"] == pytest.approx(schedule("paper", int(line["step"]), 4, 0.04, 0.1, 0.3), abs=1e-12)


def test_engine_and_learner_agree_on_every_sampled_token(plain_run: Run) -> None:
    for line in plain_run.steps:
        assert line["audit/logp_gap_mean"] < 1e-4
        assert line["sampler/logp_gap_max"] < 1e-3
        assert line["ratio/raw_mean"] == pytest.approx(1.0, abs=1e-4)


def test_each_network_encodes_an_image_once_per_group(plain_run: Run) -> None:
    for line in plain_run.steps:
        trained_and_reference = 2 if line["kl/beta"] > 0 else 1
        assert line["rollout/image_encodes"] == 4
        assert line["vision/encodes"] == 4 * trained_and_reference


def test_the_folder_holds_all_records(plain_run: Run) -> None:
    for name in ("config.yaml", "samples.jsonl", "report.html", "checkpoints/step_2", "checkpoints/step_4", "export"):
        assert (plain_run.folder / name).exists(), name
    samples = [json.loads(line) for line in (plain_run.folder / "samples.jsonl").read_text().splitlines()]
    assert [len(sample["completions"]) for sample in samples] == [4, 4, 4, 4]
    assert "before" in plain_run.screen and "report.html" in plain_run.screen


def test_wandb_offline_leaves_a_run_that_can_be_synced(plain_run: Run) -> None:
    [stored] = (plain_run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert stored.stat().st_size > 1000


def test_all_weights_have_moved(plain_run: Run) -> None:
    [base] = [line for line in plain_run.screen.splitlines() if line.startswith("base model: ")]
    before = load_file(Path(base.removeprefix("base model: ").split(" (")[0]) / "model.safetensors")
    after = weights(plain_run.folder)
    assert [name for name in after if torch.equal(before[name], after[name])] == []


@pytest.mark.slow
def test_the_export_reproduces_the_accuracy_in_other_engines(plain_run: Run) -> None:
    config = load(["eval.questions=16"])
    export = str(plain_run.folder / "export")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.fresh_vllm", export, "16"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as fresh:
        plain = AutoModelForImageTextToText.from_pretrained(export)
        assert AutoProcessor.from_pretrained(export).tokenizer.eos_token_id == plain.generation_config.eos_token_id
        source = open_source(config.data, "test")
        prompts = [source.prompt(index) for index in range(16)]
        greedy = Sampling(answers=1, max_tokens=config.rollout.max_tokens, temperature=0.0, seed=0)
        family = open_family(config.model, export)
        groups = list(HFRollout(config.rollout, config.model, family).generate(prompts, greedy))
        right = [accuracy(group.completions[0].text, group.prompt.answer) for group in groups]
        assert sum(right) / 16 == pytest.approx(plain_run.summary["after"]["accuracy"])
        output, errors = fresh.communicate(timeout=200)
    assert fresh.returncode == 0, errors
    assert float(output.split("accuracy ")[-1]) == pytest.approx(plain_run.summary["after"]["accuracy"])


@pytest.mark.slow
def test_ranks_actors_sharding_and_prefetch_do_not_change_a_run(plain_run: Run, start_run: StartRun) -> None:
    others = ("learner.zero_stage=3", "learner.world_size=2", "rollout.num_actors=2", "train.prefetch_prompts=false")
    spread = start_run(*others)
    assert prefetched(plain_run) and not prefetched(spread)
    assert furthest_apart(weights(plain_run.folder), weights(spread.folder)) < 1e-4
    for one, other in zip(plain_run.steps, spread.steps, strict=True):
        assert one["reward/mean"] == other["reward/mean"]


def test_a_resumed_run_ends_like_an_uninterrupted_one(plain_run: Run, start_run: StartRun) -> None:
    half = plain_run.folder / "checkpoints" / "step_2"
    resumed = start_run(f"run.resume={half}", "learner.world_size=1")
    assert f"resuming after step 2 of 4, from {half}" in resumed.screen
    assert [line["step"] for line in resumed.steps] == [2, 3]
    assert resumed.summary["before"] == plain_run.summary["before"]
    for one, other in zip(plain_run.steps[2:], resumed.steps, strict=True):
        assert one["reward/mean"] == other["reward/mean"]
        assert one["kl/beta"] == other["kl/beta"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-6)
    assert furthest_apart(weights(plain_run.folder), weights(resumed.folder)) < 1e-4

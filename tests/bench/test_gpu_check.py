"""The GPU check without a GPU: its process handling, its arithmetic, and its parts at toy shapes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu import colocated, generating, learning
from benchmarks.gpu.demo import curve
from benchmarks.gpu.learner import PASSES, PlainLearner
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.peaks import mfu, peak
from benchmarks.gpu.rows import Row, check_limit, measure_each
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.shapes import SHAPES, VOCABULARY, Shape, questions, random_answers
from benchmarks.gpu.table import table

ROOT = Path(__file__).resolve().parents[2]
WIDTH, INNER, LAYERS, VISION = 64, 96, 2, 64
TOY = Shape(
    family="qwen2_vl",
    text={
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mrope_section": [4, 6, 6],
    },
    vision={"depth": 1, "embed_dim": VISION, "num_heads": 2, "hidden_size": WIDTH, "mlp_ratio": 2},
)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(
        folder=tmp_path_factory.mktemp("gpu_check"),
        device=torch.device("cpu"),
        dtype="float32",
        name="toy",
        shapes={"toy": TOY},
        sides=(56,),
        tokens=(8,),
        answers=3,
        prompts=2,
        groups=2,
        steps=1,
        colocated_steps=2,
        matmul_side=128,
        times_padded=0.0,
        engine={"gpus_per_actor": 0, "max_model_len": 128, "max_num_seqs": 8, "enforce_eager": True, "threads": 1},
    )


@pytest.fixture
def learner(setup: Setup) -> PlainLearner:
    return PlainLearner(setup.model(), setup.device, lr=1e-3)


def passed(rows: Sequence[Row]) -> list[Row]:
    assert rows and [row for row in rows if row.state != "ok"] == []
    return list(rows)


def test_the_learner_part_reports_unsupported_attention(setup: Setup) -> None:
    """FlexAttention has no backward pass on CPUs; the row of dense attention is still measured."""
    flex, dense = learning.learn(setup)
    assert (flex.setting, flex.state) == ("toy flex 56x56 T=8", "failed")
    assert flex.error.startswith("NotImplementedError: FlexAttention does not support backward on CPU")
    assert (dense.setting, dense.state) == ("toy dense 56x56 T=8", "ok")
    assert float(dense.figures["samples/s"]) > 0
    assert float(dense.figures["MFU %"]) > 0


@pytest.mark.slow
def test_padded_and_shared_prefix_samples_have_equal_logprobs(setup: Setup) -> None:
    [row] = passed([*learning.padded(setup)])
    assert row.setting == "toy dense 56x56 T=8"  # the attention that works on CPUs
    assert float(row.figures["logprob gap max"]) < 1e-3  # padded samples do not mask vision tokens
    assert float(row.figures["times as fast"]) > 0


@pytest.mark.slow
def test_memory_and_kernels_are_measured_at_toy_size(setup: Setup) -> None:
    assert len(passed([*learning.memory(setup)])) == 3
    [row] = passed([*learning.kernels(setup)])
    assert 0 < sum(map(float, row.figures.values())) <= 100
    assert "aten::" in (setup.folder / "gpu_profile.txt").read_text()


def test_a_step_changes_every_weight_but_not_the_reference(setup: Setup, learner: PlainLearner) -> None:
    before = {name: weight.detach().clone() for name, weight in learner.policy.named_parameters()}
    groups = random_answers(learner.family, questions(2, 56), 3, 8)
    learner.update([learner.batch(sample) for sample in learner.packs(groups)])
    assert [name for name, weight in learner.policy.named_parameters() if torch.equal(weight, before[name])] == []
    assert all(torch.equal(weight, before[name]) for name, weight in learner.reference.named_parameters())


def test_operations_match_a_manual_count(learner: PlainLearner) -> None:
    """2 FLOPs per weight and token in every matmul; block attention needs at most those of the full square."""
    answers, tokens = 3, 8
    [sample] = learner.packs(random_answers(learner.family, questions(1, 56), answers, tokens))
    length, patches, image = len(sample), 16, 4
    attention_in, attention_out = WIDTH * 2 * WIDTH, WIDTH * WIDTH  # q has two heads of 32, k and v one each
    predicting = 1 + answers * (tokens - 1)  # positions kept by last-layer pruning
    text = LAYERS * length * (attention_in + attention_out)
    text += ((LAYERS - 1) * length + predicting) * 3 * WIDTH * INNER
    vision = patches * (3 * 14 * 14 * 2 * VISION + 4 * VISION**2 + 2 * VISION * 2 * VISION)
    merger = image * (4 * VISION * 4 * VISION + 4 * VISION * WIDTH)
    head = answers * tokens * WIDTH * VOCABULARY
    squares = LAYERS * 2 * length**2 * WIDTH + 2 * patches**2 * VISION
    least = 2 * (text + vision + merger + head)
    assert PASSES * least < learner.operations([sample]) <= PASSES * (least + 2 * squares)


def test_counted_operations_match_a_measured_update(learner: PlainLearner) -> None:
    """Differences: inputs without gradient, and logits of a single chunk, which are computed once."""
    [sample] = learner.packs(random_answers(learner.family, questions(1, 56), 3, 8))
    learner.attention = "blocks"
    with FlopCounterMode(display=False) as counter:
        learner.update([learner.batch(sample)])
    assert counter.get_total_flops() == pytest.approx(learner.operations([sample]), rel=0.03)


def test_mfu_is_a_share_of_the_peak() -> None:
    assert mfu(operations=3e12, seconds=2.0, peak=6e12) == 0.25


def test_peaks_are_looked_up_by_device_name() -> None:
    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA L40S") == 362e12
    assert peak("NVIDIA L4") == 121e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("a new one") is None


def test_the_peak_of_an_unknown_device_is_measured(setup: Setup) -> None:
    [row] = passed([*learning.device(setup)])
    assert float(row.figures["TFLOP/s peak"]) > 0


@pytest.mark.parametrize(("name", "weights"), [("qwen2_vl_2b", 2.21e9), ("qwen2_5_vl_3b", 3.75e9)])
def test_networks_have_the_sizes_of_public_models(name: str, weights: float, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    from benchmarks.gpu.shapes import _config
    from othink_ray.families.tiny import train_tokenizer

    with torch.device("meta"):
        network = AutoModelForImageTextToText.from_config(_config(SHAPES[name], train_tokenizer(["a"]), "bfloat16"))
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(weights, rel=0.003)


@pytest.mark.slow
def test_vllm_generates_all_tokens_at_toy_size(setup: Setup) -> None:
    rows = in_a_process(setup, "generating", "generate")
    assert [row["state"] for row in rows] == ["ok", "ok"], rows
    assert rows[1]["figures"]["tokens/s"] > 0


@pytest.mark.slow
def test_engine_and_learner_agree_only_after_a_push(setup: Setup) -> None:
    rows = {row.setting: row for row in passed([*colocated.by_memory(setup)])}
    before, after = rows["audit before the push"], rows["shared_memory: worst of 2 audits"]
    assert float(after.figures["gap mean"]) < 1e-4
    assert float(before.figures["gap mean"]) > 10 * float(after.figures["gap mean"])
    assert set(rows["shared_memory: seconds per step, 2 x 3 answers"].figures) == {*colocated.PARTS} - {"sleep"}


def in_a_process(setup: Setup, module: str, function: str) -> list[dict[str, Any]]:
    """Run a part in a separate process: vLLM can be opened only once per process."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_records, (setup, module, function))


def _records(setup: Setup, module: str, function: str) -> list[dict[str, Any]]:
    from importlib import import_module

    run = getattr(import_module(f"benchmarks.gpu.{module}"), function)
    return [row.record() for row in run(setup)]


def test_nccl_is_skipped_without_a_second_gpu(setup: Setup) -> None:
    [row] = colocated.apart(setup)
    assert (row.state, row.error) == ("skipped", "needs two GPUs")


def test_the_engine_has_the_settings_of_conf(setup: Setup) -> None:
    assert generating.rollout_config(gpus_per_actor=1).fixed_length
    with pytest.raises(TypeError, match="unheard"):
        generating.rollout_config(unheard=1)


def test_a_failed_setting_does_not_stop_the_others() -> None:
    def fails() -> dict[str, float]:
        raise RuntimeError("out of memory\nand much more")

    rows = [*measure_each([("one", lambda: {"s": 1.0}), ("two", fails), ("three", lambda: {"s": 3.0})])]
    assert [row.state for row in rows] == ["ok", "failed", "ok"]
    assert rows[1].error == "RuntimeError: out of memory"


@pytest.mark.parametrize(
    ("found", "error"),
    [(2.0, ""), (0.5, "s must be at least 1"), (9.0, "s must be at most 3"), (float("nan"), "s must")],
)
def test_a_figure_outside_its_limit_fails_its_row(found: float, error: str) -> None:
    row = check_limit(Row(setting="one", figures={"s": found}), "s", at_least=1.0, at_most=3.0)
    assert (row.state, row.figures["s"]) == ("failed" if error else "ok", pytest.approx(found, nan_ok=True))
    assert row.error.startswith(error)


def test_a_failed_or_missing_part_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "absent", Part(module="x", function="x", seconds=9, needs=("no_such_package",)))
    fails = [sys.executable, "-c", "import sys; print('last words'); sys.exit(3)"]
    works = [sys.executable, "-c", f"print('{json.dumps(Row(setting='a', figures={'s': 1.0}).record())}')"]
    commands = iter([fails, works])
    run_part = gpu_check.run_part
    monkeypatch.setattr(gpu_check, "run_part", lambda _command, log, limit: run_part(next(commands), log, limit))
    rows = gpu_check.check(["device", "absent", "padded"], tmp_path / "kept.json", tmp_path, 60)
    assert [(row["part"], row["state"], row["error"]) for row in rows] == [
        ("device", "failed", "exited with status 3: last words"),
        ("absent", "skipped", "needs no_such_package, not installed here"),
        ("padded", "ok", ""),
    ]
    assert json.loads((tmp_path / "kept.json").read_text()) == rows
    assert (tmp_path / "gpu_check/device.txt").read_text() == "last words\n"


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_part_that_times_out_is_killed_and_keeps_its_rows(tmp_path: Path) -> None:
    row = json.dumps(Row(setting="early", figures={"s": 1.0}).record())
    children = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print({row!r}, flush=True)
print(child.pid, flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    rows = gpu_check.run_part([sys.executable, "-c", children], tmp_path / "log.txt", 2)
    assert time.monotonic() - start < 20
    assert (rows[0].setting, rows[0].state) == ("early", "ok")
    child = (tmp_path / "log.txt").read_text().splitlines()[1]
    assert (rows[1].state, rows[1].error) == ("failed", f"timed out after 2 s: {child}")
    # A killed process stays visible for a moment, until the kernel has reaped it.
    deadline = time.monotonic() + 10
    while is_running(int(child)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_time_left_a_part_is_skipped(tmp_path: Path) -> None:
    [row] = gpu_check.check(["device"], tmp_path / "kept.json", tmp_path, 0)
    assert (row["state"], row["error"]) == ("skipped", "no time left; raise --minutes or select parts with --only")


def test_the_table_aligns_columns_and_shows_errors() -> None:
    rows = [
        {"part": "learn", **Row(setting="flex", figures={"samples/s": 12345.6, "MFU %": 41.234}).record()},
        {"part": "NCCL", **Row(setting="push by NCCL", state="skipped", error="needs two GPUs").record()},
    ]
    assert table(rows).splitlines() == [
        "part   setting                figures",
        "learn  flex          ok       samples/s 12,346, MFU % 41.2",
        "NCCL   push by NCCL  skipped  needs two GPUs",
    ]


def test_a_curve_has_the_mean_reward_of_every_five_steps() -> None:
    times = {f"time/{part}_s": 1.0 for part in ("step", "generate", "update", "push")}
    steps = [{"reward/mean": float(step >= 5), "audit/logp_gap_mean": 1e-6, **times} for step in range(10)]
    assert curve(steps)["rewards"] == "0.000 1.000"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_check_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--json", str(tmp_path / "kept.json")]) == 2
    assert capsys.readouterr().err.startswith("no GPU to check: torch ")
    script = subprocess.run(
        [ROOT / "launch/gpu_check.sh"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert script.returncode == 2
    assert script.stderr.startswith("no GPU to check: nvidia-smi lists none on this machine; use one with")


def test_the_script_passes_on_python_and_arguments(tmp_path: Path) -> None:
    smi, python = tmp_path / "nvidia-smi", tmp_path / "python"
    smi.write_text("#!/bin/sh\necho 'GPU 0: one of those'\n")
    python.write_text('#!/bin/sh\necho "$@" "$HF_HUB_OFFLINE"\n')
    for program in (smi, python):
        program.chmod(0o755)
    script = subprocess.run(
        [ROOT / "launch/gpu_check.sh", "--only", "device"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert script.stdout == "-m benchmarks.gpu --only device 1\n"


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--only", "nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_every_part_names_an_existing_function() -> None:
    from importlib import import_module

    for part in PARTS.values():
        assert callable(getattr(import_module(f"benchmarks.gpu.{part.module}"), part.function))
        assert part.model in SHAPES

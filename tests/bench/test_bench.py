"""The benchmark's workloads, table and process handling; each run checks its answer lengths itself."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main, table, variants_of
from benchmarks.ours import BenchError, run
from benchmarks.peer import _questions
from benchmarks.times import spread
from benchmarks.work import Workload
from othink_ray.config.load import read
from othink_ray.config.validate import machine_for, problems


def work(cells: int, model: str = "bench") -> Workload:
    return Workload(prompts=8, answers=8, tokens=64, cells=cells, model=model)


@pytest.mark.parametrize(
    ("cells", "model"), [(1, "bench"), (2, "bench"), (4, "bench"), (12, "bench"), (24, "bench"), (8, "smol")]
)
def test_a_workload_is_a_valid_run_with_unscaled_images(cells: int, model: str) -> None:
    config, errors = read(work(cells, model).overrides())
    assert config is not None
    assert errors + problems(config, machine_for(config)) == []
    scenes = config.data.scenes
    assert scenes is not None
    pixels = (28 * scenes.image_cells) ** 2
    assert config.model.min_pixels <= pixels <= config.model.max_pixels
    assert (config.algo.kl.schedule, config.algo.kl.beta_min, config.algo.kl.beta_max) == ("constant", 0.04, 0.04)


def test_the_peer_gets_the_questions_of_the_run(tmp_path: Path) -> None:
    rows = json.loads(_questions(work(2), tmp_path).read_text())
    assert len(rows) == 128
    assert len({row["image"] for row in rows}) == 128
    assert all(Path(row["image"]).is_file() and row["question"] and row["answer"].isdigit() for row in rows)


def test_a_failed_process_is_reported_with_its_last_output(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"exited with status 3; full output in .*output\.txt:\nlast words"):
        run([sys.executable, "-c", "print('last words'); raise SystemExit(3)"], tmp_path / "output.txt")


def test_the_pretrained_model_has_no_two_rank_variant() -> None:
    assert list(variants_of(work(8))) == ["plain", "overlapped", "overlapped_2_ranks"]
    assert list(variants_of(work(8, "smol"))) == ["plain", "overlapped"]


def test_the_table_shows_the_speedup_over_the_peer() -> None:
    part = spread([0.1, 0.2, 0.3])
    ours = {"step_s": spread([1.0, 2.0, 3.0]), "samples_per_s": 32.0, "times_trl": 2.0}
    ours |= {f"{name}_s": part for name in ("generate", "score", "update", "push")}
    sides = {"plain": ours, "trl": {"step_s": spread([4.0]), "samples_per_s": 16.0}}
    _, plain, trl = table({"sides": sides}).splitlines()
    assert plain.split() == ["plain", *"2.000 (1.000 - 3.000) 32.0 2.00 0.200 0.200 0.200 0.200".split()]
    assert trl.split() == ["trl", *"4.000 (4.000 - 4.000) 16.0".split()]


def test_an_interrupted_process_has_time_to_clean_up(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    program = """
import signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    print("cleaned up", flush=True)
"""

    def interrupt() -> None:
        while not (output.exists() and "up" in output.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run([sys.executable, "-c", program], output)
    finally:
        signal.signal(signal.SIGINT, before)
    assert output.read_text().splitlines() == ["up", "cleaned up"]


def test_a_missing_peer_is_refused_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--peer", str(tmp_path / "python")])
    assert "does not exist; run launch/setup_peer.sh, or skip TRL with --no-peer" in capsys.readouterr().err

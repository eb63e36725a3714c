"""The benchmark's bookkeeping, and how a side ends; that answers have all their tokens, it checks itself each time."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main, table, ways_of
from benchmarks.ours import BenchError, run
from benchmarks.peer import _questions
from benchmarks.times import spread
from benchmarks.work import Work
from othink_ray.config.load import read
from othink_ray.config.validate import machine_for, problems


def work(cells: int, model: str = "bench") -> Work:
    return Work(prompts=8, answers=8, tokens=64, cells=cells, model=model)


@pytest.mark.parametrize(
    ("cells", "model"), [(1, "bench"), (2, "bench"), (4, "bench"), (12, "bench"), (24, "bench"), (8, "smol")]
)
def test_a_work_is_a_sound_run_whose_images_are_not_scaled(cells: int, model: str) -> None:
    config, found = read(work(cells, model).overrides())
    assert config is not None
    assert found + problems(config, machine_for(config)) == []
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


def test_a_side_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"ended with 3; the whole output is in .*said\.txt:\nlast words"):
        run([sys.executable, "-c", "print('last words'); raise SystemExit(3)"], tmp_path / "said.txt")


def test_the_pretrained_model_is_not_given_two_learner_ranks() -> None:
    assert list(ways_of(work(8))) == ["plain", "overlapped", "overlapped_2_ranks"]
    assert list(ways_of(work(8, "smol"))) == ["plain", "overlapped"]


def test_the_table_says_how_many_times_faster() -> None:
    part = spread([0.1, 0.2, 0.3])
    own = {"step_s": spread([1.0, 2.0, 3.0]), "samples_per_s": 32.0, "times_trl": 2.0}
    own |= {f"{name}_s": part for name in ("generate", "score", "update", "push")}
    sides = {"plain": own, "trl": {"step_s": spread([4.0]), "samples_per_s": 16.0}}
    _, plain, trl = table({"sides": sides}).splitlines()
    assert plain.split() == ["plain", *"2.000 (1.000 - 3.000) 32.0 2.00 0.200 0.200 0.200 0.200".split()]
    assert trl.split() == ["trl", *"4.000 (4.000 - 4.000) 16.0".split()]


def test_an_interrupted_side_is_given_the_time_to_clean_up(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    cleans_up = """
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
        while not (said.exists() and "up" in said.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run([sys.executable, "-c", cleans_up], said)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said.read_text().splitlines() == ["up", "cleaned up"]


def test_a_missing_peer_is_told_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--peer", str(tmp_path / "python")])
    assert "run launch/setup_peer.sh, or leave TRL out with --no-peer" in capsys.readouterr().err

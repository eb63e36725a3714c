"""Checks of this system alone: switches, limits, the page, and single engines without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import lines, ours
from benchmarks.bare import MatmulRecorder
from benchmarks.lines import SWITCHES, USUAL, LimitCheck, Runs, loop
from benchmarks.page import write_bench_page
from benchmarks.times import spread
from benchmarks.work import Workload
from othink_ray.config.load import read
from othink_ray.config.validate import machine_for, problems


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_gives_a_valid_and_different_run(switch: str) -> None:
    changed, errors = read([*USUAL.overrides(), switch])
    usual, _ = read([*USUAL.overrides(), *("learner.compile=true",)])
    assert changed is not None
    assert errors + problems(changed, machine_for(changed)) == []
    assert changed != usual


@pytest.mark.parametrize(
    ("value", "higher_is_better", "holds"), [(1.0, False, True), (1.2, False, False), (1.2, True, True)]
)
def test_a_check_holds_on_the_right_side_of_its_limit(value: float, higher_is_better: bool, holds: bool) -> None:
    check = LimitCheck(name="ratio", value=value, limit=1.1, higher_is_better=higher_is_better)
    assert check.holds == holds
    assert check.record()["holds"] == holds
    assert str(check).split()[0] == ("ok" if holds else "NOT")


def test_the_page_shows_every_side_and_every_check(tmp_path: Path) -> None:
    part = spread([0.1, 0.2, 0.3])
    plain = {"step_s": spread([1.0, 2.0]), "samples_per_s": 40.0, "times_trl": 2.5}
    plain |= {f"{name}_s": part for name in ("generate", "score", "update", "push")}
    sides = {"plain": plain, "trl": {"step_s": spread([3.75]), "samples_per_s": 16.0}}
    checks = [
        LimitCheck(name="held <b>", value=1.0, limit=1.1).record(),
        LimitCheck(name="missed", value=2.0, limit=3.0, higher_is_better=True).record(),
    ]
    results = {"machine": "a machine", "works": [{"name": "W(8, 8, 64, 16)", "sides": sides}], "lines": checks}
    html = write_bench_page(tmp_path, results).read_text()
    for text in ("W(8, 8, 64, 16)", "1.500", "2.50 ×", "3.750", "held &lt;b&gt;", "≤ 1.1", "≥ 3.0", "a machine"):
        assert text in html, text
    assert html.count('class="holds"') == html.count('class="misses"') == 1


@pytest.mark.slow
def test_bare_learners_run_at_the_same_time(tmp_path: Path) -> None:
    work = Workload(prompts=2, answers=2, tokens=4, cells=2)
    seconds_by_part = ours.bare(["learn", "learn_padded"], work, 2, tmp_path / "both", ["learner.compile=false"])
    assert all(len(seconds) >= 2 and min(seconds) > 0 for seconds in seconds_by_part.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["generate", "learn"])
def test_an_engine_takes_longer_than_its_matmuls_alone(tmp_path: Path, part: str) -> None:
    work = Workload(prompts=2, answers=2, tokens=8, cells=2)
    whole, matmuls = (
        min(ours.bare([name], work, 30, tmp_path / name, ["learner.compile=false"])[name])  # the least disturbed step
        for name in (part, f"{part}_matmuls")
    )
    assert 0 < matmuls < whole


def test_recorded_matmuls_keep_shapes_and_memory_layouts() -> None:
    left, right, bias = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)
    with MatmulRecorder() as recorder:
        torch.nn.functional.linear(left, right, bias)
        right.t() @ torch.ones(5, 2)
        left @ right.t()
    shapes = [(tuple(left.shape), tuple(right.shape), added is not None) for left, right, added in recorder.operands]
    assert shapes == [((3, 4), (4, 5), True), ((4, 5), (5, 2), False), ((3, 4), (4, 5), False)]
    assert [right.stride() for _, right, _ in recorder.operands] == [(1, 4), (2, 1), (1, 4)]
    assert recorder.operands[0][1] is recorder.operands[2][1]


@pytest.mark.slow
def test_a_failed_engine_process_is_reported(tmp_path: Path) -> None:
    work = Workload(prompts=2, answers=2, tokens=4, cells=2)
    with pytest.raises(ours.BenchError, match="nonsense"):
        ours.bare(["learn"], work, 2, tmp_path / "wrong", ["nonsense=1"])


def test_a_slow_phase_of_the_machine_affects_one_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One turn slows down the run only, another one engine only."""
    seconds = {
        "step_s": [1.0, 3.0, 1.0, 1.0, 1.0],
        "generate": [0.5, 0.5, 0.5, 2.0, 0.5],
        "learn": [0.4] * 5,
    }

    def in_turn(sides: Sequence[dict[str, str]], turns: int, steps: int) -> list[dict[str, list[float]]]:
        assert ([name for side in sides for name in side], steps) == (list(seconds), 4)
        return [{name: [values[turn], values[turn], 9.0] for name, values in seconds.items()} for turn in range(5)]

    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(lines, "in_turn", in_turn)
    for start in ("training", "bare_training"):
        monkeypatch.setattr(ours, start, lambda *arguments: started.append(arguments))
    plain, overlapped = loop(Runs(tmp_path, steps=4))
    assert (plain.value, overlapped.value) == (pytest.approx(1.0 / 0.9), pytest.approx(1.0 / 0.5))
    assert plain.detail["turns"] == pytest.approx([1 / 0.9, 3 / 0.9, 1 / 0.9, 1 / 2.4, 1 / 0.9])
    assert (plain.holds, overlapped.holds) == (False, False)
    assert plain.detail["step_s"]["count"] == 15
    assert len(started) == 6

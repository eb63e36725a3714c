"""What is asked of this system alone: switches that exist, verdicts, the page, and one engine without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import lines, ours
from benchmarks.bare import Products
from benchmarks.lines import SWITCHES, USUAL, Line, Runs, loop
from benchmarks.page import write_bench_page
from benchmarks.times import spread
from benchmarks.work import Work
from othink_ray.config.load import read
from othink_ray.config.validate import machine_for, problems


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_a_sound_run(switch: str) -> None:
    changed, found = read([*USUAL.overrides(), switch])
    usual, _ = read([*USUAL.overrides(), *("learner.compile=true",)])
    assert changed is not None
    assert found + problems(changed, machine_for(changed)) == []
    assert changed != usual


@pytest.mark.parametrize(("found", "more", "holds"), [(1.0, False, True), (1.2, False, False), (1.2, True, True)])
def test_a_line_holds_on_the_right_side_of_its_limit(found: float, more: bool, holds: bool) -> None:
    line = Line(name="ratio", found=found, limit=1.1, more_is_better=more)
    assert line.holds == holds
    assert line.record()["holds"] == holds
    assert str(line).split()[0] == ("ok" if holds else "NOT")


def test_the_page_shows_every_side_and_every_line(tmp_path: Path) -> None:
    part = spread([0.1, 0.2, 0.3])
    own = {"step_s": spread([1.0, 2.0]), "samples_per_s": 40.0, "times_trl": 2.5}
    own |= {f"{name}_s": part for name in ("generate", "score", "update", "push")}
    sides = {"plain": own, "trl": {"step_s": spread([3.75]), "samples_per_s": 16.0}}
    verdicts = [
        Line(name="held <b>", found=1.0, limit=1.1).record(),
        Line(name="missed", found=2.0, limit=3.0, more_is_better=True).record(),
    ]
    found = {"machine": "a machine", "works": [{"name": "W(8, 8, 64, 16)", "sides": sides}], "lines": verdicts}
    html = write_bench_page(tmp_path, found).read_text()
    for said in ("W(8, 8, 64, 16)", "1.500", "2.50 ×", "3.750", "held &lt;b&gt;", "≤ 1.1", "≥ 3.0", "a machine"):
        assert said in html, said
    assert html.count('class="holds"') == html.count('class="misses"') == 1


def test_learners_run_alone_and_side_by_side(tmp_path: Path) -> None:
    work = Work(prompts=2, answers=2, tokens=4, cells=2)
    found = ours.bare(["learn", "learn_padded"], work, 2, tmp_path / "both", ["learner.compile=false"])
    assert all(len(seconds) >= 2 and min(seconds) > 0 for seconds in found.values())


@pytest.mark.parametrize("part", ["generate", "learn"])
def test_a_side_takes_longer_than_its_products_alone(tmp_path: Path, part: str) -> None:
    work = Work(prompts=2, answers=2, tokens=8, cells=2)
    whole, products = (
        min(ours.bare([one], work, 30, tmp_path / one, ["learner.compile=false"])[one])  # one of them undisturbed
        for one in (part, f"{part}_products")
    )
    assert 0 < products < whole


def test_products_are_noted_as_their_factors_lie() -> None:
    left, right, bias = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)
    with Products() as noted:
        torch.nn.functional.linear(left, right, bias)
        right.t() @ torch.ones(5, 2)
        left @ right.t()
    shapes = [(tuple(one.shape), tuple(two.shape), added is not None) for one, two, added in noted.factors]
    assert shapes == [((3, 4), (4, 5), True), ((4, 5), (5, 2), False), ((3, 4), (4, 5), False)]
    assert [two.stride() for _, two, _ in noted.factors] == [(1, 4), (2, 1), (1, 4)]
    assert noted.factors[0][1] is noted.factors[2][1]


def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    work = Work(prompts=2, answers=2, tokens=4, cells=2)
    with pytest.raises(ours.BenchError, match="nonsense"):
        ours.bare(["learn"], work, 2, tmp_path / "wrong", ["nonsense=1"])


def test_a_slow_spell_of_the_machine_is_one_turn_s_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It meets the run alone in the one turn, and one engine alone in the other."""
    seconds = {
        "step_s": [1.0, 3.0, 1.0, 1.0, 1.0],
        "generate": [0.5, 0.5, 0.5, 2.0, 0.5],
        "learn": [0.4] * 5,
    }

    def in_turn(sides: Sequence[dict[str, str]], turns: int, steps: int) -> list[dict[str, list[float]]]:
        assert ([name for side in sides for name in side], steps) == (list(seconds), 4)
        return [{name: [own[turn], own[turn], 9.0] for name, own in seconds.items()} for turn in range(5)]

    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(lines, "in_turn", in_turn)
    for start in ("training", "bare_training"):
        monkeypatch.setattr(ours, start, lambda *asked: started.append(asked))
    plain, overlapped = loop(Runs(tmp_path, steps=4))
    assert (plain.found, overlapped.found) == (pytest.approx(1.0 / 0.9), pytest.approx(1.0 / 0.5))
    assert plain.detail["turns"] == pytest.approx([1 / 0.9, 3 / 0.9, 1 / 0.9, 1 / 2.4, 1 / 0.9])
    assert (plain.holds, overlapped.holds) == (False, False)
    assert plain.detail["step_s"]["count"] == 15
    assert len(started) == 6

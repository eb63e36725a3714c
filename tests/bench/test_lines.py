"""What a line makes of the seconds that it was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from othink_ray.bench import lines, ours
from othink_ray.bench.work import Work


def test_a_slow_spell_of_the_machine_is_one_round_s_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slow(folder: Path) -> float:
        return 3.0 if folder.parent.name == "round_1" else 1.0

    def train(work: Work, steps: int, folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
        return [{"time/step_s": (0.6 if overrides else 1.0) * slow(folder)}] * steps

    def bare(
        parts: Sequence[str], work: Work, steps: int, folder: Path, overrides: Sequence[str]
    ) -> dict[str, list[float]]:
        return {part: [0.5 if part == "generate" else 0.4] * steps for part in parts}

    monkeypatch.setattr(ours, "train", train)
    monkeypatch.setattr(ours, "bare", bare)
    plain, overlapped = lines.loop(lines.Runs(tmp_path, steps=4))
    assert (plain.found, overlapped.found) == (pytest.approx(1.0 / 0.9), pytest.approx(0.6 / 0.5))
    assert plain.detail["rounds"][1] == pytest.approx(3.0 / 0.9)
    assert (plain.holds, overlapped.holds) == (False, False)
    assert plain.detail["step_s"]["count"] == 12

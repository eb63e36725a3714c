"""Help texts and docs/config.md come from the declarations of the keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from othink_ray.command_line import run_command
from othink_ray.config.keys import keys
from othink_ray.config.load import conf_dir, groups
from othink_ray.config.reference import common_keys, described, markdown
from othink_ray.config.schema import Config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_the_page_of_all_keys_is_current() -> None:
    assert PAGE.read_text() == markdown(), "run python -m othink_ray.config.reference > docs/config.md"


def test_the_page_has_every_key_and_option_once() -> None:
    text = markdown()
    names = [key.name for key in keys(Config)]
    names += [f"{group}={option}" for group, options in groups(conf_dir()).items() for option in options]
    assert [name for name in names if text.count(f"| `{name}` |") != 1] == []


def test_table_rows_have_as_many_cells_as_their_heads() -> None:
    width = 0
    for line in markdown().splitlines():
        cells = line.replace("\\|", "").count("|")
        if line.startswith("|") and width:
            assert cells == width, line
        width = cells if line.startswith("|") else 0


def test_common_keys_have_default_and_comment() -> None:
    lines = common_keys().splitlines()
    [line] = [line for line in lines if line.startswith("  algo.kl.beta_max=0.1 ")]
    assert line.endswith("highest KL weight")
    assert 20 < sum("=" in line.split()[0] for line in lines) < 45
    assert all(len(line) <= 120 for line in lines)


def test_a_key_is_described_with_default_bound_and_comment() -> None:
    text = described("learner.lora.rank")
    assert text is not None
    assert text.splitlines()[0] == "learner.lora.rank = 0  (integer, at least 0)"
    assert "typically 8 to 64" in text


def test_a_section_is_described_with_all_its_keys() -> None:
    text = described("learner.lora")
    assert text is not None
    assert [line.split()[0] for line in text.splitlines() if line.startswith("learner.")] == [
        "learner.lora.rank",
        "learner.lora.alpha",
        "learner.lora.targets",
    ]


def test_help_for_an_unknown_key_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--help", "algo.group_sise"]) == 2
    assert "Did you mean algo.group_size?" in capsys.readouterr().err
    assert run_command(["algo.group_size", "-h"]) == 0
    assert capsys.readouterr().out.startswith("algo.group_size = 8  (integer, at least 2)")

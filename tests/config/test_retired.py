"""Retired keys and options: refused with the new name, and read in the config.yaml of older runs.

old_config.yaml is of a run with algo.correction=token and train.prepare_ahead=false, before the keys were renamed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from othink_ray.config.keys import keys
from othink_ray.config.load import ConfigError, load, read
from othink_ray.config.retired import REMOVED_KEYS, RENAMED_KEYS, RENAMED_OPTIONS, RETIRED_KEYS
from othink_ray.config.schema import Config
from othink_ray.config.validate import problems
from othink_ray.driver.checkpoint import compare_settings
from othink_ray.report.records import read_run

OLD = Path(__file__).with_name("old_config.yaml")


def report(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    return " ".join(str(caught.value).split())


def nested(key: str, value: object) -> dict[str, object]:
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_renamed_key_is_refused_with_the_new_name(old: str, new: str) -> None:
    expected = f"{old} = 5 (command line) was renamed to {new} Write {new}=5."
    assert report([f"{old}=5"]) == f"1 problem in the configuration: {expected}"


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_a_removed_key_is_refused_with_the_reason(key: str) -> None:
    assert f"{key} = 5 (command line) was removed: {REMOVED_KEYS[key]} Remove it." in report([f"{key}=5"])


def test_a_renamed_option_is_refused_with_the_new_name() -> None:
    text = report(["data=own"])
    assert "data=own (command line) was renamed to data=custom Write custom for own; to resume an older run" in text
    [problem] = problems(load(["eval.also=[own]"]), None)
    assert problem.rule == "was renamed to data=custom"


def test_a_retired_key_in_a_section_is_refused() -> None:
    assert "algo.tis_cap Write algo.tis_cap=3" in report(["algo={correction_cap: 3}"])


@pytest.mark.parametrize("old", RETIRED_KEYS)
def test_a_retired_key_in_a_conf_file_is_traced_to_it(old: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "cluster").mkdir(parents=True)
    text = "# @package _global_\n" + yaml.safe_dump(nested(old, 5))
    (folder / "cluster" / "home.yaml").write_text(text)
    config, [problem] = read(["cluster=home"], more=folder)
    assert config is None
    assert problem.subject == f"{old} = 5 (mine/cluster/home.yaml)"
    assert problem.rule.startswith("was re")


def test_only_new_names_are_keys() -> None:
    known = {key.name for key in keys(Config)}
    assert set(RENAMED_KEYS.values()) <= known
    assert known.isdisjoint(RETIRED_KEYS)


def test_every_key_of_an_old_run_is_known_or_retired() -> None:
    known = {f"{key.name}." for key in keys(Config)} | {f"{key}." for key in RETIRED_KEYS}

    def leaves(tree: dict[str, object], path: str = "") -> list[str]:
        return [
            name
            for key, value in tree.items()
            for name in (leaves(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}."])
        ]

    old = leaves(yaml.safe_load(OLD.read_text()))
    assert len(old) > 150
    assert [name for name in old if not any(each.startswith(name) for each in known)] == []


def test_a_checkpoint_of_an_old_run_resumes(tmp_path: Path) -> None:
    """Renamed keys are compared under their new names; only what really changed is logged."""
    (tmp_path / "config.yaml").write_text(OLD.read_text())
    lines: list[str] = []
    compare_settings(tmp_path / "checkpoints" / "step_3", load([]), lines.append)
    changes = "train.prefetch_update False -> True, algo.tis token -> auto"
    assert lines == [f"resuming with changed settings: {changes}"]
    same = load(["algo.tis=token", "train.prefetch_update=false"])
    compare_settings(tmp_path / "checkpoints" / "step_3", same, pytest.fail)


def test_an_old_run_of_a_renamed_option_keeps_its_name(tmp_path: Path) -> None:
    """Seeds of answers depend on the name of the data set: another one is logged, the old one can be given."""
    [((group, old), new)] = RENAMED_OPTIONS.items()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({group: {"name": old}}))
    lines: list[str] = []
    compare_settings(tmp_path / "checkpoints" / "step_3", load([f"{group}={new}"]), lines.append)
    assert lines == [f"resuming with changed settings: {group}.name {old} -> {new}"]
    compare_settings(tmp_path / "checkpoints" / "step_3", load([f"{group}={new}", f"{group}.name={old}"]), pytest.fail)


def test_the_folder_of_an_old_run_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OLD.read_text())
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    run = read_run(tmp_path)
    assert run.config["train"]["steps"] == 200
    assert len(run.rows) == 1

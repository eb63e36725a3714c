"""The shipped conf files: each can be selected and parses, and sets only what differs from the schema's defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir

from othink_ray.config.keys import keys
from othink_ray.config.load import conf_dir, groups, load, register_defaults
from othink_ray.config.schema import Config

# Values that a file states for its reader although they are the defaults, besides its name.
STATED = ("rollout.engine", "data.train.files.path", "data.test.files.path")
EMPTY = ("data.train.files.path", "data.test.files.path")  # have no default: the user gives the path
FILES = sorted(conf_dir().rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(conf_dir())))
def test_a_conf_file_can_be_selected_and_parses(file: Path) -> None:
    path = file.relative_to(conf_dir())
    if path == Path("config.yaml"):
        assert load([]).mode == "train"
        return
    group, name = path.parent.name, file.stem
    assert path == Path(group, f"{name}.yaml"), "conf files are one group deep"
    section = getattr(load([f"{group}={name}"]), group)
    if hasattr(section, "name"):
        assert section.name == name
        return
    register_defaults()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        chosen = compose("config", overrides=[f"{group}={name}"], return_hydra_config=True).hydra.runtime.choices
    assert chosen[group] == name


def test_each_group_is_a_section_of_the_schema() -> None:
    assert set(groups(conf_dir())) <= {field.name for field in dataclasses.fields(Config)}


def test_the_main_conf_file_sets_no_key() -> None:
    assert set(yaml.safe_load((conf_dir() / "config.yaml").read_text())) == {"defaults", "hydra"}


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, dict) or not tree:
        yield path, tree
        return
    for name, value in tree.items():
        yield from leaves(value, f"{path}.{name}" if path else str(name))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(conf_dir())))
def test_a_conf_file_repeats_no_default(file: Path) -> None:
    content = yaml.safe_load(file.read_text()) or {}
    if "defaults" in content:
        return  # a file may set back a value of the files that it starts from
    tree = content if "@package _global_" in file.read_text() else {file.parent.name: content}
    defaults = {key.name: key.default for key in keys(Config) if not key.name.endswith(".name")}
    repeated = {name for name, value in leaves(tree) if name in defaults and defaults[name] == value}
    assert repeated <= set(STATED)


def test_every_key_has_a_comment_and_a_fitting_default() -> None:
    declared = list(keys(Config))
    assert len(declared) > 150
    for key in declared:
        assert key.comment and not key.comment.endswith("."), key.name
        assert key.default is None or key.bound is None or key.bound.holds(key.default) or key.name in EMPTY, key.name

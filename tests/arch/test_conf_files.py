"""The shipped conf files: each can be selected and parses, and only they set the keys of the schema."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from othink_ray.config.load import conf_dir, groups, load
from othink_ray.config.schema import Config

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
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        chosen = compose("config", overrides=[f"{group}={name}"], return_hydra_config=True).hydra.runtime.choices
    assert chosen[group] == name


def test_each_group_is_a_section_of_the_schema() -> None:
    assert set(groups(conf_dir())) <= {field.name for field in dataclasses.fields(Config)}


def test_the_schema_has_no_default_values() -> None:
    def fields(section: type) -> list[dataclasses.Field[object]]:
        return list(dataclasses.fields(section))

    from othink_ray.config import schema

    sections = [kind for kind in vars(schema).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    assert len(sections) >= 10
    for section in sections:
        for field in fields(section):
            assert field.default is dataclasses.MISSING, f"{section.__name__}.{field.name}"
            assert field.default_factory is dataclasses.MISSING, f"{section.__name__}.{field.name}"

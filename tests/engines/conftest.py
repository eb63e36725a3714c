"""A small model and two steps of ragged groups for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from othink_ray.config.load import load
from othink_ray.config.schema import Config
from othink_ray.families import open_family
from othink_ray.families.base import Family
from othink_ray.families.tiny import build_tiny
from othink_ray.types import Group
from tests.engines.samples import ask, group_of, picture
from tests.engines.scenarios import SMALL


@pytest.fixture(scope="module")
def small() -> Config:
    return load(SMALL)


@pytest.fixture(scope="module")
def small_folder(small: Config, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("small_model")
    build_tiny(made, small.model, texts)
    return made


@pytest.fixture(scope="module")
def small_family(small: Config, small_folder: Path) -> Family:
    return open_family(small.model, str(small_folder))


@pytest.fixture(scope="module")
def batches(small_family: Family) -> list[list[Group]]:
    """Two steps of four groups with three ragged answers each; one group has equal rewards, another no image."""
    prompts = [
        ask("a", picture(84, 84, 0)),
        ask("b", picture(56, 140, 1), text="How many?"),
        ask("c", text="How many items are there in the image? Output the thinking process."),
        ask("d", picture(84, 56, 3)),
    ]
    lengths = ([5, 9, 2], [4, 4, 1], [7, 3, 3], [1, 6, 8])
    return [
        [
            group_of(small_family, prompt, lengths_of_prompt, 10 * step + i)
            for i, (prompt, lengths_of_prompt) in enumerate(zip(prompts, lengths, strict=True))
        ]
        for step in range(2)
    ]

"""One tiny model, one family and one engine of each kind for the whole session: vLLM takes seconds to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from othink_ray.config.load import load
from othink_ray.config.schema import Config
from othink_ray.data import open_source, worked_answer
from othink_ray.types import Prompt

# Images of 4 to 16 tokens, few places side by side: resizing and queueing happen in small tests too.
OVERRIDES = (
    "model.min_pixels=3136",
    "model.max_pixels=12544",
    "rollout.max_images=2",
    "rollout.max_num_seqs=8",
    "rollout.max_model_len=192",
    "algo.group_size=4",
)


@pytest.fixture(scope="session")
def config() -> Config:
    return load(OVERRIDES)


@pytest.fixture(scope="session")
def scenes(config: Config) -> Sequence[Prompt]:
    """The first questions of the embedded task."""
    source = open_source(config.data, "train")
    return [source.prompt(index) for index in range(64)]


@pytest.fixture(scope="session")
def texts(scenes: Sequence[Prompt]) -> list[str]:
    """What the tiny tokenizer is trained on."""
    return [text for prompt in scenes for text in (prompt.messages[0].text, worked_answer(prompt))]


@pytest.fixture(scope="session")
def model_folder(config: Config, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as it starts: random weights."""
    from othink_ray.families.tiny import build_tiny

    torch.set_num_threads(config.learner.threads)
    folder = tmp_path_factory.mktemp("tiny_model")
    build_tiny(folder, config.model, texts)
    return folder

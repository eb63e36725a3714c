"""Session fixtures: one tiny model, one family and one engine of each kind, because vLLM takes seconds to load."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from othink_ray.config.load import load
from othink_ray.config.schema import Config, ModelConfig
from othink_ray.data import open_source, worked_answer
from othink_ray.engines.demonstrations import Demonstrations
from othink_ray.engines.hf_rollout import HFRollout
from othink_ray.engines.policy import Policy
from othink_ray.engines.vllm_rollout import VLLMRollout
from othink_ray.families import open_family
from othink_ray.families.base import Family
from othink_ray.families.tiny import build_tiny
from othink_ray.runtime.cluster import ray_session
from othink_ray.types import Prompt
from tests.engines.samples import batch_of, fresh_policy, row_of

pytest_plugins = ["tests.selection"]

# Images of 4 to 16 tokens and few concurrent sequences, so that small tests cover resizing and queueing.
OVERRIDES = (
    "model.min_pixels=3136",
    "model.max_pixels=12544",
    "rollout.max_images=2",
    "rollout.max_num_seqs=8",
    "rollout.max_model_len=192",
    "algo.group_size=4",
    "rollout.threads=1",  # tensors are too small for a second thread
    "learner.threads=1",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def config() -> Config:
    return load(OVERRIDES)


@pytest.fixture(scope="session")
def scenes(config: Config) -> Sequence[Prompt]:
    """The first 64 questions of the counting task."""
    source = open_source(config.data, "train")
    return [source.prompt(index) for index in range(64)]


@pytest.fixture(scope="session")
def texts(scenes: Sequence[Prompt]) -> list[str]:
    """The texts that the tiny tokenizer is trained on."""
    return [text for prompt in scenes for text in (prompt.messages[0].text, worked_answer(prompt))]


@pytest.fixture(scope="session")
def recipe(config: Config) -> ModelConfig:
    """The settings the model folder is built with; engines must use the pixel bounds of the run instead of these."""
    return replace(config.model, min_pixels=784, max_pixels=401408)


@pytest.fixture(scope="session")
def model_folder(recipe: ModelConfig, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model at its random initial weights."""
    folder = tmp_path_factory.mktemp("tiny_model")
    build_tiny(folder, recipe, texts)
    return folder


@pytest.fixture(scope="session")
def family(config: Config, model_folder: Path) -> Family:
    return open_family(config.model, str(model_folder))


@pytest.fixture(scope="session")
def policy(family: Family) -> Policy:
    """The learner's model at its initial weights. Read-only: `copy.deepcopy` it to change weights."""
    return fresh_policy(family)


@pytest.fixture(scope="session")
def taught(family: Family, policy: Policy, scenes: Sequence[Prompt]) -> Policy:
    """The policy after a few seconds of SFT: it answers in the format, ends its answers, and is mostly confident."""
    trained = copy.deepcopy(policy)
    samples = [row_of(group) for group in Demonstrations(family).answer(scenes)]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(40):
        start = step * 16 % len(samples)
        logprobs, _ = trained(batch_of(samples[start : start + 16], family))
        optimizer.zero_grad()
        (-logprobs.mean()).backward()
        optimizer.step()
    return trained


@pytest.fixture(scope="session")
def vllm_engine(config: Config, family: Family, model_folder: Path) -> VLLMRollout:
    return VLLMRollout(
        config.rollout, config.model, family, str(model_folder), transport="shared_memory", max_logprobs=20
    )


@pytest.fixture(scope="session")
def hf_engine(config: Config, family: Family) -> HFRollout:
    return HFRollout(config.rollout, config.model, family)


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One Ray for all tests, with twice the cores, so that new actors can start before old ones have stopped."""
    with ray_session(replace(load([]).cluster, num_cpus=4)):
        yield


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of `datasets` in the test's folder, and disable access to the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()

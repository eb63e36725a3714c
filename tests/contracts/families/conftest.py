"""A checkpoint of each family, opened by transformers and by this package."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from othink_ray.config.schema import Config, ModelConfig
from othink_ray.engines.policy import Policy
from othink_ray.families import FAMILIES, open_family
from othink_ray.families.base import Family
from tests.engines.samples import fresh_policy
from tests.families.checkpoints import build_checkpoint


@pytest.fixture(scope="module")
def folders(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in folders.items():
        build_checkpoint(name, folder, texts)
    return folders


@pytest.fixture(scope="module")
def models(config: Config, folders: dict[str, Path]) -> dict[str, ModelConfig]:
    return {name: replace(config.model, family=name, path=str(folder), tiny=None) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def policies(models: dict[str, ModelConfig]) -> dict[str, Policy]:
    """The learner's initial policies; read-only."""
    return {name: fresh_policy(open_family(model, str(model.path))) for name, model in models.items()}


@pytest.fixture(scope="module")
def trained(policies: dict[str, Policy]) -> dict[str, Policy]:
    """The learner's policies after training, every weight element changed."""
    trained = {name: copy.deepcopy(policy) for name, policy in policies.items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for policy in trained.values():
            for parameter in policy.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                noise = noise.where(noise.abs() > 0.01, 0.01)  # no element stays unchanged
                parameter.add_(noise * 0.3 * parameter.std())
    return trained


FIRST, *OTHERS = FAMILIES


@pytest.fixture(params=[FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def policy(name: str, policies: dict[str, Policy]) -> Policy:
    return policies[name]


@pytest.fixture
def family(policy: Policy) -> Family:
    return policy.family


@pytest.fixture
def processor(name: str, family: Family, folders: dict[str, Path]) -> Any:
    """The processor as transformers opens it."""
    return AutoProcessor.from_pretrained(folders[name], **family.processor_settings)


@pytest.fixture
def reference(name: str, folders: dict[str, Path]) -> Any:
    """The unmodified network as transformers opens it."""
    return AutoModelForImageTextToText.from_pretrained(folders[name], dtype=torch.float32).eval()

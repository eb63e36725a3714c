"""The pretrained language model behind a vision tower: text logits and tower weights are unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from othink_ray.config.load import load
from othink_ray.config.schema import ModelConfig
from othink_ray.families import open_family
from othink_ray.families.smol import build_smol, pretrained
from othink_ray.families.tiny import build_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load(["model=smol"]).model


@pytest.fixture(scope="module")
def vision_folder(model: ModelConfig, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    build_tiny(folder, replace(model, smol=None), texts)
    return folder


@pytest.fixture(scope="module")
def built(model: ModelConfig, vision_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smol")
    build_smol(folder, model, vision_folder)
    return folder


def test_text_logits_are_bit_identical_to_the_language_models(model: ModelConfig, built: Path) -> None:
    assert model.smol is not None
    language, tokenizer = pretrained(model.smol)
    network: Any = AutoModelForImageTextToText.from_pretrained(built)
    ids: Any = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = language(ids).logits, network(input_ids=ids).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)
    saved = AutoTokenizer.from_pretrained(built)
    assert saved.decode(found[0, -1].argmax()) == " Paris"
    assert saved.eos_token == "<|im_end|>"


def test_only_the_projectors_last_layer_differs_from_the_tower(vision_folder: Path, built: Path) -> None:
    folders = (vision_folder, built)
    towers = (AutoModelForImageTextToText.from_pretrained(folder).model.visual for folder in folders)
    source, copy = (tower.state_dict() for tower in towers)
    differ = {name for name in copy if not torch.equal(source[name], copy[name])}
    assert differ == {"merger.mlp.2.weight", "merger.mlp.2.bias"}


def test_it_opens_as_a_family_with_its_image_tokens_banned(model: ModelConfig, built: Path) -> None:
    family = open_family(model, str(built))
    assert family.image_token_id in family.banned_token_ids
    assert len(set(family.banned_token_ids)) == 5

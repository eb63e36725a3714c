"""A pretrained language model behind a vision tower: its words stay what they were, the tower is taken over."""

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


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load(["model=smol"]).model


@pytest.fixture(scope="module")
def seeing(model: ModelConfig, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eyes")
    build_tiny(folder, replace(model, smol=None), texts)
    return folder


@pytest.fixture(scope="module")
def built(model: ModelConfig, seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smol")
    build_smol(folder, model, seeing)
    return folder


def test_on_text_the_logits_are_those_of_the_language_model_to_the_bit(model: ModelConfig, built: Path) -> None:
    assert model.smol is not None
    language, tokenizer = pretrained(model.smol)
    network: Any = AutoModelForImageTextToText.from_pretrained(built)
    ids: Any = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = language(ids).logits, network(input_ids=ids).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)
    own = AutoTokenizer.from_pretrained(built)
    assert own.decode(found[0, -1].argmax()) == " Paris"
    assert own.eos_token == "<|im_end|>"


def test_all_of_the_tower_is_taken_over_but_the_projectors_last_layer(seeing: Path, built: Path) -> None:
    eyes, network = (AutoModelForImageTextToText.from_pretrained(folder).model.visual for folder in (seeing, built))
    own, taken = eyes.state_dict(), network.state_dict()
    differ = {name for name in taken if own[name].shape != taken[name].shape or not torch.equal(own[name], taken[name])}
    assert differ == {"merger.mlp.2.weight", "merger.mlp.2.bias"}


def test_it_opens_as_a_family_with_its_image_tokens_banned(model: ModelConfig, built: Path) -> None:
    family = open_family(model, str(built))
    assert family.image_token_id in family.banned_token_ids
    assert len(set(family.banned_token_ids)) == 5

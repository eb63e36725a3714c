"""The built-in model is a plain Hugging Face folder with the same bytes on every build."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from othink_ray.config.schema import Config, ModelConfig
from othink_ray.families.base import Family
from othink_ray.families.tiny import SPECIAL_TOKENS, build_tiny


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def rebuilt(recipe: ModelConfig, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("again")
    torch.manual_seed(99)  # must have no effect
    build_tiny(folder, recipe, texts)
    return folder


def test_two_builds_have_identical_bytes(model_folder: Path, rebuilt: Path) -> None:
    first, second = digests(model_folder), digests(rebuilt)
    assert "model.safetensors" in first
    assert first == second


def test_another_seed_gives_other_weights(config: Config, texts: list[str], model_folder: Path, tmp_path: Path) -> None:
    assert config.model.tiny is not None
    build_tiny(tmp_path, replace(config.model, tiny=replace(config.model.tiny, seed=1)), texts)
    name = "model.safetensors"
    assert digests(tmp_path)[name] != digests(model_folder)[name]


def test_plain_transformers_loads_and_generates(model_folder: Path, config: Config) -> None:
    network = AutoModelForImageTextToText.from_pretrained(model_folder)
    processor = AutoProcessor.from_pretrained(model_folder)
    assert config.model.tiny is not None
    assert 0.5e6 < sum(parameter.numel() for parameter in network.parameters()) < 2e6
    assert network.config.text_config.num_hidden_layers == config.model.tiny.text_layers
    assert network.dtype == torch.float32
    assert network.lm_head.weight is network.model.language_model.embed_tokens.weight
    chat = [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answered = network.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answered.shape[1] > inputs["input_ids"].shape[1]


def test_every_weight_is_initialized_explicitly(config: Config, texts: list[str], tmp_path: Path) -> None:
    """Random matrices, unit norms, zero biases: nothing depends on the library's initialization."""
    build_tiny(tmp_path, config.model, texts)
    network = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert 0.04 < float(parameter.std()) < 0.06, name


def test_special_tokens_and_digits_are_one_token_each(family: Family) -> None:
    for token in SPECIAL_TOKENS:
        assert len(family.encode_text(token)) == 1
    for count in range(10):
        assert len(family.encode_text(str(count))) == 1
    assert len(family.encode_text("4096")) == 4


@pytest.mark.parametrize(
    "text", ["<think> 3 </think><answer> 3 </answer>", "Ünïcödé ∑ 数 🙂", "  spaces\n\nand\ttabs "]
)
def test_any_text_round_trips_through_the_tokenizer(family: Family, text: str) -> None:
    assert family.decode([family.encode_text(text)]) == [text]


def test_the_end_of_turn_token_is_eos_and_differs_from_padding(family: Family, model_folder: Path) -> None:
    network = AutoModelForImageTextToText.from_pretrained(model_folder)
    assert family.encode_text("<|im_end|>") == [family.eos_token_id]
    assert network.generation_config.eos_token_id == family.eos_token_id
    assert family.pad_token_id != family.eos_token_id

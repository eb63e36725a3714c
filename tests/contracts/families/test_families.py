"""The contract of every model family, checked against the network and processor of transformers."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from othink_ray.config.bounds import FAMILIES as NAMES
from othink_ray.config.load import conf_dir, load
from othink_ray.config.schema import ModelConfig
from othink_ray.cpu import kernels
from othink_ray.engines.policy import Policy, checkpoint_layers, train_without_dropout
from othink_ray.families import FAMILIES, ModelError, hugging_face, open_family
from othink_ray.families.base import Family, ImageTensors, modules_by_part
from othink_ray.families.hugging_face import prune_last_layer
from othink_ray.types import Prompt
from tests.engines.padded_reference import plain_logprobs
from tests.engines.samples import (
    MIXED,
    ask,
    batch_of,
    fresh_policy,
    group_of,
    picture,
    row_of,
    sent_weights,
)
from tests.engines.tolerances import assert_same_gradients, gradients
from tests.families.checkpoints import CHECKPOINTS

SIZES = [(84, 84), (28, 28), (1, 1), (27, 29), (33, 65), (5, 190), (500, 500), (333, 77), (96, 64)]


def test_each_family_has_a_config_choice_checkpoint_and_model() -> None:
    models = [load([f"model={file.stem}"]).model for file in (conf_dir() / "model").glob("*.yaml")]
    assert set(FAMILIES) == set(NAMES) == set(CHECKPOINTS)
    assert set(FAMILIES) == {model.family for model in models if model.path}


@pytest.mark.parametrize("configured", FAMILIES)
def test_a_folder_of_another_family_is_rejected(configured: str, models: dict[str, ModelConfig]) -> None:
    for found, model in models.items():
        if found != configured:
            with pytest.raises(
                ModelError, match=rf"is of the family {found}, but model\.family = {configured}: set .*{found}$"
            ):
                open_family(replace(model, family=configured), str(model.path))


# ---- images and prompts


@pytest.mark.parametrize("size", SIZES)
def test_token_counts_follow_from_the_image_size(family: Family, size: tuple[int, int]) -> None:
    image = picture(*size, seed=0)
    [count] = family.image_token_counts([image])
    assert count == family.encoded_token_count(family.encode_images([image])) > 0


def test_images_are_encoded_like_the_processor(family: Family, processor: Any) -> None:
    for prompt in MIXED:
        if not prompt.images:
            continue
        expected = _processed(processor, prompt)
        inputs = family.image_inputs(family.encode_images(prompt.images))
        assert inputs
        assert all(torch.equal(tensor, expected[key]) for key, tensor in inputs.items())


def test_expanded_prompts_equal_the_processors(family: Family, processor: Any) -> None:
    for prompt in MIXED:
        assert _expanded(family, prompt) == _processed(processor, prompt)["input_ids"][0].tolist()
        assert family.prompt_token_ids(prompt).count(family.image_token_id) == len(prompt.images)


def test_without_images_there_is_nothing_to_encode(family: Family) -> None:
    empty = family.encode_images([])
    assert (len(empty.grids), family.encoded_token_count(empty), family.image_token_counts([])) == (0, 0, [])


def test_the_smallest_image_has_the_fewest_tokens(family: Family) -> None:
    smallest = family.encoded_token_count(family.encode_images([family.smallest_image()]))
    assert smallest == min(family.image_token_counts([picture(*size, seed=0)])[0] for size in SIZES)


def test_positions_equal_those_of_transformers(family: Family, reference: Any) -> None:
    rng = random.Random(0)
    for case in range(12):
        images = [picture(rng.randint(10, 250), rng.randint(10, 250), seed) for seed in range(case % 4)]
        prompt = ask("any", *images, text="3 " * rng.randint(1, 9))
        token_ids = torch.tensor(_expanded(family, prompt))
        found = family.prompt_positions(token_ids, family.encode_images(images))
        assert torch.equal(found, _reference_positions(reference, token_ids, family, family.encode_images(images)))


def test_tokens_replaced_by_image_features_are_never_sampled(family: Family, reference: Any) -> None:
    vocabulary = torch.arange(reference.config.text_config.vocab_size)[None]
    embedded = reference.get_input_embeddings()(vocabulary)
    masks = reference.model.get_placeholder_mask(vocabulary, embedded, image_features=embedded[:, :1])
    masks = masks if isinstance(masks, tuple) else (masks,)
    replaced = {token for mask in masks for token in mask[0, :, 0].nonzero().flatten().tolist()}
    assert family.image_token_id in replaced
    assert replaced <= set(family.banned_token_ids)
    assert not {family.eos_token_id, family.pad_token_id} & set(family.banned_token_ids)


# ---- the learner


@pytest.mark.parametrize("attention", ["grouped", "dense", "blocks", "fused"])
def test_packed_samples_equal_unpacked_ones_of_transformers(policy: Policy, reference: Any, attention: str) -> None:
    _assert_equals_reference(policy, reference, MIXED, attention)


@pytest.mark.parametrize("attention", ["grouped", "dense", "blocks", "fused"])
def test_last_layer_pruning_changes_no_result(policy: Policy, reference: Any, attention: str) -> None:
    learner = copy.deepcopy(policy)
    prune_last_layer(policy.family.layers(learner.network)[-1])
    _assert_equals_reference(learner, reference, MIXED, attention)


def test_a_pruned_last_layer_computes_only_requested_tokens(policy: Policy) -> None:
    learner = copy.deepcopy(policy)
    last: Any = policy.family.layers(learner.network)[-1]
    prune_last_layer(last)
    widths: list[int] = []
    last.mlp.register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    batch = batch_of([row_of(group_of(policy.family, prompt, [1, 7, 3], 0)) for prompt in MIXED], policy.family)
    learner(batch)
    assert widths == [len(batch.logit_indices)] == [len(MIXED) * (1 + 6 + 2 + 1 - 1)]


@pytest.mark.parametrize("by_kernel", [True, False])
def test_features_of_large_images_equal_those_of_transformers(
    name: str, models: dict[str, ModelConfig], reference: Any, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covers the attention kernel and block attention, and the patch projection as a matmul."""
    monkeypatch.setattr(kernels, "enabled_for_images", lambda: by_kernel)
    wide = replace(models[name], max_pixels=401408)
    policy = fresh_policy(open_family(wide, str(wide.path)))
    prompts = [ask("large", picture(640, 600, 1)), ask("ragged", picture(300, 90, 2), picture(84, 56, 3))]
    _assert_equals_reference(policy, reference, prompts, "auto")


def test_gradient_checkpointing_changes_no_gradient(policy: Policy) -> None:
    """Every layer runs once more in backward, the pruned one included."""
    learner = copy.deepcopy(policy)
    layers: Any = policy.family.layers(learner.network)
    prune_last_layer(layers[-1])
    calls: list[int] = []
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    batch = batch_of([row_of(group_of(policy.family, prompt, [3, 5], 0)) for prompt in MIXED], policy.family)
    expected = gradients(learner, learner(batch)[0].sum())
    assert Counter(calls) == Counter(range(len(layers)))
    train_without_dropout(learner.network)
    checkpoint_layers(learner.network)
    assert_same_gradients(gradients(learner, learner(batch)[0].sum()), expected, 1e-5)
    assert Counter(calls) == Counter(list(range(len(layers))) * 3)


def test_a_network_with_dropout_is_trained_without_it(
    name: str, folders: dict[str, Path], models: dict[str, ModelConfig], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[name], tmp_path / "with_dropout"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"attention_dropout": 0.5}
    config["vision_config"] |= {"attention_dropout": 0.5, "projection_dropout": 0.5, "hidden_dropout_prob": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    policy = fresh_policy(open_family(models[name], str(folder)))
    groups = [group_of(policy.family, MIXED[0], [3, 5], 0)]

    def logprobs() -> Tensor:
        """Return logprobs by the network's own attention; packed attention has no dropout."""
        with torch.no_grad():
            return plain_logprobs(policy, policy.family, groups)

    expected = logprobs()
    policy.network.train()
    assert (logprobs() - expected).abs().max() > 0.01
    with pytest.warns(UserWarning, match=r"dropout rates above 0 \(model\.\S+ = 0\.5, \.\.\.\): it is trained without"):
        train_without_dropout(policy.network)
    assert policy.network.training
    assert torch.equal(logprobs(), expected)


def test_features_of_a_frozen_tower_can_be_shared(policy: Policy) -> None:
    learner = copy.deepcopy(policy)
    learner.family.vision_tower(learner.network).requires_grad_(False)
    batch = batch_of([row_of(group_of(policy.family, prompt, [3, 5], 0)) for prompt in MIXED], policy.family)
    with torch.no_grad():
        features = learner(batch, wanted="features")
    alone, shared = learner(batch)[0], learner(batch, features=features)[0]
    assert torch.equal(shared, alone)
    assert_same_gradients(gradients(learner, shared.sum()), gradients(learner, alone.sum()), 1e-6)
    assert (learner(batch, features=features * 0.5)[0] - alone).abs().max() > 0.01


def test_plain_transformers_loads_a_saved_folder(
    name: str, models: dict[str, ModelConfig], policies: dict[str, Policy], trained: dict[str, Policy], tmp_path: Path
) -> None:
    """Saves the weights passed in, not those of the network."""
    policy = trained[name]
    policy.family.save(tmp_path, policies[name].network, sent_weights(policy.network))
    saved = open_family(models[name], str(tmp_path))
    groups = [group_of(policy.family, prompt, [4, 2], 0) for prompt in MIXED]
    plain = Policy(AutoModelForImageTextToText.from_pretrained(tmp_path), saved, policy.temperature, policy.logit_rows)
    with torch.no_grad():
        expected = policy(batch_of([row_of(group) for group in groups], policy.family))[0]
        assert (plain_logprobs(plain, saved, groups) - expected).abs().max() < 1e-4
    assert [_expanded(saved, prompt) for prompt in MIXED] == [_expanded(policy.family, prompt) for prompt in MIXED]
    assert saved.banned_token_ids == policy.family.banned_token_ids


def test_a_folder_is_saved_shard_by_shard(
    name: str,
    models: dict[str, ModelConfig],
    policies: dict[str, Policy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Bounds the weights held at a time: merged in float32 they are several times the network."""
    monkeypatch.setattr(hugging_face, "SHARD_BYTES", 400_000)
    policy, held = policies[name], [0]
    expected = dict(sent_weights(policy.network))

    def weights() -> Iterator[tuple[str, Tensor]]:
        alive: list[weakref.ref[Tensor]] = []
        for key, weight in expected.items():
            held.append(sum(tensor.nbytes for ref in alive if (tensor := ref()) is not None))
            copied = weight.clone()
            alive.append(weakref.ref(copied))
            yield key, copied
            del copied

    policy.family.save(tmp_path, policy.network, weights())
    assert max(held) < 400_000 < sum(weight.nbytes for weight in expected.values())
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    loaded = open_family(models[name], str(tmp_path)).load_network(torch.float32)
    assert all(torch.equal(weight, expected[key]) for key, weight in loaded.named_parameters())


def _expanded(family: Family, prompt: Prompt) -> list[int]:
    return family.expand(family.prompt_token_ids(prompt), family.image_token_counts(prompt.images))


def _processed(processor: Any, prompt: Prompt) -> dict[str, Tensor]:
    """Return the processor's output for a prompt of one message."""
    content = [{"type": "image"}] * len(prompt.images) + [{"type": "text", "text": prompt.messages[0].text}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in prompt.images]
    output: dict[str, Tensor] = processor(text=[text], images=images or None, return_tensors="pt")
    return output


def _reference_positions(network: Any, token_ids: Tensor, family: Family, images: ImageTensors) -> Tensor:
    """Return the position ids (axes, L) that reach the rotary embedding of the text model."""
    captured: list[Tensor] = []
    rotary = network.model.language_model.rotary_emb
    hook = rotary.register_forward_pre_hook(lambda _rotary, inputs: captured.append(inputs[1]))
    with torch.no_grad():
        network(
            input_ids=token_ids[None],
            mm_token_type_ids=(token_ids == family.image_token_id).long()[None],
            **(family.image_inputs(images) if len(images.grids) else {}),
        )
    hook.remove()
    return captured[0].view(-1, len(token_ids))


def _assert_equals_reference(policy: Policy, reference: Any, prompts: Sequence[Prompt], attention: str) -> None:
    """Compare logprobs and gradients with the unmodified network on unpacked samples."""
    learner = copy.deepcopy(policy)
    plain = Policy(reference, policy.family, policy.temperature, policy.logit_rows)
    groups = [group_of(policy.family, prompt, [1, 7, 3], seed) for seed, prompt in enumerate(prompts)]
    logprobs = learner(batch_of([row_of(group) for group in groups], policy.family, attention))[0]
    expected = plain_logprobs(plain, policy.family, groups)
    assert (logprobs - expected).abs().max() < 5e-5
    direction = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    found = gradients(learner, (logprobs * direction).sum())
    assert_same_gradients(found, gradients(plain, (expected * direction).sum()), 1e-4)


# ---- modules and parts


def test_the_meta_network_has_all_shapes_and_no_weights(family: Family, policy: Policy) -> None:
    shapes = {name: tuple(each.shape) for name, each in family.meta_network().named_parameters() if each.is_meta}
    assert shapes == {name: tuple(each.shape) for name, each in policy.network.named_parameters()}


def test_every_weight_belongs_to_one_part(family: Family, policy: Policy) -> None:
    parts = {
        f"{path}.{name}": part
        for part, path, module in modules_by_part(family, policy.network)
        for name, _ in module.named_parameters(recurse=False)
    }
    for name, _ in policy.network.named_parameters():
        projects = "merger" in name or "multi_modal_projector" in name
        expected = "projector" if projects else "vision" if "visual." in name or "vision_tower." in name else "text"
        assert parts[name] == expected, name
    assert set(parts.values()) == {"text", "vision", "projector"}

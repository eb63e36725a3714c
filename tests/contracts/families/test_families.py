"""What every model family promises, held against the library's own network and processor, and against real vLLM."""

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

from othink_ray.config.bounds import CHOICES
from othink_ray.config.load import conf_dir, load
from othink_ray.config.schema import ModelConfig
from othink_ray.core import fused
from othink_ray.engines.policy import Policy, checkpoint_layers, train_without_dropout
from othink_ray.families import FAMILIES, ModelError, hugging_face, open_family
from othink_ray.families.base import Family, ImageTensors, modules_by_part
from othink_ray.families.hugging_face import prune_last_layer
from othink_ray.types import Prompt
from tests.engines.nearness import assert_same_gradients, gradients
from tests.engines.plain_rows import plain_logprobs
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
from tests.families.checkpoints import CHECKPOINTS

SIZES = [(84, 84), (28, 28), (1, 1), (27, 29), (33, 65), (5, 190), (500, 500), (333, 77), (96, 64)]


def test_each_family_can_be_chosen_and_has_a_checkpoint_here_and_a_real_model() -> None:
    models = [load([f"model={file.stem}"]).model for file in (conf_dir() / "model").glob("*.yaml")]
    assert set(FAMILIES) == set(CHOICES["model.family"]) == set(CHECKPOINTS)
    assert set(FAMILIES) == {model.family for model in models if model.path}


@pytest.mark.parametrize("asked", FAMILIES)
def test_a_folder_of_another_family_is_refused_with_the_right_one(asked: str, models: dict[str, ModelConfig]) -> None:
    for found, model in models.items():
        if found != asked:
            with pytest.raises(
                ModelError, match=rf"is of the family {found}, but model\.family = {asked}: set .*{found}$"
            ):
                open_family(replace(model, family=asked), str(model.path))


# ---- images and prompts


@pytest.mark.parametrize("size", SIZES)
def test_an_image_has_as_many_tokens_as_its_size_says(family: Family, size: tuple[int, int]) -> None:
    image = picture(*size, seed=0)
    [count] = family.image_token_counts([image])
    assert count == family.tokens_of(family.encode_images([image])) > 0


def test_images_are_encoded_as_the_processor_encodes_them(family: Family, processor: Any) -> None:
    for prompt in MIXED:
        if not prompt.images:
            continue
        theirs = _processed(processor, prompt)
        own = family.image_inputs(family.encode_images(prompt.images))
        assert own
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in own.items())


def test_expanded_prompts_are_those_of_the_processor(family: Family, processor: Any) -> None:
    for prompt in MIXED:
        assert _expanded(family, prompt) == _processed(processor, prompt)["input_ids"][0].tolist()
        assert family.prompt_token_ids(prompt).count(family.image_token_id) == len(prompt.images)


def test_without_images_there_is_nothing_to_encode(family: Family) -> None:
    nothing = family.encode_images([])
    assert (len(nothing.grids), family.tokens_of(nothing), family.image_token_counts([])) == (0, 0, [])


def test_the_smallest_image_is_smaller_than_any(family: Family) -> None:
    smallest = family.tokens_of(family.encode_images([family.smallest_image()]))
    assert smallest == min(family.image_token_counts([picture(*size, seed=0)])[0] for size in SIZES)


def test_positions_are_those_of_the_library(family: Family, untouched: Any) -> None:
    draw = random.Random(0)
    for case in range(12):
        images = [picture(draw.randint(10, 250), draw.randint(10, 250), seed) for seed in range(case % 4)]
        prompt = ask("any", *images, text="3 " * draw.randint(1, 9))
        token_ids = torch.tensor(_expanded(family, prompt))
        found = family.prompt_positions(token_ids, family.encode_images(images))
        assert torch.equal(found, _library_positions(untouched, token_ids, family, family.encode_images(images)))


def test_no_token_that_the_network_replaces_by_pixels_can_be_sampled(family: Family, untouched: Any) -> None:
    everything = torch.arange(untouched.config.text_config.vocab_size)[None]
    embedded = untouched.get_input_embeddings()(everything)
    masks = untouched.model.get_placeholder_mask(everything, embedded, image_features=embedded[:, :1])
    several = masks if isinstance(masks, tuple) else (masks,)
    replaced = {token for mask in several for token in mask[0, :, 0].nonzero().flatten().tolist()}
    assert family.image_token_id in replaced
    assert replaced <= set(family.banned_token_ids)
    assert not {family.eos_token_id, family.pad_token_id} & set(family.banned_token_ids)


# ---- the learner


@pytest.mark.parametrize("attention", ["grouped", "dense", "blocks", "fused"])
def test_shared_prefix_rows_equal_plain_rows_of_the_untouched_network(
    policy: Policy, untouched: Any, attention: str
) -> None:
    _assert_equals_plain_rows(policy, untouched, MIXED, attention)


@pytest.mark.parametrize("attention", ["grouped", "dense", "blocks", "fused"])
def test_a_narrow_last_layer_changes_nothing(policy: Policy, untouched: Any, attention: str) -> None:
    learner = copy.deepcopy(policy)
    prune_last_layer(policy.family.layers(learner.network)[-1])
    _assert_equals_plain_rows(learner, untouched, MIXED, attention)


def test_a_narrow_last_layer_is_as_narrow_as_what_is_predicted(policy: Policy) -> None:
    learner = copy.deepcopy(policy)
    last: Any = policy.family.layers(learner.network)[-1]
    prune_last_layer(last)
    seen: list[int] = []
    last.mlp.register_forward_hook(lambda _module, given, _out: seen.append(given[0].shape[1]))
    batch = batch_of([row_of(group_of(policy.family, prompt, [1, 7, 3], 0)) for prompt in MIXED], policy.family)
    learner(batch)
    assert seen == [len(batch.asked)] == [len(MIXED) * (1 + 6 + 2 + 1 - 1)]


@pytest.mark.parametrize("by_kernel", [True, False])
def test_images_of_many_patches_look_the_same_to_the_untouched_network(
    name: str, models: dict[str, ModelConfig], untouched: Any, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours attends by a kernel or in blocks, and projects patches by a product."""
    monkeypatch.setattr(fused, "is_chosen", lambda: by_kernel)
    wide = replace(models[name], max_pixels=401408)
    policy = fresh_policy(open_family(wide, str(wide.path)))
    prompts = [ask("large", picture(640, 600, 1)), ask("ragged", picture(300, 90, 2), picture(84, 56, 3))]
    _assert_equals_plain_rows(policy, untouched, prompts, "auto")


def test_gradient_checkpointing_changes_no_gradient(policy: Policy) -> None:
    """Each layer runs once more in backward, the prune_last_layer one too."""
    learner = copy.deepcopy(policy)
    layers: Any = policy.family.layers(learner.network)
    prune_last_layer(layers[-1])
    begun: list[int] = []
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: begun.append(number))
    batch = batch_of([row_of(group_of(policy.family, prompt, [3, 5], 0)) for prompt in MIXED], policy.family)
    expected = gradients(learner, learner(batch)[0].sum())
    assert Counter(begun) == Counter(range(len(layers)))
    train_without_dropout(learner.network)
    checkpoint_layers(learner.network)
    assert_same_gradients(gradients(learner, learner(batch)[0].sum()), expected, 1e-5)
    assert Counter(begun) == Counter(list(range(len(layers))) * 3)


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
        """By the network's own attention; the learner's has no dropout."""
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


def test_plain_transformers_loads_what_was_saved(
    name: str, models: dict[str, ModelConfig], policies: dict[str, Policy], trained: dict[str, Policy], tmp_path: Path
) -> None:
    """The weights that it is given are saved, whatever is left of them in the network."""
    policy = trained[name]
    policy.family.save(tmp_path, policies[name].network, sent_weights(policy.network))
    again = open_family(models[name], str(tmp_path))
    groups = [group_of(policy.family, prompt, [4, 2], 0) for prompt in MIXED]
    plain = Policy(AutoModelForImageTextToText.from_pretrained(tmp_path), again, policy.temperature, policy.logit_rows)
    with torch.no_grad():
        own = policy(batch_of([row_of(group) for group in groups], policy.family))[0]
        assert (plain_logprobs(plain, again, groups) - own).abs().max() < 1e-4
    assert [_expanded(again, prompt) for prompt in MIXED] == [_expanded(policy.family, prompt) for prompt in MIXED]
    assert again.banned_token_ids == policy.family.banned_token_ids


def test_a_folder_is_saved_part_by_part(
    name: str,
    models: dict[str, ModelConfig],
    policies: dict[str, Policy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Never all weights at a time: merged in float32 they are several times the network."""
    monkeypatch.setattr(hugging_face, "PART_BYTES", 400_000)
    policy, held = policies[name], [0]
    plain = dict(sent_weights(policy.network))

    def weights() -> Iterator[tuple[str, Tensor]]:
        alive: list[weakref.ref[Tensor]] = []
        for each, weight in plain.items():
            held.append(sum(one.nbytes for ref in alive if (one := ref()) is not None))
            copied = weight.clone()
            alive.append(weakref.ref(copied))
            yield each, copied
            del copied

    policy.family.save(tmp_path, policy.network, weights())
    assert max(held) < 400_000 < sum(weight.nbytes for weight in plain.values())
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    again = open_family(models[name], str(tmp_path)).load_network(torch.float32)
    assert all(torch.equal(weight, plain[each]) for each, weight in again.named_parameters())


def _expanded(family: Family, prompt: Prompt) -> list[int]:
    return family.expand(family.prompt_token_ids(prompt), family.image_token_counts(prompt.images))


def _processed(processor: Any, prompt: Prompt) -> dict[str, Tensor]:
    """What the library alone makes of a prompt of one message."""
    content = [{"type": "image"}] * len(prompt.images) + [{"type": "text", "text": prompt.messages[0].text}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    images = [Image.open(io.BytesIO(image)).convert("RGB") for image in prompt.images]
    found: dict[str, Tensor] = processor(text=[text], images=images or None, return_tensors="pt")
    return found


def _library_positions(network: Any, token_ids: Tensor, family: Family, images: ImageTensors) -> Tensor:
    """(axes, L): those that the text model's queries and keys are turned by."""
    seen: list[Tensor] = []
    turning = network.model.language_model.rotary_emb
    hook = turning.register_forward_pre_hook(lambda _turning, given: seen.append(given[1]))
    with torch.no_grad():
        network(
            input_ids=token_ids[None],
            mm_token_type_ids=(token_ids == family.image_token_id).long()[None],
            **(family.image_inputs(images) if len(images.grids) else {}),
        )
    hook.remove()
    return seen[0].view(-1, len(token_ids))


def _assert_equals_plain_rows(policy: Policy, untouched: Any, prompts: Sequence[Prompt], attention: str) -> None:
    """In logprobs and gradients."""
    learner = copy.deepcopy(policy)
    plain = Policy(untouched, policy.family, policy.temperature, policy.logit_rows)
    groups = [group_of(policy.family, prompt, [1, 7, 3], seed) for seed, prompt in enumerate(prompts)]
    own = learner(batch_of([row_of(group) for group in groups], policy.family, attention))[0]
    expected = plain_logprobs(plain, policy.family, groups)
    assert (own - expected).abs().max() < 5e-5
    direction = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    found = gradients(learner, (own * direction).sum())
    assert_same_gradients(found, gradients(plain, (expected * direction).sum()), 1e-4)


# ---- its parts


def test_a_skeleton_is_the_network_without_its_numbers(family: Family, policy: Policy) -> None:
    skeleton = {name: tuple(one.shape) for name, one in family.skeleton().named_parameters() if one.is_meta}
    assert skeleton == {name: tuple(one.shape) for name, one in policy.network.named_parameters()}


def test_every_weight_is_of_one_part(family: Family, policy: Policy) -> None:
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

"""What every model family promises, held against the library's own network and processor, and against real vLLM."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from othink_ray.config.bounds import CHOICES
from othink_ray.config.load import conf_dir, load
from othink_ray.config.schema import Config, ModelConfig
from othink_ray.core import fused
from othink_ray.engines.hf_rollout import HFRollout
from othink_ray.engines.inputs import pixel_digest, pixels_as
from othink_ray.engines.policy import Policy
from othink_ray.engines.training_mode import checkpoint_layers, train_without_dropout
from othink_ray.families import FAMILIES, ModelError, open_family
from othink_ray.families.base import Family, ImageTensors
from othink_ray.families.last_layer import narrow
from othink_ray.families.parts import modules_by_part
from othink_ray.types import PixelDigest, Prompt
from othink_ray.weights.audit import Tolerance, compare, repeated
from othink_ray.weights.chunks import to_chunks
from tests.contracts.family_engine import SAMPLING, Lived, live
from tests.engines.nearness import assert_same_gradients, gradients
from tests.engines.plain_rows import plain_logprobs
from tests.engines.samples import (
    MIXED,
    ask,
    batch_of,
    fresh_policy,
    group_of,
    learner_gap,
    picture,
    row_of,
    sent_weights,
)
from tests.families.checkpoints import CHECKPOINTS, build_checkpoint

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


# ---- of each family: a folder, what the library makes of it, what we make of it


@pytest.fixture(scope="module")
def folders(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in made.items():
        build_checkpoint(name, folder, texts)
    return made


@pytest.fixture(scope="module")
def models(config: Config, folders: dict[str, Path]) -> dict[str, ModelConfig]:
    return {name: replace(config.model, family=name, path=str(folder), tiny=None) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def policies(models: dict[str, ModelConfig]) -> dict[str, Policy]:
    """The learner's, as they start. Read only."""
    return {name: fresh_policy(open_family(model, str(model.path))) for name, model in models.items()}


@pytest.fixture(scope="module")
def trained(policies: dict[str, Policy]) -> dict[str, Policy]:
    """The learner's after a training that changed every number in them."""
    moved = {name: copy.deepcopy(policy) for name, policy in policies.items()}
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for policy in moved.values():
            for parameter in policy.parameters():
                noise = torch.randn(parameter.shape, generator=draw)
                noise = noise.where(noise.abs() > 0.01, 0.01)  # one in some hundred thousands is 0
                parameter.add_(noise * 0.3 * parameter.std())
    return moved


@pytest.fixture(scope="module")
def lives(
    config: Config,
    models: dict[str, ModelConfig],
    policies: dict[str, Policy],
    trained: dict[str, Policy],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Lived]]]:
    """vLLM engines, opened on what `save` wrote, then given the trained weights; two at a time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        futures = {}
        for name, policy in policies.items():
            saved = tmp_path_factory.mktemp("saved")
            policy.family.save(saved, policy.network, dict(sent_weights(policy.network)))
            weights = list(to_chunks(sent_weights(trained[name].network), bucket_bytes=1))
            futures[name] = processes.submit(live, models[name], config.rollout, str(saved), MIXED, weights)
        yield futures


@pytest.fixture(params=FAMILIES)
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
    """The library's, opened without our code."""
    return AutoProcessor.from_pretrained(folders[name], **family.processor_settings)


@pytest.fixture
def untouched(name: str, folders: dict[str, Path]) -> Any:
    """The library's network, opened without our code."""
    return AutoModelForImageTextToText.from_pretrained(folders[name], dtype=torch.float32).eval()


@pytest.fixture
def lived(name: str, lives: dict[str, Future[Lived]]) -> Lived:
    return lives[name].result()


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
    narrow(policy.family.layers(learner.network)[-1])
    _assert_equals_plain_rows(learner, untouched, MIXED, attention)


def test_a_narrow_last_layer_is_as_narrow_as_what_is_predicted(policy: Policy) -> None:
    learner = copy.deepcopy(policy)
    last: Any = policy.family.layers(learner.network)[-1]
    narrow(last)
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
    """Each layer runs once more in backward, the narrow one too."""
    learner = copy.deepcopy(policy)
    layers: Any = policy.family.layers(learner.network)
    narrow(layers[-1])
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
    policy.family.save(tmp_path, policies[name].network, dict(sent_weights(policy.network)))
    again = open_family(models[name], str(tmp_path))
    groups = [group_of(policy.family, prompt, [4, 2], 0) for prompt in MIXED]
    plain = Policy(AutoModelForImageTextToText.from_pretrained(tmp_path), again, policy.temperature, policy.logit_rows)
    with torch.no_grad():
        own = policy(batch_of([row_of(group) for group in groups], policy.family))[0]
        assert (plain_logprobs(plain, again, groups) - own).abs().max() < 1e-4
    assert [_expanded(again, prompt) for prompt in MIXED] == [_expanded(policy.family, prompt) for prompt in MIXED]
    assert again.banned_token_ids == policy.family.banned_token_ids


# ---- the engines


def test_an_engine_expands_prompts_as_the_family_does(family: Family, lived: Lived) -> None:
    assert {group.prompt.id for group in lived.opened} == {prompt.id for prompt in MIXED}
    for group in lived.opened:
        assert group.prompt_token_ids.tolist() == _expanded(family, group.prompt)
    assert sum(group.image_encodes for group in lived.opened) == sum(len(prompt.images) for prompt in MIXED)


def test_an_engine_that_opened_a_saved_folder_samples_from_the_learners_policy(policy: Policy, lived: Lived) -> None:
    gaps = [learner_gap(policy, policy.family, group) for group in lived.opened]
    assert max(float(gap.max()) for gap in gaps) < 1e-4


def test_digests_read_from_an_engine_are_those_of_the_weights_sent(policy: Policy, lived: Lived) -> None:
    assert lived.wrong == {}
    assert set(lived.wrong_by_a_bit) == {name for name, _ in sent_weights(policy.network)}


def test_the_gap_of_a_first_push_is_within_its_bound(name: str, trained: dict[str, Policy], lived: Lived) -> None:
    policy = trained[name]
    batch = batch_of([row_of(probe.group) for probe in lived.probes], policy.family)
    with torch.no_grad():
        whole = policy(batch, wanted="distributions")
    sizes = [len(probe.candidates) for probe in lived.probes]
    own = [
        rows.gather(1, torch.from_numpy(probe.candidates)).numpy()
        for rows, probe in zip(whole[: sum(sizes)].split(sizes), lived.probes, strict=True)
    ]
    layers = len(policy.family.layers(policy.network))
    audit = Tolerance("float32", layers).require(compare(lived.probes, repeated(lived.probes, own), 1))
    assert 0 < audit.gap_mean < audit.tolerance / 2


def test_an_engine_gives_its_tower_the_pixels_of_the_learner(family: Family, lived: Lived) -> None:
    for prompt, probe in zip(MIXED, lived.probes, strict=True):
        found = probe.pixels
        if not prompt.images:
            assert found == PixelDigest()
            continue
        images = family.encode_images(prompt.images)
        assert found == pixel_digest(pixels_as(family, images, found.dtype))
        one_off = replace(images, pixels=images.pixels.clone())
        one_off.pixels[-1].view(-1)[-1] += 1 / 255 / family.processor.image_processor.image_std[-1]
        assert found != pixel_digest(pixels_as(family, one_off, found.dtype))


def test_a_push_reaches_every_number_of_an_engine_once(policy: Policy, lived: Lived) -> None:
    assert lived.moved == {name: weight.numel() for name, weight in sent_weights(policy.network)}
    assert {name: kept for name, kept in lived.kept.items() if kept} == {}


def test_after_a_push_an_engine_samples_from_the_trained_policy(
    name: str, policy: Policy, trained: dict[str, Policy], lived: Lived
) -> None:
    gaps = [learner_gap(trained[name], policy.family, group) for group in lived.pushed]
    assert max(float(gap.max()) for gap in gaps) < 1e-4
    stale = [learner_gap(policy, policy.family, group) for group in lived.pushed]
    assert min(float(gap.max()) for gap in stale) > 0.01


def test_transformers_alone_samples_from_the_learners_policy(
    name: str, policy: Policy, config: Config, models: dict[str, ModelConfig]
) -> None:
    engine = HFRollout(config.rollout, models[name], policy.family)
    gaps = [learner_gap(policy, policy.family, group) for group in engine.generate(MIXED, SAMPLING)]
    assert max(float(gap.max()) for gap in gaps) < 1e-4


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

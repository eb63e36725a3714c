"""Planned bytes of a micro-batch against counted allocations, and against autograd's saved tensors at real shapes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.allocations import Allocations
from othink_ray.config.load import load
from othink_ray.config.schema import Config
from othink_ray.core.attention import Attention
from othink_ray.core.losses import LOSSES, LossInputs
from othink_ray.driver.memory_plan import learner_memory
from othink_ray.engines.collate import collate
from othink_ray.engines.network_memory import activations, meta_learner_network, network_shape
from othink_ray.engines.policy import DTYPES, Policy, choose_trained
from othink_ray.families import open_family
from othink_ray.families.base import Family
from othink_ray.families.hugging_face import prune_last_layer
from tests.driver.real_shapes import write_public, write_shapes
from tests.engines.samples import ask, group_of, picture, row_of

MID = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
TOWER = {"depth": 3, "embed_dim": 128, "num_heads": 4}
VOCABULARY = 2000
IMAGE = picture(224, 224, 0)


class Causal(Attention):
    """torch's fused causal attention, which treats a packed sequence as one text."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)


@pytest.fixture(scope="module")
def mid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mid")
    text: dict[str, Any] = MID | {"num_hidden_layers": 4, "mrope_section": [4, 6, 6]}
    write_shapes(folder, text, dict(TOWER), tied=True, vocabulary=VOCABULARY)
    network = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    weights = {name: weight for name, weight in network.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def counted(config: Config, family: Family, sample: Any, dtype: torch.dtype) -> int:
    """Return the peak bytes of an update's forward, loss and backward, without weights and gradients."""
    network: Any = family.load_network(dtype)
    prune_last_layer(family.layers(network)[-1])
    choose_trained(family, network, config.learner)
    network.to(dtype).train()
    if config.learner.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(network, family, 1.0, config.learner.logit_rows)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    sums = {id(parameter): torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained}

    def accumulate(parameter: Tensor) -> None:
        assert parameter.grad is not None
        sums[id(parameter)].add_(parameter.grad)
        parameter.grad = None

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(accumulate)
    cpu = torch.device("cpu")
    with Allocations(*policy.parameters(), *policy.buffers(), *sums.values()) as seen:
        batch = collate([sample], family, lambda sequence, device: Causal(), cpu)
        logprobs, _ = policy(batch)
        value, _ = LOSSES["grpo"](
            LossInputs(
                policy_logprobs=logprobs,
                old_logprobs=logprobs.detach(),
                ref_logprobs=logprobs.detach(),
                advantages=batch.advantages,
                loss_weights=batch.loss_weights,
                answers=batch.answers,
                beta=0.1,
                clip_eps=(0.2, 0.2),
                estimator="k3",
            )
        )
        value.backward()
    assert all(total.any() for total in sums.values()) or config.learner.lora.rank
    return seen.peak


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "rank"), list(itertools.product(["float32", "bfloat16"], [False, True], [0, 8]))
)
def test_planned_bytes_match_the_allocations_of_an_update(
    mid_folder: Path, dtype: str, checkpointing: bool, rank: int
) -> None:
    keys = [f"learner.gradient_checkpointing={checkpointing}", f"learner.lora.rank={rank}", "learner.logit_rows=64"]
    config = load([*keys, f"model.dtype={dtype}", "learner.zero_stage=2"])
    family = open_family(replace(config.model, max_pixels=50176), str(mid_folder))
    sample = row_of(group_of(family, ask("a", IMAGE), [200, 300], seed=0))
    network = meta_learner_network(family, config.learner, DTYPES[dtype])
    work = activations(family, network, len(sample.token_ids), [IMAGE], logit_tokens=500)
    updating = learner_memory(config, network_shape(family, network), work).updating
    planned = sum(updating.get(name, 0) for name in ("activations", "logits"))
    assert planned == pytest.approx(counted(config, family, sample, DTYPES[dtype]), rel=0.15)


def test_sizes_match_the_config_and_no_hook_is_left(mid_folder: Path) -> None:
    config = load([])
    family = open_family(replace(config.model, max_pixels=50176), str(mid_folder))
    network = meta_learner_network(family, config.learner, torch.float32)
    shape = network_shape(family, network)
    assert shape.kv_per_token == 2 * 4 * MID["num_key_value_heads"] * 32  # of 4 layers, in heads of 128 / 4
    assert (shape.vocabulary, shape.width, shape.head_trained) == (VOCABULARY, 128, True)
    assert shape.largest == max(shape.largest, VOCABULARY * 128) < shape.trained <= shape.weights
    activations(family, network, 200, [IMAGE], logit_tokens=10)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2b", "7b"])
def test_at_real_shapes_planned_bytes_are_what_autograd_saves(name: str, tmp_path: Path) -> None:
    config = load([f"model=qwen2_vl_{name}"])
    family = open_family(config.model, str(write_public(tmp_path / name, name)))
    network = meta_learner_network(family, config.learner, torch.bfloat16)
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    saved: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in parameters:
            saved.append(tensor)
        return tensor

    image = picture(616, 616, 0)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        activations(family, network, 8800, [image], logit_tokens=8000)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in saved}
    found = sum(storage.nbytes() for storage in storages.values())
    kept = activations(family, network, 8800, [image], logit_tokens=8000).kept
    assert kept == pytest.approx(found, rel=0.05)
    assert kept / 2**30 == pytest.approx({"2b": 27.2, "7b": 55.3}[name], rel=0.05)

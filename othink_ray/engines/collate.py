"""Collation of packed samples into one packed sequence, with the positions and image tensors of the model family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from othink_ray.core.attention import Attention
from othink_ray.core.packed_sequence import (
    PackedSequence,
    answer_index,
    build_packed_sequence,
    offsets,
    predicting,
    predictors,
)
from othink_ray.families.base import Family, ImageTensors
from othink_ray.types import Pack


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBatch:
    """A micro-batch in host memory: the N tokens that the network reads, and the M answer tokens that it predicts."""

    sequence: PackedSequence  # of these N tokens; always on the CPU
    token_ids: Tensor  # (N,)
    position_ids: Tensor  # (axes, N)
    images: ImageTensors
    logit_indices: Tensor  # (K,) of the tokens whose hidden states become logits, which predict answer tokens
    predictors: Tensor  # (M,) index into `logit_indices` of each answer token's predictor
    targets: Tensor  # (M,) ids of the answer tokens
    answers: Tensor  # (M,) index of the answer that a token belongs to
    loss_weights: Tensor  # (M,)
    advantages: Tensor  # (M,)
    sampler_logprobs: Tensor  # (M,)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch(HostBatch):
    """A micro-batch on the network's device, with the attention over its tokens."""

    attention: Attention


def collate(
    packs: Sequence[Pack],
    family: Family,
    attend: Callable[[PackedSequence, torch.device], Attention],
    device: torch.device,
) -> MicroBatch:
    """Return `packs` as one micro-batch on `device`."""
    return to_device(collate_on_host(packs, family), attend, device)


def collate_on_host(packs: Sequence[Pack], family: Family) -> HostBatch:
    """Return `packs` as one batch on the CPU; ValueError if engine and learner differ in a prompt's image tokens.

    Without images, append a zero-weight dummy sample so that every rank runs the vision tower (ZeRO-3 would hang).
    """
    if not any(pack.images for pack in packs):
        packs = [*packs, _dummy_sample(family)]
    images = [family.encode_images(pack.images) for pack in packs]
    whole = build_packed_sequence([pack.segments for pack in packs])
    all_ids = torch.from_numpy(np.concatenate([pack.token_ids for pack in packs]))
    read = predicting(whole)
    sequence, token_ids = whole[read], all_ids[read]
    logit_indices, which = (read.cumsum(0) - 1)[predictors(whole)].unique(return_inverse=True)
    positions = [_prompt_positions(pack, image, family) for pack, image in zip(packs, images, strict=True)]
    answer_start = torch.stack([prompt.max() + 1 for prompt in positions])
    prompt_positions = torch.cat(positions, dim=1)
    position_ids = (answer_start[sequence.sample_ids] + offsets(sequence)).expand(len(prompt_positions), -1).clone()
    position_ids[:, ~sequence.is_answer] = prompt_positions
    with_images = [image for image in images if len(image.grids)]
    return HostBatch(
        sequence=sequence,
        token_ids=token_ids,
        position_ids=position_ids,
        images=ImageTensors(
            pixels=torch.cat([image.pixels for image in with_images]),
            grids=torch.cat([image.grids for image in with_images]),
        ),
        logit_indices=logit_indices,
        predictors=which,
        targets=all_ids[whole.is_answer],
        answers=answer_index(whole),
        loss_weights=_answer_values(packs, [pack.loss_weights for pack in packs]),
        advantages=_answer_values(packs, [pack.advantages for pack in packs]),
        sampler_logprobs=_answer_values(packs, [pack.sampler_logprobs for pack in packs]),
    )


def to_device(
    batch: HostBatch, attend: Callable[[PackedSequence, torch.device], Attention], device: torch.device
) -> MicroBatch:
    """Return `batch` with its tensors on `device` and its attention there; tensors already there are not copied."""
    values = {field.name: getattr(batch, field.name) for field in fields(HostBatch)}
    moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    images = replace(batch.images, pixels=batch.images.pixels.to(device))
    return MicroBatch(**(values | moved | {"images": images}), attention=attend(batch.sequence, device))


def _dummy_sample(family: Family) -> Pack:
    """Return a zero-weight sample with the smallest image: it runs every layer, so that ZeRO-3 collectives match."""
    image = family.smallest_image()
    prompt = family.expand([family.image_token_id], family.image_token_counts([image]))
    length = len(prompt) + 1
    return Pack(
        prompt_id="dummy",
        images=(image,),
        token_ids=np.array([*prompt, family.eos_token_id], dtype=np.int64),
        segments=np.array([0] * len(prompt) + [1], dtype=np.int32),
        loss_weights=np.zeros(length),
        sampler_logprobs=np.zeros(length, dtype=np.float32),
        advantages=np.zeros(length),
    )


def _prompt_positions(pack: Pack, images: ImageTensors, family: Family) -> Tensor:
    """Return positions (axes, prompt length); ValueError unless this rank's processor counts as many image tokens."""
    prompt = torch.from_numpy(pack.token_ids[: pack.prompt_len])
    found = int((prompt == family.image_token_id).sum())
    expected = family.encoded_token_count(images)
    if found != expected:
        raise ValueError(
            f"prompt {pack.prompt_id}: the rollout engine expanded its {len(images.grids)} image(s) to {found} tokens, "
            f"the learner's processor to {expected}: their image processors differ; check that both load the same "
            "transformers version and the same preprocessor_config.json"
        )
    return family.prompt_positions(prompt, images)


def _answer_values(packs: Sequence[Pack], values: Sequence[NDArray[np.floating]]) -> Tensor:
    """Return the values on answer tokens, concatenated to (M,) float32; `values` holds one array (L,) per pack."""
    kept = [each[pack.segments > 0] for pack, each in zip(packs, values, strict=True)]
    return torch.from_numpy(np.concatenate(kept)).float()

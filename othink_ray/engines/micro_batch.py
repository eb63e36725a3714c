"""Rows to tensors: a few shared-prefix rows, padded to one length, with positions and images of their family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from othink_ray.core.packing import PADDING, answer_index, attention_mask, position_offsets, predictor_index
from othink_ray.families.base import Family, ImageTensors
from othink_ray.types import Pack


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """B rows of L tokens; the N answer tokens of all rows are flat, in row order."""

    token_ids: Tensor  # (B, L)
    position_ids: Tensor  # (3, B, L)
    mask: Tensor  # (B, 1, L, L)
    images: ImageTensors
    predictors: Tensor  # (N,) index into the B * L hidden states
    targets: Tensor  # (N,)
    answers: Tensor  # (N,) which answer a token belongs to
    loss_weights: Tensor  # (N,)
    advantages: Tensor  # (N,)
    sampler_logprobs: Tensor  # (N,)
    encoded_images: int


def collate(packs: Sequence[Pack], family: Family, device: torch.device) -> MicroBatch:
    """Pad, place and check `packs`; where none has an image, a row of weight 0 with the smallest image joins them."""
    if not any(pack.images for pack in packs):
        packs = [*packs, _weightless(family)]
    images = [family.encode_images(pack.images) for pack in packs]
    token_ids = _pad([pack.token_ids for pack in packs], family.pad_token_id)
    segments = _pad([pack.segments for pack in packs], PADDING)
    prompts = [_prompt_positions(pack, image, family) for pack, image in zip(packs, images, strict=True)]
    answer_start = torch.stack([prompt.max() + 1 for prompt in prompts])
    position_ids = (answer_start[:, None] + position_offsets(segments)).expand(3, -1, -1).clone()
    for row, prompt in enumerate(prompts):
        position_ids[:, row, : prompt.shape[1]] = prompt
    is_answer = segments > 0
    row_start = torch.arange(len(packs))[:, None] * segments.shape[1]
    grids = [image.grids for image in images]
    pixels = [image.pixels for image in images if len(image.grids)]
    return MicroBatch(
        token_ids=token_ids.to(device),
        position_ids=position_ids.to(device),
        mask=attention_mask(segments.to(device)),
        images=ImageTensors(pixels=torch.cat(pixels).to(device), grids=torch.cat(grids).to(device)),
        predictors=(predictor_index(segments) + row_start)[is_answer].to(device),
        targets=token_ids[is_answer].to(device),
        answers=answer_index(segments).to(device),
        loss_weights=_of_answers(packs, [pack.loss_weights for pack in packs]).to(device),
        advantages=_of_answers(packs, [pack.advantages for pack in packs]).to(device),
        sampler_logprobs=_of_answers(packs, [pack.sampler_logprobs for pack in packs]).to(device),
        encoded_images=sum(map(len, grids)),
    )


def _weightless(family: Family) -> Pack:
    """A row that changes nothing but runs every layer, so that ranks under ZeRO-3 make the same collectives."""
    image = family.smallest_image()
    prompt = family.expand([family.image_token_id], family.image_token_counts([image]))
    length = len(prompt) + 1
    return Pack(
        prompt_id="weightless",
        images=(image,),
        token_ids=np.array([*prompt, family.eos_token_id], dtype=np.int64),
        segments=np.array([0] * len(prompt) + [1], dtype=np.int32),
        loss_weights=np.zeros(length),
        sampler_logprobs=np.zeros(length, dtype=np.float32),
        advantages=np.zeros(length),
    )


def _prompt_positions(pack: Pack, images: ImageTensors, family: Family) -> Tensor:
    """(3, prompt length); refuses a row whose image tokens are not those that this rank's processor makes."""
    prompt = torch.from_numpy(pack.token_ids[: pack.prompt_len])
    found = int((prompt == family.image_token_id).sum())
    expected = family.tokens_of(images)
    if found != expected:
        raise ValueError(
            f"prompt {pack.prompt_id}: the rollout engine expanded its {len(images.grids)} image(s) to {found} tokens, "
            f"the learner's processor to {expected}: give both the same model.min_pixels and model.max_pixels"
        )
    return family.prompt_positions(prompt, images)


def _pad(rows: Sequence[NDArray[Any]], value: int) -> Tensor:
    """Rows of any length -> (B, longest), int64."""
    return pad_sequence([torch.from_numpy(row).long() for row in rows], batch_first=True, padding_value=value)


def _of_answers(packs: Sequence[Pack], rows: Sequence[NDArray[Any]]) -> Tensor:
    """The values that stand on answer tokens, flat, as float32."""
    kept = [row[pack.segments > 0] for pack, row in zip(packs, rows, strict=True)]
    return torch.from_numpy(np.concatenate(kept)).float()

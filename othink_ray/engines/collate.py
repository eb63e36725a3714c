"""Rows to tensors: a few shared-prefix rows on one line, with positions and images of their family."""

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
class LaidOut:
    """A line of the N tokens that the network reads, and the M tokens of answers, which it predicts."""

    line: PackedSequence  # of these N tokens; always on the CPU
    token_ids: Tensor  # (N,)
    position_ids: Tensor  # (axes, N)
    images: ImageTensors
    asked: Tensor  # (K,) places whose hidden states predict the answer tokens
    predictors: Tensor  # (M,) which of these predicts each
    targets: Tensor  # (M,)
    answers: Tensor  # (M,) which answer a token belongs to
    loss_weights: Tensor  # (M,)
    advantages: Tensor  # (M,)
    sampler_logprobs: Tensor  # (M,)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch(LaidOut):
    """The same on the device of the network, with its attention."""

    attention: Attention


def collate(
    packs: Sequence[Pack],
    family: Family,
    attend: Callable[[PackedSequence, torch.device], Attention],
    device: torch.device,
) -> MicroBatch:
    """Lay out `packs` and copy them to `device`."""
    return to_device(lay_out(packs, family), attend, device)


def lay_out(packs: Sequence[Pack], family: Family) -> LaidOut:
    """Place and check `packs`, on the CPU; where none has an image, a row of weight 0 with the smallest one joins."""
    if not any(pack.images for pack in packs):
        packs = [*packs, _weightless(family)]
    images = [family.encode_images(pack.images) for pack in packs]
    whole = build_packed_sequence([pack.segments for pack in packs])
    all_ids = torch.from_numpy(np.concatenate([pack.token_ids for pack in packs]))
    read = predicting(whole)
    line, token_ids = whole[read], all_ids[read]
    asked, which = (read.cumsum(0) - 1)[predictors(whole)].unique(return_inverse=True)
    prompts = [_prompt_positions(pack, image, family) for pack, image in zip(packs, images, strict=True)]
    answer_start = torch.stack([prompt.max() + 1 for prompt in prompts])
    of_prompts = torch.cat(prompts, dim=1)
    position_ids = (answer_start[line.rows] + offsets(line)).expand(len(of_prompts), -1).clone()
    position_ids[:, ~line.is_answer] = of_prompts
    shown = [image for image in images if len(image.grids)]
    return LaidOut(
        line=line,
        token_ids=token_ids,
        position_ids=position_ids,
        images=ImageTensors(
            pixels=torch.cat([image.pixels for image in shown]),
            grids=torch.cat([image.grids for image in shown]),
        ),
        asked=asked,
        predictors=which,
        targets=all_ids[whole.is_answer],
        answers=answer_index(whole),
        loss_weights=_of_answers(packs, [pack.loss_weights for pack in packs]),
        advantages=_of_answers(packs, [pack.advantages for pack in packs]),
        sampler_logprobs=_of_answers(packs, [pack.sampler_logprobs for pack in packs]),
    )


def to_device(
    laid_out: LaidOut, attend: Callable[[PackedSequence, torch.device], Attention], device: torch.device
) -> MicroBatch:
    """A copy on `device`, where that is not the CPU, and its attention there."""
    own = {one.name: getattr(laid_out, one.name) for one in fields(LaidOut)}
    moved = {name: value.to(device) for name, value in own.items() if isinstance(value, Tensor)}
    images = replace(laid_out.images, pixels=laid_out.images.pixels.to(device))
    return MicroBatch(**(own | moved | {"images": images}), attention=attend(laid_out.line, device))


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
    """(axes, prompt length); refuses a row whose image tokens are not those that this rank's processor makes."""
    prompt = torch.from_numpy(pack.token_ids[: pack.prompt_len])
    found = int((prompt == family.image_token_id).sum())
    expected = family.tokens_of(images)
    if found != expected:
        raise ValueError(
            f"prompt {pack.prompt_id}: the rollout engine expanded its {len(images.grids)} image(s) to {found} tokens, "
            f"the learner's processor to {expected}: give both the same model.min_pixels and model.max_pixels"
        )
    return family.prompt_positions(prompt, images)


def _of_answers(packs: Sequence[Pack], rows: Sequence[NDArray[np.floating]]) -> Tensor:
    """The values that stand on answer tokens, flat, as float32."""
    kept = [row[pack.segments > 0] for pack, row in zip(packs, rows, strict=True)]
    return torch.from_numpy(np.concatenate(kept)).float()

"""The reference for packed samples: the unmodified network on padded rows, one per answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from othink_ray.engines.policy import BANNED_BIAS, Policy
from othink_ray.families.base import Family
from othink_ray.types import Group
from tests.reference.grpo_d import padded_rows


def plain_logprobs(policy: Policy, family: Family, groups: Sequence[Group]) -> Tensor:
    """Return logprobs (M,) of the answers by the network's own forward pass and positions, one row per answer."""
    network: Any = policy.network
    flat: list[Tensor] = []
    for group in groups:
        prompt = group.prompt_token_ids.tolist()
        rows, is_answer = padded_rows(prompt, [c.token_ids.tolist() for c in group.completions], family.pad_token_id)
        token_ids, answered = torch.tensor(rows), torch.tensor(is_answer)
        images = family.encode_images(group.prompt.images * len(rows))
        pixels = family.image_inputs(images) if group.prompt.images else {}
        in_prompt = torch.arange(token_ids.shape[1]) < len(prompt)
        logits = network(
            input_ids=token_ids,
            attention_mask=(in_prompt | answered).long(),
            mm_token_type_ids=((token_ids == family.image_token_id) & in_prompt).long(),
            use_cache=False,
            **pixels,
        ).logits.clone()
        logits[..., list(family.banned_token_ids)] += BANNED_BIAS
        log_p = torch.log_softmax(logits / policy.temperature, dim=-1)
        before = torch.roll(log_p, 1, dims=1)
        for row in range(len(rows)):
            indices = answered[row].nonzero().squeeze(1)
            flat.append(before[row, indices, token_ids[row, indices]])
    return torch.cat(flat)

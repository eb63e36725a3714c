"""A learner without shared prefixes: transformers' own network, a row an answer, prompt and image in each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

from othink_ray.config.schema import Config
from othink_ray.core.kl import kl_k3
from othink_ray.families import open_family
from othink_ray.families.base import Family
from othink_ray.types import Group


def learning_padded(config: Config, path: str) -> Callable[[Sequence[Group], Sequence[float]], float]:
    """Seconds of a step on groups and the gains of their answers: reference, forward, backward, AdamW, in one batch."""
    if config.learner.threads:
        torch.set_num_threads(config.learner.threads)
    family, learner = open_family(config.model, path), config.learner
    policy, reference = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        for _ in range(2)
    )
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learner.lr, eps=learner.adam_eps, fused=True)
    forward, refer = (torch.compile(network) if learner.compile else network for network in (policy, reference))

    def turn(groups: Sequence[Group], gains: Sequence[float]) -> float:
        start = time.perf_counter()
        inputs, answered = padded_rows(groups, family)
        with torch.no_grad():
            referred = answer_logprobs(refer, inputs, answered)
        found = answer_logprobs(forward, inputs, answered)
        ratio = torch.exp(found - found.detach())
        gain = torch.tensor(gains, dtype=torch.float32)[:, None]
        (config.algo.kl.beta_min * kl_k3(found, referred) - ratio * gain).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), learner.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return turn


def padded_rows(groups: Sequence[Group], family: Family) -> tuple[dict[str, Any], Tensor]:
    """What a network is given, prompts padded at their start, and its answers (rows, T), all of one length."""
    asked = [torch.from_numpy(group.prompt_token_ids) for group in groups for _ in group.completions]
    answered = torch.stack([torch.from_numpy(one.token_ids) for group in groups for one in group.completions])
    prompts = pad_sequence(asked, batch_first=True, padding_value=family.pad_token_id, padding_side="left")
    images = family.encode_images([one for group in groups for _ in group.completions for one in group.prompt.images])
    seen = pad_sequence([torch.ones_like(own) for own in asked], batch_first=True, padding_side="left")
    inputs = {
        "input_ids": torch.cat([prompts, answered], dim=1),
        "attention_mask": torch.cat([seen, torch.ones_like(answered)], dim=1),
        "mm_token_type_ids": torch.cat([prompts == family.image_token_id, answered < 0], dim=1).long(),
        **family.image_inputs(images),
    }
    return inputs, answered


def answer_logprobs(network: Any, inputs: dict[str, Any], answered: Tensor) -> Tensor:
    """(rows, T) in float32."""
    logits = network(**inputs, use_cache=False, logits_to_keep=answered.shape[1] + 1).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1).gather(2, answered[..., None])[..., 0]

"""Baseline learner without shared prefixes: transformers' network on padded samples, each with prompt and image."""

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
    """Return a function that runs a step on groups and advantages, in one batch, and returns its seconds.

    A step is a forward pass of the reference, forward and backward passes of the policy, and an AdamW step.
    """
    if config.learner.threads:
        torch.set_num_threads(config.learner.threads)
    family, learner = open_family(config.model, path), config.learner
    policy, reference = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        for _ in range(2)
    )
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learner.lr, eps=learner.adam_eps, fused=True)
    policy_forward, reference_forward = (
        torch.compile(network) if learner.compile else network for network in (policy, reference)
    )

    def step(groups: Sequence[Group], advantages: Sequence[float]) -> float:
        start = time.perf_counter()
        inputs, answer_ids = padded_samples(groups, family)
        with torch.no_grad():
            ref_logprobs = answer_logprobs(reference_forward, inputs, answer_ids)
        policy_logprobs = answer_logprobs(policy_forward, inputs, answer_ids)
        ratio = torch.exp(policy_logprobs - policy_logprobs.detach())
        advantage = torch.tensor(advantages, dtype=torch.float32)[:, None]
        (config.algo.kl.beta_min * kl_k3(policy_logprobs, ref_logprobs) - ratio * advantage).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), learner.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def padded_samples(groups: Sequence[Group], family: Family) -> tuple[dict[str, Any], Tensor]:
    """Return a network's inputs, prompts padded on the left, and the answers' token ids (N, T), all of one length."""
    prompt_ids = [torch.from_numpy(group.prompt_token_ids) for group in groups for _ in group.completions]
    answer_ids = torch.stack([torch.from_numpy(answer.token_ids) for group in groups for answer in group.completions])
    prompts = pad_sequence(prompt_ids, batch_first=True, padding_value=family.pad_token_id, padding_side="left")
    images = family.encode_images(
        [image for group in groups for _ in group.completions for image in group.prompt.images]
    )
    mask = pad_sequence([torch.ones_like(ids) for ids in prompt_ids], batch_first=True, padding_side="left")
    inputs = {
        "input_ids": torch.cat([prompts, answer_ids], dim=1),
        "attention_mask": torch.cat([mask, torch.ones_like(answer_ids)], dim=1),
        "mm_token_type_ids": torch.cat([prompts == family.image_token_id, answer_ids < 0], dim=1).long(),
        **family.image_inputs(images),
    }
    return inputs, answer_ids


def answer_logprobs(network: Any, inputs: dict[str, Any], answer_ids: Tensor) -> Tensor:
    """Return the logprobs of the answers (N, T) in float32."""
    logits = network(**inputs, use_cache=False, logits_to_keep=answer_ids.shape[1] + 1).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1).gather(2, answer_ids[..., None])[..., 0]

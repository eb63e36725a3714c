"""Prompts, groups and packed samples for engine tests: images of any size, answers of any length, all seeded."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from othink_ray.core.attention import attention_for
from othink_ray.core.packing import pack
from othink_ray.engines.base import RolloutEngine
from othink_ray.engines.collate import MicroBatch, collate
from othink_ray.engines.policy import Policy
from othink_ray.families.base import Family
from othink_ray.types import Completion, Group, Message, Pack, Prompt, ScoredGroup


def picture(width: int, height: int, seed: int) -> bytes:
    """Return a PNG of colored noise, coarse enough to survive resizing."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, size=(-(-height // 7), -(-width // 7), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(name: str, *images: bytes, text: str = "How many items are there in the image?") -> Prompt:
    return Prompt(
        id=name,
        messages=(Message(role="user", text=text, images=len(images)),),
        images=images,
        answer="3",
        task="counting",
    )


def group_of(family: Family, prompt: Prompt, lengths: Sequence[int], seed: int) -> Group:
    """Return a group of random answers of these lengths, with made-up but seeded sampler logprobs."""
    rng = np.random.default_rng(seed)
    words = [token for token in range(100, 300) if token not in family.banned_token_ids]
    expanded = family.expand(family.prompt_token_ids(prompt), family.image_token_counts(prompt.images))
    return Group(
        prompt=prompt,
        prompt_token_ids=np.array(expanded, dtype=np.int64),
        completions=tuple(
            Completion(
                token_ids=rng.choice(words, size=length).astype(np.int64),
                sampler_logprobs=rng.normal(-5.5, 0.3, size=length).astype(np.float32),
                text="",
                finish="length",
            )
            for length in lengths
        ),
        version=0,
    )


def scored(group: Group, rewards: Sequence[float]) -> ScoredGroup:
    return ScoredGroup(group=group, rewards=np.array(rewards), parts={}, valid=np.ones(len(rewards), dtype=np.bool_))


def row_of(group: Group, *, groups_in_step: int = 1) -> Pack:
    """Return a packed sample whose answers have the advantages 1, -2, 3, ..."""
    advantages = np.array([(-1.0) ** k * (k + 1) for k in range(len(group.completions))])
    return pack(scored(group, [0.0] * len(group.completions)), advantages, groups_in_step)


def sent_weights(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the weights that a learner pushes if everything is trained."""
    return [(name, parameter.detach()) for name, parameter in network.named_parameters()]


def give(engine: RolloutEngine, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
    """Push these weights in one bucket."""
    engine.begin_push()
    engine.load_weights(weights)
    engine.finish_push(version, buckets=1)


def worker_of(engine: Any) -> Any:
    """Return the vLLM worker of an engine that has one worker, in this process."""
    [worker] = engine.engine.collective_rpc(lambda worker: worker)
    return worker


def fresh_policy(family: Family, temperature: float = 1.0) -> Policy:
    return Policy(family.load_network(torch.float32), family, temperature, logit_rows=64).eval()


def distributions(policy: Policy, batch: MicroBatch) -> Tensor:
    """Return logprobs (M, V) of the whole vocabulary at every answer token's position."""
    vocabulary = len(policy.family.output_weight(policy.network))
    logprobs: Tensor = policy(batch, candidates=torch.arange(vocabulary).expand(len(batch.targets), -1))
    return logprobs


def batch_of(packs: Sequence[Pack], family: Family, attention: str = "auto") -> MicroBatch:
    cpu = torch.device("cpu")
    return collate(packs, family, attention_for(attention, cpu), cpu)


def learner_gap(policy: Policy, family: Family, group: Group) -> NDArray[np.float32]:
    """Return |sampler - learner| logprob of each sampled token, in nats."""
    row = row_of(group)
    with torch.no_grad():
        logprobs, _ = policy(batch_of([row], family))
    policy_logprobs = logprobs[: int((row.segments > 0).sum())].numpy()
    gap: NDArray[np.float32] = np.abs(policy_logprobs - row.sampler_logprobs[row.segments > 0])
    return gap


def always_says(policy: Policy, family: Family, prompt: Prompt, token_id: int) -> Policy:
    """Return a copy whose head gives `token_id` a logit of 60, far above others, at the first answer token."""
    forced = copy.deepcopy(policy)
    row = row_of(group_of(family, prompt, [1], seed=0))
    with torch.no_grad():
        batch = batch_of([row], family)
        [hidden] = forced.predicting_states(batch, forced(batch, wanted="features"))[:1]
        head = forced.network.get_parameter("lm_head.weight")
        head[token_id] = 60.0 * hidden / hidden.dot(hidden)
    return forced


MIXED = (
    ask("one image", picture(84, 84, 0)),
    ask("no image"),
    ask("two images", picture(56, 112, 1), picture(300, 40, 2)),
    ask("too large", picture(500, 400, 3)),
    ask("too small", picture(20, 20, 4)),
)

"""The records that flow between the rooms: one frozen type per stage, standard library and numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat turn; its images (the next `images` ones of the prompt) stand before its text."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question as the data room makes it; images stay PNG or JPEG bytes until an engine needs pixels."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    answer: str
    task: str
    thought: str = ""  # the data set's own reasoning, where it has any: supervised training imitates it


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer: exactly the sampled ids (the end token included) and their logprobs under the sampler.

    `text` is what is graded: what the chat template opened of the answer (none of the ids), then the ids decoded.
    """

    token_ids: NDArray[np.int64]
    sampler_logprobs: NDArray[np.float32]
    text: str
    finish: Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All answers to one prompt, the prompt as the engine expanded it, and the weights version that sampled them."""

    prompt: Prompt
    prompt_token_ids: NDArray[np.int64]
    completions: tuple[Completion, ...]
    version: int
    image_encodes: int = 0  # images that the engine's vision tower saw from the group before to this one


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its rewards; `parts` has each by name, all of length G; `valid` is False where scoring failed.

    `graded` says how many answers each layer of grading decided: rules, symbolic; how many it gave up: timeout, crash;
    how many stated none: untagged.
    """

    group: Group
    rewards: NDArray[np.float64]
    parts: Mapping[str, NDArray[np.float64]]
    valid: NDArray[np.bool_]
    graded: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """One shared-prefix row `[prompt | answer 1 | ... | answer G]` of L tokens; its positions follow from its pixels.

    `segments` is 0 on the prompt and k on answer k. `loss_weights` is the share of each token in the whole step's loss
    (0 on the prompt), so that the loss of a step is a plain sum over tokens, micro-batches and ranks.
    """

    prompt_id: str
    images: tuple[bytes, ...]
    token_ids: NDArray[np.int64]
    segments: NDArray[np.int32]
    loss_weights: NDArray[np.float64]
    sampler_logprobs: NDArray[np.float32]
    advantages: NDArray[np.float64]

    @property
    def prompt_len(self) -> int:
        return int((self.segments == 0).sum())

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """What one learner update measured, already reduced over ranks; means are over answer tokens (each token once).

    `ratio_raw_*` compare the policy with the sampler; all that is truncated, used or of a sequence compares the policy
    before the first optimiser step with it. Sequence means are over answers.
    """

    loss: float  # with several optimizer steps, the mean of their losses
    kl_mean: float
    ratio_raw_mean: float
    ratio_raw_max: float
    ratio_clip_frac: float
    ratio_used_mean: float  # what gains were multiplied by: 1 where nothing is corrected, 0 where masked
    ratio_truncated_mean: float
    ratio_truncated_frac: float  # tokens above the cap
    ratio_masked_frac: float  # tokens whose gain the correction dropped
    ratio_sequence_raw_mean: float
    ratio_sequence_truncated_mean: float
    ratio_sequence_truncated_frac: float
    entropy: float
    logp_gap_mean: float
    logp_gap_max: float
    grad_norm: float  # before clipping; the mean over the optimizer steps that were made, inf where none was
    lr: float
    tokens: int
    vision_encodes: int
    reference_passes: int
    skipped: int = 0  # optimiser steps not made, because loss or gradient was not finite
    bad_prompts: tuple[str, ...] = ()  # whose loss was not finite; of one rank its own


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelDigest:
    """A checksum of a prompt's images as they go into the vision tower; they may be normalised inside it, or before."""

    value: int = 0  # of no image
    dtype: str = "uint8"  # uint8: before they are normalised


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One sampled answer with the K likeliest tokens at each of its T places: what an audit compares."""

    group: Group
    candidates: NDArray[np.int64]  # (T, K)
    logprobs: NDArray[np.float32]  # (T, K)
    pixels: PixelDigest = PixelDigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The engines' logprobs against the learner's on the probe tokens, right after a push."""

    version: int
    gap_mean: float
    gap_max: float
    tokens: int
    logp_mean: float = 0.0  # of |logprob|, as the learner has it
    tolerance: float = 0.0  # of gap_mean
    verified: int = 0  # weights that each engine was seen to hold to the bit
    sent_bytes: int = 0  # of weights, to each engine


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run stands, beside the weights and the optimiser: enough to go on as if it had never stopped."""

    step: int
    data_position: int
    schedule_state: Mapping[str, float]
    seed: int
    before: Mapping[str, Mapping[str, Any]]  # the evaluations of the untrained model, by data set
    accuracy: float | None = None  # on held-out questions after this step, where they were asked

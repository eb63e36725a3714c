"""Frozen records passed between packages, one per pipeline stage; standard library and numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat turn. Its images, the next `images` of the prompt, precede its text."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question of a data set. Images stay encoded (PNG or JPEG bytes) until an engine needs pixels."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    answer: str
    task: str
    thought: str = ""  # reasoning from the data set, if it has any: a target of supervised training


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer of T tokens: the sampled ids (T,), end token included, and their sampler logprobs (T,).

    `text` is graded: the start of the answer that the chat template writes (not in the ids), then the decoded ids.
    """

    token_ids: NDArray[np.int64]
    sampler_logprobs: NDArray[np.float32]
    text: str
    finish: Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All G answers to one prompt, its ids with expanded image tokens, and the version of the weights that sampled."""

    prompt: Prompt
    prompt_token_ids: NDArray[np.int64]
    completions: tuple[Completion, ...]
    version: int
    image_encodes: int = 0  # images encoded by the engine's vision tower since its previous group


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with its total rewards, their `parts` by reward name, and `valid`, False where scoring failed; all (G,).

    `graded` counts answers by how they were graded: decided (rules, symbolic), given up (timeout, crash) or without an
    answer tag (untagged).
    """

    group: Group
    rewards: NDArray[np.float64]
    parts: Mapping[str, NDArray[np.float64]]
    valid: NDArray[np.bool_]
    graded: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """One packed sample `[prompt | answer 1 | ... | answer G]` with a shared prefix; all arrays are (L,).

    Position ids are not stored: they follow from the images. `segments` holds segment ids, 0 on the prompt and k on
    answer k. `loss_weights` is each token's share of the loss of its optimizer step (0 on the prompt), so that this
    loss is a plain sum over tokens, micro-batches and ranks.
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
class UpdateSettings:
    """Settings of one update, equal on all ranks."""

    beta: float  # KL weight
    lr: float
    loss: str  # a key of core.losses.LOSSES
    tis: str  # importance sampling of off-policy answers, a key of core.losses.TIS_MODES


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRequest:
    """One update of the learner: `updates` optimizer steps, each over whole groups of the packed samples, in order."""

    packs: Sequence[Pack]
    updates: int
    settings: UpdateSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """Statistics of one learner update, reduced over ranks; means are over answer tokens, each counted once.

    `ratio_raw_*` compare the current policy with the sampler; all `used`, `truncated` and `sequence` ratios compare the
    policy before the first optimizer step with the sampler. Sequence means are over answers.
    """

    loss: float  # with several optimizer steps, the mean of their losses
    kl_mean: float
    ratio_raw_mean: float
    ratio_raw_max: float
    ratio_clip_frac: float
    ratio_used_mean: float  # the applied importance weight: 1 with tis=none, 0 where masked
    ratio_truncated_mean: float
    ratio_truncated_frac: float  # fraction of tokens above the cap
    ratio_masked_frac: float  # fraction of tokens masked by importance sampling
    ratio_sequence_raw_mean: float
    ratio_sequence_truncated_mean: float
    ratio_sequence_truncated_frac: float
    entropy: float
    logp_gap_mean: float
    logp_gap_max: float
    grad_norm: float  # before clipping; mean over the optimizer steps taken, inf if none was
    lr: float
    tokens: int
    vision_encodes: int
    reference_passes: int
    skipped: int = 0  # optimizer steps skipped because the loss or gradient was not finite
    bad_prompts: tuple[str, ...] = ()  # prompts with a non-finite loss; per rank, not reduced


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelDigest:
    """Checksum of the pixels that an engine feeds to the vision tower; some engines normalize them only inside it."""

    value: int = 0  # 0: no images
    dtype: str = "uint8"  # uint8: not normalized yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One sampled answer of T tokens with the K likeliest tokens at each index: the input of an audit."""

    group: Group
    candidates: NDArray[np.int64]  # (T, K)
    logprobs: NDArray[np.float32]  # (T, K)
    pixels: PixelDigest = PixelDigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Comparison of the engines' logprobs with the learner's on the probe tokens, right after a push; gaps in nats."""

    version: int
    gap_mean: float
    gap_max: float
    tokens: int
    logp_mean: float = 0.0  # mean of the learner's |logprob|
    tolerance: float = 0.0  # upper limit of gap_mean
    verified: int = 0  # number of weights verified bit for bit in each engine
    sent_bytes: int = 0  # bytes of weights sent to each engine


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Progress of a run besides weights and optimizer state: with them, enough to resume as if never interrupted."""

    step: int
    data_position: int
    schedule_state: Mapping[str, float]
    seed: int
    before: Mapping[str, Mapping[str, Any]]  # evaluations of the untrained model, by data set
    accuracy: float | None = None  # on held-out questions after this step, if evaluated

"""Packed sequences: prompts with their answers (packed samples) back to back, without padding.

Each packed sample is [prompt | answer 1 | ... | answer k]: its answers share one copy of the prompt. The functions here
return positions, visibility and the index that predicts each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSequence:
    """Packed samples of N tokens in total, described per token; the tokens themselves are kept elsewhere."""

    sample_ids: torch.Tensor  # (N,) index of the token's packed sample, from 0 in order
    segment_ids: torch.Tensor  # (N,) segment id: 0 in the prompt, k in answer k of the sample

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, kept: torch.Tensor) -> PackedSequence:
        """Return the packed sequence of the tokens where the mask `kept` (N,) is True."""
        return PackedSequence(sample_ids=self.sample_ids[kept], segment_ids=self.segment_ids[kept])

    @property
    def is_answer(self) -> torch.Tensor:
        return self.segment_ids > 0


def build_packed_sequence(segments: Sequence[NDArray[np.int32]]) -> PackedSequence:
    """Build a packed sequence from the segment ids of each packed sample; each sample starts with its prompt."""
    assert all(len(ids) and ids[0] == 0 for ids in segments)
    lengths = torch.tensor([len(ids) for ids in segments])
    return PackedSequence(
        sample_ids=torch.arange(len(segments)).repeat_interleave(lengths),
        segment_ids=torch.from_numpy(np.concatenate(segments)).long(),
    )


def visibility(sequence: PackedSequence) -> torch.Tensor:
    """Return a mask (N, N), True where token i attends to token j: its sample's prompt and its own answer, up to i."""
    query, key = sequence.segment_ids[:, None], sequence.segment_ids[None, :]
    same_sample = sequence.sample_ids[:, None] == sequence.sample_ids[None, :]
    return (same_sample & ((key == 0) | (key == query))).tril()


def visible_spans(sequence: PackedSequence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `visibility` as spans, three tensors (N,): start and end of the token's prompt, start of its segment.

    A token attends to the tokens between the first two, and from the third up to itself, but to nothing after itself.
    """
    indices, starts = torch.arange(len(sequence)), _starts(sequence)
    prompt = torch.where(starts & ~sequence.is_answer, indices, 0).cummax(0).values
    segment = torch.where(starts, indices, 0).cummax(0).values
    return prompt, prompt + sequence.sample_ids[~sequence.is_answer].bincount()[sequence.sample_ids], segment


def predictors(sequence: PackedSequence) -> torch.Tensor:
    """Return, for each answer token in order, the index of the token whose hidden state predicts it.

    This is the previous token of the same answer, or the last prompt token for an answer's first token.
    """
    indices = torch.arange(len(sequence))
    last_prompt = torch.where(sequence.segment_ids == 0, indices, 0).cummax(0).values
    return torch.where(_starts(sequence), last_prompt, indices - 1)[sequence.is_answer]


def predicting(sequence: PackedSequence) -> torch.Tensor:
    """Return a mask (N,), False on each answer's last token: it predicts nothing, so the network can skip it."""
    lasts = _starts(sequence).roll(-1)  # the first token of the sequence is a start, hence its last token an end
    return ~(lasts & sequence.is_answer)


def offsets(sequence: PackedSequence) -> torch.Tensor:
    """Return (N,) the offset of each answer token from the end of its prompt (0 for the first); 0 on prompts."""
    indices = torch.arange(len(sequence))
    segment_start = torch.where(_starts(sequence), indices, 0).cummax(0).values
    return torch.where(sequence.is_answer, indices - segment_start, 0)


def answer_index(sequence: PackedSequence) -> torch.Tensor:
    """Return the answer index of each answer token; non-empty answers count from 0 over the whole sequence."""
    return _starts(sequence)[sequence.is_answer].cumsum(0) - 1


def segment_spans(sequence: PackedSequence) -> list[tuple[int, int, bool]]:
    """Return (start, end, is answer) of each prompt and each non-empty answer, in order."""
    starts = _starts(sequence).nonzero().squeeze(1)
    ends = [*starts[1:].tolist(), len(sequence)]
    return list(zip(starts.tolist(), ends, sequence.is_answer[starts].tolist(), strict=True))


def _starts(sequence: PackedSequence) -> torch.Tensor:
    """Return a mask (N,), True on the first token of each segment."""
    starts = torch.ones(len(sequence), dtype=torch.bool)
    sample_ids, segment_ids = sequence.sample_ids, sequence.segment_ids
    starts[1:] = (segment_ids[1:] != segment_ids[:-1]) | (sample_ids[1:] != sample_ids[:-1])
    return starts


def blank_inactive(values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Set inactive tokens to 0; do this before any exp, since 0 * inf is NaN, and so is its gradient."""
    return torch.where(active, values, torch.zeros_like(values))


def sums_by_answer(values: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Sum values over each answer's tokens, indexed by the answer index in `answers`; 0 where there is no such answer.

    The result is as long as the number of tokens: enough for any number of answers, without reading the data.
    """
    flat = values.flatten()
    return torch.zeros_like(flat).index_add(0, answers.flatten(), flat)

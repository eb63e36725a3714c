"""Shared-prefix rows back to back, without padding: where a token stands, what it sees, what predicts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSequence:
    """The row of each of the N tokens, counted from 0 along the line, and its segment: 0 the prompt, k answer k."""

    rows: torch.Tensor
    segments: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, kept: torch.Tensor) -> PackedSequence:
        """The tokens of a mask (N,) alone."""
        return PackedSequence(rows=self.rows[kept], segments=self.segments[kept])

    @property
    def is_answer(self) -> torch.Tensor:
        return self.segments > 0


def build_packed_sequence(segments: Sequence[NDArray[np.int32]]) -> PackedSequence:
    """The segments of each row, a prompt first."""
    assert all(len(own) and own[0] == 0 for own in segments)
    lengths = torch.tensor([len(own) for own in segments])
    return PackedSequence(
        rows=torch.arange(len(segments)).repeat_interleave(lengths),
        segments=torch.from_numpy(np.concatenate(segments)).long(),
    )


def visibility(line: PackedSequence) -> torch.Tensor:
    """(N, N), True where token i sees token j: the prompt of i's row and i's own answer, up to i."""
    viewer, seen = line.segments[:, None], line.segments[None, :]
    same_row = line.rows[:, None] == line.rows[None, :]
    return (same_row & ((seen == 0) | (seen == viewer))).tril()


def seen_spans(line: PackedSequence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`visibility` as spans, (N,) three times: where a token's prompt starts and ends, and where its segment starts.

    It sees what lies between the first two, and from the third to itself, but nothing after itself.
    """
    places, starts = torch.arange(len(line)), _starts(line)
    prompt = torch.where(starts & ~line.is_answer, places, 0).cummax(0).values
    own = torch.where(starts, places, 0).cummax(0).values
    return prompt, prompt + line.rows[~line.is_answer].bincount()[line.rows], own


def predictors(line: PackedSequence) -> torch.Tensor:
    """Place of the token whose hidden state predicts each answer token, in the order of the answer tokens.

    It is the token before in the same answer, or the last prompt token for an answer's first one.
    """
    places = torch.arange(len(line))
    last_prompt = torch.where(line.segments == 0, places, 0).cummax(0).values
    return torch.where(_starts(line), last_prompt, places - 1)[line.is_answer]


def predicting(line: PackedSequence) -> torch.Tensor:
    """(N,): False on the last token of each answer, which nothing comes after: no network needs to read it."""
    lasts = _starts(line).roll(-1)  # the line's first token is a start, and so its last one an end
    return ~(lasts & line.is_answer)


def offsets(line: PackedSequence) -> torch.Tensor:
    """(N,): how far past the prompt's end an answer token stands (its first has 0); 0 on prompts."""
    places = torch.arange(len(line))
    own_start = torch.where(_starts(line), places, 0).cummax(0).values
    return torch.where(line.is_answer, places - own_start, 0)


def answer_index(line: PackedSequence) -> torch.Tensor:
    """The answer of each answer token, in order; answers count from 0 along the line, empty ones left out."""
    return _starts(line)[line.is_answer].cumsum(0) - 1


def stretches(line: PackedSequence) -> list[tuple[int, int, bool]]:
    """Start and end of each prompt and each answer, in order, and whether it is an answer."""
    starts = _starts(line).nonzero().squeeze(1)
    ends = [*starts[1:].tolist(), len(line)]
    return list(zip(starts.tolist(), ends, line.is_answer[starts].tolist(), strict=True))


def _starts(line: PackedSequence) -> torch.Tensor:
    """(N,): True on the first token of each segment."""
    starts = torch.ones(len(line), dtype=torch.bool)
    starts[1:] = (line.segments[1:] != line.segments[:-1]) | (line.rows[1:] != line.rows[:-1])
    return starts


def blank_inactive(values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """0 where a token is inactive: chosen before any exp, since 0 * inf is NaN and so is its gradient."""
    return torch.where(active, values, torch.zeros_like(values))


def sums_by_answer(values: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """The sum over each answer's tokens, by its number in `answers`; 0 where there is no such answer.

    As many places as tokens are enough for any number of answers, and need no look at the data.
    """
    flat = values.flatten()
    return torch.zeros_like(flat).index_add(0, answers.flatten(), flat)

"""Groups become shared-prefix rows; rows become balanced micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from othink_ray.types import Pack, ScoredGroup

PADDING = -1  # segment of a padding token


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What one optimiser step's loss is shared among; counted before any backward, so that shares add up anywhere."""

    groups: int
    tokens: int  # of all valid answers
    max_tokens: int  # that an answer can have


# (lengths, valid) of one group's answers, (G,) each -> weight of each token of each answer (G,); 0 where not valid
LossWeights = Callable[[NDArray[np.int64], NDArray[np.bool_], Totals], NDArray[np.float64]]


def answer_mean(lengths: NDArray[np.int64], valid: NDArray[np.bool_], totals: Totals) -> NDArray[np.float64]:
    """Eq. 4: token mean in each answer, mean over the valid answers of a group, mean over groups.

    An empty answer has no token to weigh, but counts among the valid ones: its token mean is 0.
    """
    weights: NDArray[np.float64] = valid / (totals.groups * max(int(valid.sum()), 1) * np.maximum(lengths, 1))
    return weights


def token_mean(lengths: NDArray[np.int64], valid: NDArray[np.bool_], totals: Totals) -> NDArray[np.float64]:
    """DAPO: every token of the optimiser step weighs the same, so that long answers count for more."""
    return valid.astype(np.float64) / max(totals.tokens, 1)


def constant_length(lengths: NDArray[np.int64], valid: NDArray[np.bool_], totals: Totals) -> NDArray[np.float64]:
    """Dr. GRPO: token sum of each answer over the longest possible length, then the means over group and groups."""
    return valid.astype(np.float64) / (totals.groups * max(int(valid.sum()), 1) * totals.max_tokens)


LOSS_WEIGHTS: dict[str, LossWeights] = {
    "answer_mean": answer_mean,
    "token_mean": token_mean,
    "constant_length": constant_length,
}


def pack_step(
    scored: Sequence[ScoredGroup],
    advantages: Sequence[NDArray[np.float64]],
    *,
    updates: int,
    loss_weights: LossWeights,
    max_tokens: int,
) -> list[Pack]:
    """The rows of a step, one a group; each of its `updates` optimiser steps is a loss of its own, with its totals."""
    rows: list[Pack] = []
    for own in _mini_batches(len(scored), updates):
        tokens = sum(int(_lengths(scored[i])[scored[i].valid].sum()) for i in own)
        totals = Totals(groups=len(own), tokens=tokens, max_tokens=max_tokens)
        for i in own:
            weights = loss_weights(_lengths(scored[i]), scored[i].valid, totals)
            rows.append(_row(scored[i], advantages[i], weights))
    return rows


def pack(scored: ScoredGroup, advantages: NDArray[np.float64], groups_in_step: int) -> Pack:
    """One row alone, weighed by `answer_mean`, which needs to know no other group."""
    lengths = _lengths(scored)
    totals = Totals(groups=groups_in_step, tokens=int(lengths.sum()), max_tokens=int(lengths.max(initial=1)))
    return _row(scored, advantages, answer_mean(lengths, scored.valid, totals))


def _lengths(scored: ScoredGroup) -> NDArray[np.int64]:
    return np.array([len(completion.token_ids) for completion in scored.group.completions], dtype=np.int64)


def _row(scored: ScoredGroup, advantages: NDArray[np.float64], token_weights: NDArray[np.float64]) -> Pack:
    """The row `[prompt | answer 1 | ... | answer G]`; advantages and token weights are one an answer, (G,)."""
    group, prompt_len, lengths = scored.group, len(scored.group.prompt_token_ids), _lengths(scored)
    assert prompt_len > 0
    assert len(advantages) == len(token_weights) == len(scored.valid) == len(group.completions)
    answers = np.arange(1, len(lengths) + 1, dtype=np.int32)
    sampler_logprobs = [completion.sampler_logprobs for completion in group.completions]
    assert [len(row) for row in sampler_logprobs] == lengths.tolist()
    return Pack(
        prompt_id=group.prompt.id,
        images=group.prompt.images,
        token_ids=np.concatenate([group.prompt_token_ids, *(c.token_ids for c in group.completions)], dtype=np.int64),
        segments=np.concatenate([np.zeros(prompt_len, np.int32), answers.repeat(lengths)]),
        loss_weights=np.concatenate([np.zeros(prompt_len), token_weights.repeat(lengths)]),
        sampler_logprobs=np.concatenate([np.zeros(prompt_len, np.float32), *sampler_logprobs], dtype=np.float32),
        advantages=np.concatenate([np.zeros(prompt_len), np.asarray(advantages, np.float64).repeat(lengths)]),
    )


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """(B, L) segments -> (B, 1, L, L), True where token i sees token j: the prompt and i's own answer, up to i.

    A padding token sees itself alone, so that no softmax is over nothing.
    """
    length = segments.shape[1]
    viewer, seen = segments[:, :, None], segments[:, None, :]
    before = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = before & ((seen == 0) | (seen == viewer)) & (viewer != PADDING)
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    return (allowed | itself)[:, None]


def predictor_index(segments: torch.Tensor) -> torch.Tensor:
    """(B, L) segments -> (B, L): the token whose hidden state predicts each answer token; 0 on prompt and padding.

    It is the token before in the same answer, or the last prompt token for an answer's first one.
    """
    columns = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    last_prompt = torch.where(segments == 0, columns, 0).amax(dim=1, keepdim=True)
    predictor = torch.where(_starts(segments), last_prompt, columns - 1)
    return torch.where(segments > 0, predictor, 0)


def position_offsets(segments: torch.Tensor) -> torch.Tensor:
    """(B, L) segments -> (B, L): how far past the prompt's end an answer token stands (its first has 0); else 0."""
    columns = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    own_start = torch.where(_starts(segments), columns, 0).cummax(dim=1).values
    return torch.where(segments > 0, columns - own_start, 0)


def answer_index(segments: torch.Tensor) -> torch.Tensor:
    """(B, L) segments -> (N,): the answer of each answer token, in row order; answers count from 0 over all rows."""
    return _starts(segments)[segments > 0].cumsum(0) - 1


def _starts(segments: torch.Tensor) -> torch.Tensor:
    """(B, L): True on the first token of each segment."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return starts


def plan(packs: Sequence[Pack], *, ranks: int, updates: int, micro_tokens: int) -> list[list[list[list[int]]]]:
    """Rows by [update][rank][micro-batch]: mini-batches in order, ranks balanced by tokens, padding within budget.

    All ranks of an update get the same number of micro-batches (sharded weights need the same collectives on each); an
    empty one stands for a row of weight 0. A row longer than `micro_tokens` gets a micro-batch to itself.
    """
    assert ranks > 0 and updates > 0 and micro_tokens > 0
    if updates > len(packs):
        raise ValueError(
            f"algo.updates_per_step = {updates} but the step has {len(packs)} groups: each optimiser step needs "
            f"at least one; lower it, or raise train.prompts_per_step"
        )
    lengths = [len(row) for row in packs]
    return [_plan_update(rows, lengths, ranks, micro_tokens) for rows in _mini_batches(len(packs), updates)]


def _mini_batches(groups: int, updates: int) -> list[list[int]]:
    """The groups of each optimiser step, in order."""
    return [rows.tolist() for rows in np.array_split(np.arange(groups), updates)]


def _plan_update(rows: list[int], lengths: list[int], ranks: int, micro_tokens: int) -> list[list[list[int]]]:
    """One mini-batch by [rank][micro-batch]: the longest row left goes to the rank with the fewest tokens."""
    by_rank: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for row in sorted(rows, key=lambda row: -lengths[row]):
        rank = load.index(min(load))
        by_rank[rank].append(row)
        load[rank] += lengths[row]
    micro_batches = [_micro_batches(own, lengths, micro_tokens) for own in by_rank]
    most = max(len(own) for own in micro_batches)
    return [own + [[] for _ in range(most - len(own))] for own in micro_batches]


def _micro_batches(rows: list[int], lengths: list[int], micro_tokens: int) -> list[list[int]]:
    """Fewest micro-batches within the padded budget; rows come longest first: a batch's first sets its width."""
    batches: list[list[int]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= micro_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches

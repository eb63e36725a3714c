"""Groups become shared-prefix rows; rows become balanced micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from othink_ray.types import Pack, ScoredGroup

PADDING = -1  # segment of a padding token


def pack(scored: ScoredGroup, advantages: NDArray[np.float64], groups_in_step: int) -> Pack:
    """The row `[prompt | answer 1 | ... | answer G]`, with Eq. 4's means as the loss weight of each token.

    A token of a valid answer weighs 1 / (groups_in_step * valid answers * answer length); all else weighs 0. An empty
    answer has no token to weigh, but counts among the valid ones: its token mean is 0.
    """
    group, prompt_len = scored.group, len(scored.group.prompt_token_ids)
    assert prompt_len > 0 and groups_in_step > 0
    assert len(advantages) == len(scored.valid) == len(group.completions)
    lengths = np.array([len(completion.token_ids) for completion in group.completions], dtype=np.int64)
    per_answer = scored.valid / (groups_in_step * max(int(scored.valid.sum()), 1) * np.maximum(lengths, 1))
    answers = np.arange(1, len(lengths) + 1, dtype=np.int32)
    sampler_logprobs = [completion.sampler_logprobs for completion in group.completions]
    assert [len(row) for row in sampler_logprobs] == lengths.tolist()
    return Pack(
        prompt_id=group.prompt.id,
        images=group.prompt.images,
        token_ids=np.concatenate([group.prompt_token_ids, *(c.token_ids for c in group.completions)], dtype=np.int64),
        segments=np.concatenate([np.zeros(prompt_len, np.int32), answers.repeat(lengths)]),
        loss_weights=np.concatenate([np.zeros(prompt_len), per_answer.repeat(lengths)]),
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
    mini_batches = np.array_split(np.arange(len(packs)), updates)
    return [_plan_update(rows.tolist(), lengths, ranks, micro_tokens) for rows in mini_batches]


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

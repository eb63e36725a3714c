"""Groups become shared-prefix rows; rows become balanced micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
from numpy.typing import NDArray

from othink_ray.types import Pack, ScoredGroup


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
    shared_prefix: bool,
) -> list[Pack]:
    """The rows of a step, one a group; each of its `updates` optimiser steps is a loss of its own, with its totals.

    Without a shared prefix it is one row an answer, each with its own copy of the prompt: the same loss, more slowly.
    """
    ids = [one.group.prompt.id for one in scored]
    assert len(set(ids)) == len(ids), f"two groups of a step have one prompt id, by which they are split: {ids}"
    rows: list[Pack] = []
    for own in _mini_batches(len(scored), updates):
        tokens = sum(int(_lengths(scored[i])[scored[i].valid].sum()) for i in own)
        totals = Totals(groups=len(own), tokens=tokens, max_tokens=max_tokens)
        for i in own:
            weights = loss_weights(_lengths(scored[i]), scored[i].valid, totals)
            answers = np.arange(len(weights))
            together = [answers] if shared_prefix else list(answers[:, None])
            rows += [_row(scored[i], advantages[i], weights, own) for own in together]
    return rows


def pack(scored: ScoredGroup, advantages: NDArray[np.float64], groups_in_step: int) -> Pack:
    """One row alone, weighed by `answer_mean`, which needs to know no other group."""
    lengths = _lengths(scored)
    totals = Totals(groups=groups_in_step, tokens=int(lengths.sum()), max_tokens=int(lengths.max(initial=1)))
    return _row(scored, advantages, answer_mean(lengths, scored.valid, totals), np.arange(len(lengths)))


def _lengths(scored: ScoredGroup) -> NDArray[np.int64]:
    return np.array([len(completion.token_ids) for completion in scored.group.completions])


def _row(
    scored: ScoredGroup,
    advantages: NDArray[np.float64],
    token_weights: NDArray[np.float64],
    answers: NDArray[np.int64],
) -> Pack:
    """The row `[prompt | answer | ... | answer]` of some of a group's answers; advantages and weights are of all G."""
    group = scored.group
    prompt_len, lengths = len(group.prompt_token_ids), _lengths(scored)
    assert prompt_len > 0
    assert len(advantages) == len(token_weights) == len(scored.valid) == len(lengths)
    completions = [group.completions[answer] for answer in answers]
    assert all(len(own.sampler_logprobs) == len(own.token_ids) for own in completions)
    own_lengths = lengths[answers]
    segments = np.arange(1, len(answers) + 1, dtype=np.int32).repeat(own_lengths)
    nothing = np.zeros(prompt_len)
    return Pack(
        prompt_id=group.prompt.id,
        images=group.prompt.images,
        token_ids=np.concatenate([group.prompt_token_ids, *(own.token_ids for own in completions)], dtype=np.int64),
        segments=np.concatenate([np.zeros(prompt_len, np.int32), segments]),
        loss_weights=np.concatenate([nothing, token_weights[answers].repeat(own_lengths)]),
        sampler_logprobs=np.concatenate([nothing, *(own.sampler_logprobs for own in completions)], dtype=np.float32),
        advantages=np.concatenate([nothing, np.asarray(advantages, np.float64)[answers].repeat(own_lengths)]),
    )


def plan(packs: Sequence[Pack], *, ranks: int, updates: int, micro_tokens: int) -> list[list[list[list[int]]]]:
    """Rows by [update][rank][micro-batch]: mini-batches of whole groups in order, ranks and micro-batches balanced.

    All ranks of an update get the same number of micro-batches (sharded weights need the same collectives on each); an
    empty one stands for a row of weight 0. A row longer than `micro_tokens` gets a micro-batch to itself.
    """
    assert ranks > 0 and updates > 0 and micro_tokens > 0
    groups = [list(rows) for _, rows in groupby(range(len(packs)), key=lambda row: packs[row].prompt_id)]
    if updates > len(groups):
        raise ValueError(
            f"algo.updates_per_step = {updates} but the step has {len(groups)} groups: each optimiser step needs "
            f"at least one; lower it, or raise train.prompts_per_step"
        )
    lengths = [len(row) for row in packs]
    by_update = [list(chain(*(groups[i] for i in own))) for own in _mini_batches(len(groups), updates)]
    return [_plan_update(rows, lengths, ranks, micro_tokens) for rows in by_update]


def _mini_batches(groups: int, updates: int) -> list[list[int]]:
    """The groups of each optimiser step, in order."""
    return [rows.tolist() for rows in np.array_split(np.arange(groups), updates)]


def _plan_update(rows: list[int], lengths: list[int], ranks: int, micro_tokens: int) -> list[list[list[int]]]:
    """One mini-batch by [rank][micro-batch]."""
    micro_batches = [_micro_batches(own, lengths, micro_tokens) for own in _spread(rows, lengths, ranks)]
    most = max(len(own) for own in micro_batches)
    return [own + [[] for _ in range(most - len(own))] for own in micro_batches]


def _micro_batches(rows: list[int], lengths: list[int], micro_tokens: int) -> list[list[int]]:
    """As few as the budget allows, of about equal size; none for no rows."""
    tokens = sum(lengths[row] for row in rows)
    for count in range(max(1, -(-tokens // micro_tokens)), len(rows)):
        spread = _spread(rows, lengths, count)
        if all(len(own) == 1 or sum(lengths[row] for row in own) <= micro_tokens for own in spread):
            return spread
    return [[row] for row in rows]


def _spread(rows: list[int], lengths: list[int], parts: int) -> list[list[int]]:
    """The longest row left goes to the part with the fewest tokens."""
    spread: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for row in sorted(rows, key=lambda row: -lengths[row]):
        part = load.index(min(load))
        spread[part].append(row)
        load[part] += lengths[row]
    return spread

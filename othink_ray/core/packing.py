"""Packing: groups become shared-prefix packed samples with token weights, samples become balanced micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
from numpy.typing import NDArray

from othink_ray.types import Group, Pack, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Denominators of one optimizer step's loss, counted over the whole step.

    So the loss does not depend on how the step is split into micro-batches and ranks.
    """

    groups: int
    tokens: int  # of all valid answers
    max_tokens: int  # longest possible answer


# (lengths, valid) of one group's answers, (G,) each -> weight (G,) that all tokens of an answer share; 0 where invalid
LossWeights = Callable[[NDArray[np.int64], NDArray[np.bool_], Denominators], NDArray[np.float64]]


def answer_mean(lengths: NDArray[np.int64], valid: NDArray[np.bool_], totals: Denominators) -> NDArray[np.float64]:
    """Weigh tokens as Eq. 4: mean over each answer's tokens, over the valid answers of a group, over groups.

    An empty answer has no tokens but counts among the valid ones: its token mean is 0.
    """
    weights: NDArray[np.float64] = valid / (totals.groups * max(int(valid.sum()), 1) * np.maximum(lengths, 1))
    return weights


def token_mean(lengths: NDArray[np.int64], valid: NDArray[np.bool_], totals: Denominators) -> NDArray[np.float64]:
    """Weigh all tokens of the optimizer step equally (DAPO), so that long answers count for more."""
    return valid.astype(np.float64) / max(totals.tokens, 1)


def constant_length(lengths: NDArray[np.int64], valid: NDArray[np.bool_], totals: Denominators) -> NDArray[np.float64]:
    """Weigh tokens as Dr. GRPO: an answer's token sum / longest possible length, then means over answers and groups."""
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
    """Return a step's packed samples, one per group; each of the `updates` optimizer steps has its own denominators.

    Without `shared_prefix`, return one sample per answer, each with a copy of the prompt: the same loss, but slower.
    """
    ids = [group.group.prompt.id for group in scored]
    assert len(set(ids)) == len(ids), f"prompt ids of a step must be unique (mini-batches are split by them): {ids}"
    samples: list[Pack] = []
    for members in _mini_batches(len(scored), updates):
        tokens = sum(int(_lengths(scored[i].group)[scored[i].valid].sum()) for i in members)
        totals = Denominators(groups=len(members), tokens=tokens, max_tokens=max_tokens)
        for i in members:
            weights = _token_weights(scored[i], loss_weights, totals)
            answers = np.arange(len(weights))
            parts = [answers] if shared_prefix else list(answers[:, None])
            samples += [_packed_sample(scored[i].group, advantages[i], weights, part) for part in parts]
    return samples


def pack(scored: ScoredGroup, advantages: NDArray[np.float64], groups_in_step: int) -> Pack:
    """Return one packed sample weighted by `answer_mean`, which depends on no other group of the step."""
    lengths = _lengths(scored.group)
    totals = Denominators(groups=groups_in_step, tokens=int(lengths.sum()), max_tokens=int(lengths.max(initial=1)))
    weights = _token_weights(scored, answer_mean, totals)
    return _packed_sample(scored.group, advantages, weights, np.arange(len(lengths)))


def _token_weights(scored: ScoredGroup, loss_weights: LossWeights, totals: Denominators) -> NDArray[np.float64]:
    """Return one weight per answer of a group (G,), which all tokens of the answer share."""
    lengths = _lengths(scored.group)
    assert len(scored.valid) == len(lengths)
    return loss_weights(lengths, scored.valid, totals)


def pack_demonstrations(groups: Sequence[Group]) -> list[Pack]:
    """Return one packed sample per group of worked answers, weighted by `answer_mean`; advantages are 0."""
    samples = []
    for group in groups:
        lengths = _lengths(group)
        totals = Denominators(groups=len(groups), tokens=int(lengths.sum()), max_tokens=1)
        weights = answer_mean(lengths, np.ones(len(lengths), bool), totals)
        samples.append(_packed_sample(group, np.zeros(len(lengths)), weights, np.arange(len(lengths))))
    return samples


def _lengths(group: Group) -> NDArray[np.int64]:
    return np.array([len(completion.token_ids) for completion in group.completions])


def _packed_sample(
    group: Group,
    advantages: NDArray[np.float64],
    token_weights: NDArray[np.float64],
    answers: NDArray[np.int64],
) -> Pack:
    """Return `[prompt | answer | ... | answer]` for a subset of the answers; advantages and weights cover all G."""
    prompt_len, lengths = len(group.prompt_token_ids), _lengths(group)
    assert prompt_len > 0
    assert len(advantages) == len(token_weights) == len(lengths)
    completions = [group.completions[answer] for answer in answers]
    assert all(len(each.sampler_logprobs) == len(each.token_ids) for each in completions)
    answer_lengths = lengths[answers]
    segments = np.arange(1, len(answers) + 1, dtype=np.int32).repeat(answer_lengths)
    zeros = np.zeros(prompt_len)
    return Pack(
        prompt_id=group.prompt.id,
        images=group.prompt.images,
        token_ids=np.concatenate([group.prompt_token_ids, *(each.token_ids for each in completions)], dtype=np.int64),
        segments=np.concatenate([np.zeros(prompt_len, np.int32), segments]),
        loss_weights=np.concatenate([zeros, token_weights[answers].repeat(answer_lengths)]),
        sampler_logprobs=np.concatenate([zeros, *(each.sampler_logprobs for each in completions)], dtype=np.float32),
        advantages=np.concatenate([zeros, np.asarray(advantages, np.float64)[answers].repeat(answer_lengths)]),
    )


def plan(packs: Sequence[Pack], *, ranks: int, updates: int, micro_tokens: int) -> list[list[list[list[int]]]]:
    """Return indices into `packs` by [update][rank][micro-batch].

    Mini-batches consist of whole groups in order; ranks and micro-batches are balanced by tokens. All ranks of an
    update get the same number of micro-batches, because sharded weights need the same collectives on each rank; an
    empty micro-batch stands for a dummy sample of weight 0. A sample longer than `micro_tokens` gets its own
    micro-batch.
    """
    assert ranks > 0 and updates > 0 and micro_tokens > 0
    groups = [list(indices) for _, indices in groupby(range(len(packs)), key=lambda index: packs[index].prompt_id)]
    if updates > len(groups):
        raise ValueError(
            f"algo.updates_per_step = {updates} but the step has {len(groups)} groups: each optimizer step needs "
            f"at least one; lower it, or raise train.prompts_per_step"
        )
    lengths = [len(sample) for sample in packs]
    by_update = [list(chain(*(groups[i] for i in members))) for members in _mini_batches(len(groups), updates)]
    return [_plan_update(samples, lengths, ranks, micro_tokens) for samples in by_update]


def _mini_batches(groups: int, updates: int) -> list[list[int]]:
    """Return the group indices of each optimizer step, in order."""
    return [indices.tolist() for indices in np.array_split(np.arange(groups), updates)]


def _plan_update(samples: list[int], lengths: list[int], ranks: int, micro_tokens: int) -> list[list[list[int]]]:
    """Return the samples of one mini-batch by [rank][micro-batch]."""
    by_rank = [_micro_batches(shard, lengths, micro_tokens) for shard in _balance(samples, lengths, ranks)]
    most = max(len(micro_batches) for micro_batches in by_rank)
    return [micro_batches + [[] for _ in range(most - len(micro_batches))] for micro_batches in by_rank]


def _micro_batches(samples: list[int], lengths: list[int], micro_tokens: int) -> list[list[int]]:
    """Split samples into as few micro-batches as the token budget allows, of about equal size; none for no samples."""
    tokens = sum(lengths[sample] for sample in samples)
    for count in range(max(1, -(-tokens // micro_tokens)), len(samples)):
        split = _balance(samples, lengths, count)
        if all(len(part) == 1 or sum(lengths[sample] for sample in part) <= micro_tokens for part in split):
            return split
    return [[sample] for sample in samples]


def _balance(samples: list[int], lengths: list[int], parts: int) -> list[list[int]]:
    """Split samples into `parts` greedily: the longest remaining sample goes to the part with the fewest tokens."""
    split: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for sample in sorted(samples, key=lambda sample: -lengths[sample]):
        part = load.index(min(load))
        split[part].append(sample)
        load[part] += lengths[sample]
    return split

"""Packed samples, their token weights, and how they are planned over updates, ranks and micro-batches."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from othink_ray.core.packing import (
    LOSS_WEIGHTS,
    pack,
    pack_step,
    plan,
)
from othink_ray.types import Completion, Group, Message, Pack, Prompt, ScoredGroup

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)
LENGTHS = st.lists(st.integers(0, 4), min_size=2, max_size=5)


def scored_group(prompt_len: int, lengths: list[int], valid: list[bool], name: str = "q7") -> ScoredGroup:
    """Return a group with prompt tokens 1, 2, ...; token j of answer k is 10 k + j, its sampler logprob -k - j / 10."""
    completions = tuple(
        Completion(
            token_ids=10 * k + np.arange(length),
            sampler_logprobs=(-k - np.arange(length) / 10).astype(np.float32),
            text="",
            finish="stop",
        )
        for k, length in enumerate(lengths, start=1)
    )
    prompt = Prompt(
        id=name, messages=(Message(role="user", text="How many?"),), images=(b"png",), answer="3", task="counting"
    )
    group = Group(prompt=prompt, prompt_token_ids=np.arange(1, prompt_len + 1), completions=completions, version=0)
    return ScoredGroup(group=group, rewards=np.zeros(len(lengths)), parts={}, valid=np.array(valid))


def replace_logprobs(scored: ScoredGroup, logprobs: list[float]) -> ScoredGroup:
    """Return the group with the sampler logprobs of its last answer replaced."""
    *others, last = scored.group.completions
    last = replace(last, sampler_logprobs=np.array(logprobs, dtype=np.float32))
    return replace(scored, group=replace(scored.group, completions=(*others, last)))


def packed(prompt_len: int, lengths: list[int], *, groups_in_step: int = 1, name: str = "q7") -> Pack:
    scored = scored_group(prompt_len, lengths, [True] * len(lengths), name)
    return pack(scored, np.arange(1, len(lengths) + 1, dtype=np.float64), groups_in_step)


def test_a_pack_equals_one_written_by_hand() -> None:
    scored = scored_group(2, [2, 1, 0], [True, False, True])
    sample = pack(scored, np.array([0.5, 0.0, -0.5]), groups_in_step=4)
    assert sample.prompt_id == "q7"
    assert sample.images == (b"png",)
    assert sample.prompt_len == 2
    assert sample.token_ids.tolist() == [1, 2, 10, 11, 20]
    assert sample.segments.tolist() == [0, 0, 1, 1, 2]
    assert sample.loss_weights.tolist() == [0, 0, 1 / 16, 1 / 16, 0]
    assert sample.sampler_logprobs.tolist() == pytest.approx([0, 0, -1, -1.1, -2])
    assert sample.advantages.tolist() == [0, 0, 0.5, 0.5, 0]
    dtypes = (sample.token_ids, sample.segments, sample.loss_weights, sample.sampler_logprobs, sample.advantages)
    assert [array.dtype for array in dtypes] == [np.int64, np.int32, np.float64, np.float32, np.float64]


@REPEATABLE
@given(LENGTHS, st.integers(1, 9), st.data())
def test_valid_answers_share_a_groups_weight_equally(lengths: list[int], groups: int, data: st.DataObject) -> None:
    valid = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    sample = pack(scored_group(3, lengths, valid), np.zeros(len(lengths)), groups)
    for answer, (length, ok) in enumerate(zip(lengths, valid, strict=True), start=1):
        expected = 1 / groups / sum(valid) if ok and length else 0.0
        assert sample.loss_weights[sample.segments == answer].sum() == pytest.approx(expected)
        assert len(set(sample.loss_weights[sample.segments == answer])) <= 1


def test_a_group_without_valid_answers_has_zero_weight() -> None:
    sample = pack(scored_group(2, [3, 1], [False, False]), np.zeros(2), groups_in_step=1)
    assert len(sample) == 6
    assert not sample.loss_weights.any()


def test_a_group_of_empty_answers_is_its_prompt() -> None:
    sample = packed(3, [0, 0])
    assert sample.token_ids.tolist() == [1, 2, 3]
    assert not sample.loss_weights.any()


def weights_of(name: str, groups: list[tuple[list[int], list[bool]]], updates: int) -> list[list[float]]:
    """Return the weights of each sample's answer tokens; answers have at most 10 tokens."""
    scored = [scored_group(2, lengths, valid, f"q{index}") for index, (lengths, valid) in enumerate(groups)]
    advantages = [np.zeros(len(lengths)) for lengths, _ in groups]
    samples = pack_step(
        scored, advantages, updates=updates, loss_weights=LOSS_WEIGHTS[name], max_tokens=10, shared_prefix=True
    )
    assert all(not sample.loss_weights[sample.segments == 0].any() for sample in samples)
    return [sample.loss_weights[sample.segments > 0].tolist() for sample in samples]


TWO_GROUPS = [([2, 1], [True, True]), ([3, 4], [True, False])]


@pytest.mark.parametrize(
    ("name", "updates", "expected"),
    [
        ("answer_mean", 1, [[1 / 8, 1 / 8, 1 / 4], [1 / 6] * 3 + [0] * 4]),
        ("answer_mean", 2, [[1 / 4, 1 / 4, 1 / 2], [1 / 3] * 3 + [0] * 4]),
        ("token_mean", 1, [[1 / 6] * 3, [1 / 6] * 3 + [0] * 4]),
        ("token_mean", 2, [[1 / 3] * 3, [1 / 3] * 3 + [0] * 4]),
        ("constant_length", 1, [[1 / 40] * 3, [1 / 20] * 3 + [0] * 4]),
        ("constant_length", 2, [[1 / 20] * 3, [1 / 10] * 3 + [0] * 4]),
    ],
)
def test_token_weights_equal_those_computed_by_hand(name: str, updates: int, expected: list[list[float]]) -> None:
    for found, weights in zip(weights_of(name, TWO_GROUPS, updates), expected, strict=True):
        assert found == pytest.approx(weights)


def test_the_only_token_of_a_step_has_all_its_weight() -> None:
    for name, expected in (("answer_mean", 1.0), ("token_mean", 1.0), ("constant_length", 0.1)):
        assert weights_of(name, [([1], [True])], 1) == [[expected]]


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_a_step_without_valid_tokens_has_zero_weight(name: str) -> None:
    assert weights_of(name, [([0, 0], [True, True]), ([2, 1], [False, False])], 1) == [[], [0, 0, 0]]


@REPEATABLE
@given(st.lists(LENGTHS, min_size=2, max_size=5), st.integers(1, 2))
def test_a_single_pack_has_the_weights_it_has_in_its_step(groups: list[list[int]], updates: int) -> None:
    found = weights_of("answer_mean", [(lengths, [True] * len(lengths)) for lengths in groups], updates)
    for index, lengths in enumerate(groups):
        sizes = [len(part) for part in np.array_split(np.arange(len(groups)), updates)]
        in_update = sizes[0] if index < sizes[0] else sizes[1]
        alone = packed(2, lengths, groups_in_step=in_update)
        assert found[index] == pytest.approx(alone.loss_weights[alone.segments > 0].tolist())


@pytest.mark.parametrize("names", [("a", "a", "b"), ("a", "b", "a")])
def test_two_groups_with_one_prompt_id_are_rejected(names: tuple[str, ...]) -> None:
    groups, nothing = [scored_group(2, [1, 2], [True, True], name) for name in names], [np.zeros(2)] * 3
    with pytest.raises(AssertionError, match="prompt ids of a step must be unique"):
        pack_step(groups, nothing, updates=1, loss_weights=LOSS_WEIGHTS["token_mean"], max_tokens=2, shared_prefix=True)


@pytest.mark.parametrize(
    "broken",
    [
        scored_group(0, [1, 2], [True, True]),
        scored_group(2, [1, 2], [True]),
        scored_group(2, [1, 2, 3], [True, True, True]),
        replace_logprobs(scored_group(2, [1, 2], [True, True]), [0.0]),
    ],
    ids=["no prompt", "a valid flag missing", "an advantage missing", "a logprob missing"],
)
def test_groups_with_inconsistent_lengths_are_rejected(broken: ScoredGroup) -> None:
    with pytest.raises(AssertionError):
        pack(broken, np.zeros(2), groups_in_step=1)


@pytest.mark.parametrize("zero", ["ranks", "updates", "micro_tokens"])
def test_a_plan_with_a_zero_argument_is_rejected(zero: str) -> None:
    with pytest.raises(AssertionError):
        plan(samples_of([1, 1]), **{"ranks": 1, "updates": 1, "micro_tokens": 1, zero: 0})


def samples_of(lengths: list[int]) -> list[Pack]:
    return [packed(length, [0, 0], name=f"q{index}") for index, length in enumerate(lengths)]


def token_counts(update: list[list[list[int]]], lengths: list[int]) -> list[int]:
    return [sum(lengths[sample] for micro in rank for sample in micro) for rank in update]


@REPEATABLE
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3), st.integers(1, 60))
def test_plans_are_complete_balanced_and_within_budget(
    lengths: list[int], ranks: int, updates: int, micro_tokens: int
) -> None:
    updates = min(updates, len(lengths))
    planned = plan(samples_of(lengths), ranks=ranks, updates=updates, micro_tokens=micro_tokens)
    in_prompt_order = [sorted(sample for rank in update for micro in rank for sample in micro) for update in planned]
    assert len(planned) == updates
    assert list(itertools.chain(*in_prompt_order)) == list(range(len(lengths)))
    sizes = [len(samples) for samples in in_prompt_order]
    assert max(sizes) - min(sizes) <= 1
    for update in planned:
        assert len(update) == ranks
        assert len({len(rank) for rank in update}) == 1
        assert any(all(rank_micros) for rank_micros in update)
        for micro in (micro for rank in update for micro in rank if len(micro) > 1):
            assert sum(lengths[sample] for sample in micro) <= micro_tokens
        counts = token_counts(update, lengths)
        assert max(counts) - min(counts) <= max(lengths)


def test_a_plan_puts_long_samples_on_different_ranks() -> None:
    lengths = [10, 9, 2, 1]
    (update,) = plan(samples_of(lengths), ranks=2, updates=1, micro_tokens=1000)
    assert update == [[[0, 3]], [[1, 2]]]
    assert token_counts(update, lengths) == [11, 11]


def test_ranks_with_less_work_get_dummy_micro_batches() -> None:
    (update,) = plan(samples_of([50, 20, 20]), ranks=2, updates=1, micro_tokens=20)
    assert update == [[[0], []], [[1], [2]]]
    (update,) = plan(samples_of([5]), ranks=3, updates=1, micro_tokens=20)
    assert update == [[[0]], [[]], [[]]]


def test_micro_batches_are_as_few_as_possible_and_balanced() -> None:
    samples = samples_of([10, 4, 4, 2])
    assert plan(samples, ranks=1, updates=1, micro_tokens=20) == [[[[0, 1, 2, 3]]]]
    assert plan(samples, ranks=1, updates=1, micro_tokens=19) == [[[[0], [1, 2, 3]]]]
    assert plan(samples, ranks=1, updates=1, micro_tokens=9) == [[[[0], [1, 3], [2]]]]


def test_a_sample_above_the_budget_gets_its_own_micro_batch() -> None:
    assert plan(samples_of([100, 3, 3]), ranks=1, updates=1, micro_tokens=60) == [[[[0], [1, 2]]]]


def test_mini_batches_keep_the_order_of_the_step() -> None:
    planned = plan(samples_of([1, 9, 1, 9]), ranks=1, updates=2, micro_tokens=100)
    assert planned == [[[[1, 0]]], [[[3, 2]]]]


def test_plans_are_deterministic() -> None:
    samples = samples_of([5, 5, 5, 5, 5])
    plans = [plan(samples, ranks=2, updates=1, micro_tokens=10) for _ in range(2)]
    assert plans[0] == plans[1] == [[[[0, 4], [2]], [[1, 3], []]]]


def test_without_shared_prefix_each_answer_is_a_sample() -> None:
    groups = [scored_group(2, [2, 0, 1], [True, True, False], "a"), scored_group(1, [3], [True], "b")]
    advantages = [np.array([0.5, 0.0, -0.5]), np.array([1.0])]
    settings = {"updates": 1, "loss_weights": LOSS_WEIGHTS["token_mean"], "max_tokens": 10}
    shared = pack_step(groups, advantages, **settings, shared_prefix=True)
    apart = pack_step(groups, advantages, **settings, shared_prefix=False)
    assert [sample.token_ids.tolist() for sample in apart] == [[1, 2, 10, 11], [1, 2], [1, 2, 30], [1, 10, 11, 12]]
    assert [sample.segments.tolist() for sample in apart] == [[0, 0, 1, 1], [0, 0], [0, 0, 1], [0, 1, 1, 1]]
    for field in ("loss_weights", "sampler_logprobs", "advantages"):
        found, expected = (
            np.concatenate([getattr(sample, field)[sample.segments > 0] for sample in samples])
            for samples in (apart, shared)
        )
        assert found.tolist() == expected.tolist()


def test_the_samples_of_a_group_stay_in_one_optimizer_step() -> None:
    samples = [packed(1, [1], name=name) for name in "aaaabb"]
    assert plan(samples, ranks=1, updates=2, micro_tokens=100) == [[[[0, 1, 2, 3]]], [[[4, 5]]]]


def test_more_updates_than_groups_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"algo\.updates_per_step = 3 .* 2 groups.*train\.prompts_per_step"):
        plan(samples_of([1, 1]), ranks=1, updates=3, micro_tokens=10)


def weighted_sum(samples: list[Pack], micro: list[int]) -> float:
    values: NDArray[np.float64] = np.concatenate(
        [samples[sample].loss_weights * samples[sample].advantages for sample in micro] or [np.zeros(1)]
    )
    return float(values.sum())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_tokens", [1, 20, 1000])
def test_the_loss_of_a_step_does_not_depend_on_the_plan(ranks: int, micro_tokens: int) -> None:
    samples = [
        packed(2, [3, 1, 4], groups_in_step=3),
        packed(5, [2, 2], groups_in_step=3),
        packed(1, [1, 6], groups_in_step=3),
    ]
    # answer k has advantage k: group means 2, 1.5 and 1.5
    (update,) = plan(samples, ranks=ranks, updates=1, micro_tokens=micro_tokens)
    total = sum(weighted_sum(samples, micro) for rank in update for micro in rank)
    assert total == pytest.approx(5 / 3)

"""Shared-prefix rows, their masks, and how they are spread over updates, ranks and micro-batches."""

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
    """Prompt tokens 1, 2, ...; token j of answer k is 10 k + j, with sampler logprob -k - j / 10."""
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
    """The last answer gets these."""
    *others, last = scored.group.completions
    last = replace(last, sampler_logprobs=np.array(logprobs, dtype=np.float32))
    return replace(scored, group=replace(scored.group, completions=(*others, last)))


def packed(prompt_len: int, lengths: list[int], *, groups_in_step: int = 1, name: str = "q7") -> Pack:
    scored = scored_group(prompt_len, lengths, [True] * len(lengths), name)
    return pack(scored, np.arange(1, len(lengths) + 1, dtype=np.float64), groups_in_step)


def test_a_pack_is_the_row_written_by_hand() -> None:
    scored = scored_group(2, [2, 1, 0], [True, False, True])
    row = pack(scored, np.array([0.5, 0.0, -0.5]), groups_in_step=4)
    assert row.prompt_id == "q7"
    assert row.images == (b"png",)
    assert row.prompt_len == 2
    assert row.token_ids.tolist() == [1, 2, 10, 11, 20]
    assert row.segments.tolist() == [0, 0, 1, 1, 2]
    assert row.loss_weights.tolist() == [0, 0, 1 / 16, 1 / 16, 0]
    assert row.sampler_logprobs.tolist() == pytest.approx([0, 0, -1, -1.1, -2])
    assert row.advantages.tolist() == [0, 0, 0.5, 0.5, 0]
    dtypes = (row.token_ids, row.segments, row.loss_weights, row.sampler_logprobs, row.advantages)
    assert [array.dtype for array in dtypes] == [np.int64, np.int32, np.float64, np.float32, np.float64]


@REPEATABLE
@given(LENGTHS, st.integers(1, 9), st.data())
def test_valid_answers_share_a_groups_weight_equally(lengths: list[int], groups: int, data: st.DataObject) -> None:
    valid = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    row = pack(scored_group(3, lengths, valid), np.zeros(len(lengths)), groups)
    for answer, (length, ok) in enumerate(zip(lengths, valid, strict=True), start=1):
        expected = 1 / groups / sum(valid) if ok and length else 0.0
        assert row.loss_weights[row.segments == answer].sum() == pytest.approx(expected)
        assert len(set(row.loss_weights[row.segments == answer])) <= 1


def test_a_group_without_valid_answers_weighs_nothing() -> None:
    row = pack(scored_group(2, [3, 1], [False, False]), np.zeros(2), groups_in_step=1)
    assert len(row) == 6
    assert not row.loss_weights.any()


def test_a_group_of_empty_answers_is_its_prompt() -> None:
    row = packed(3, [0, 0])
    assert row.token_ids.tolist() == [1, 2, 3]
    assert not row.loss_weights.any()


def weights_of(name: str, groups: list[tuple[list[int], list[bool]]], updates: int) -> list[list[float]]:
    """Of the answer tokens of each row, where answers are at most 10 tokens long."""
    scored = [scored_group(2, lengths, valid, f"q{place}") for place, (lengths, valid) in enumerate(groups)]
    advantages = [np.zeros(len(lengths)) for lengths, _ in groups]
    rows = pack_step(
        scored, advantages, updates=updates, loss_weights=LOSS_WEIGHTS[name], max_tokens=10, shared_prefix=True
    )
    assert all(not row.loss_weights[row.segments == 0].any() for row in rows)
    return [row.loss_weights[row.segments > 0].tolist() for row in rows]


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
def test_tokens_weigh_what_was_computed_by_hand(name: str, updates: int, expected: list[list[float]]) -> None:
    for found, own in zip(weights_of(name, TWO_GROUPS, updates), expected, strict=True):
        assert found == pytest.approx(own)


def test_the_only_token_of_a_step_has_all_its_weight() -> None:
    for name, expected in (("answer_mean", 1.0), ("token_mean", 1.0), ("constant_length", 0.1)):
        assert weights_of(name, [([1], [True])], 1) == [[expected]]


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_a_step_without_any_valid_token_weighs_nothing(name: str) -> None:
    assert weights_of(name, [([0, 0], [True, True]), ([2, 1], [False, False])], 1) == [[], [0, 0, 0]]


@REPEATABLE
@given(st.lists(LENGTHS, min_size=2, max_size=5), st.integers(1, 2))
def test_a_row_alone_weighs_as_it_does_in_its_step(groups: list[list[int]], updates: int) -> None:
    found = weights_of("answer_mean", [(lengths, [True] * len(lengths)) for lengths in groups], updates)
    for place, lengths in enumerate(groups):
        sizes = [len(own) for own in np.array_split(np.arange(len(groups)), updates)]
        in_update = sizes[0] if place < sizes[0] else sizes[1]
        alone = packed(2, lengths, groups_in_step=in_update)
        assert found[place] == pytest.approx(alone.loss_weights[alone.segments > 0].tolist())


@pytest.mark.parametrize("names", [("a", "a", "b"), ("a", "b", "a")])
def test_two_groups_of_one_prompt_id_are_refused(names: tuple[str, ...]) -> None:
    groups, nothing = [scored_group(2, [1, 2], [True, True], name) for name in names], [np.zeros(2)] * 3
    with pytest.raises(AssertionError, match="two groups of a step have one prompt id"):
        pack_step(groups, nothing, updates=1, loss_weights=LOSS_WEIGHTS["token_mean"], max_tokens=2, shared_prefix=True)


@pytest.mark.parametrize(
    "broken",
    [
        scored_group(0, [1, 2], [True, True]),
        scored_group(2, [1, 2], [True]),
        scored_group(2, [1, 2, 3], [True, True, True]),
        replace_logprobs(scored_group(2, [1, 2], [True, True]), [0.0]),
    ],
    ids=["no prompt", "a flag too few", "an advantage too few", "a logprob too few"],
)
def test_a_group_whose_parts_do_not_fit_is_refused(broken: ScoredGroup) -> None:
    with pytest.raises(AssertionError):
        pack(broken, np.zeros(2), groups_in_step=1)


@pytest.mark.parametrize("zero", ["ranks", "updates", "micro_tokens"])
def test_a_plan_for_nothing_is_refused(zero: str) -> None:
    with pytest.raises(AssertionError):
        plan(rows_of([1, 1]), **{"ranks": 1, "updates": 1, "micro_tokens": 1, zero: 0})


def rows_of(lengths: list[int]) -> list[Pack]:
    return [packed(length, [0, 0], name=f"q{place}") for place, length in enumerate(lengths)]


def token_counts(update: list[list[list[int]]], lengths: list[int]) -> list[int]:
    return [sum(lengths[row] for micro in rank for row in micro) for rank in update]


@REPEATABLE
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3), st.integers(1, 60))
def test_a_plan_holds_every_row_once_within_budget_and_the_same_micro_batches_on_each_rank(
    lengths: list[int], ranks: int, updates: int, micro_tokens: int
) -> None:
    updates = min(updates, len(lengths))
    planned = plan(rows_of(lengths), ranks=ranks, updates=updates, micro_tokens=micro_tokens)
    in_order = [sorted(row for rank in update for micro in rank for row in micro) for update in planned]
    assert len(planned) == updates
    assert list(itertools.chain(*in_order)) == list(range(len(lengths)))
    sizes = [len(rows) for rows in in_order]
    assert max(sizes) - min(sizes) <= 1
    for update in planned:
        assert len(update) == ranks
        assert len({len(rank) for rank in update}) == 1
        assert any(all(rank_micros) for rank_micros in update)
        for micro in (micro for rank in update for micro in rank if len(micro) > 1):
            assert sum(lengths[row] for row in micro) <= micro_tokens
        counts = token_counts(update, lengths)
        assert max(counts) - min(counts) <= max(lengths)


def test_a_plan_gives_long_rows_to_different_ranks() -> None:
    lengths = [10, 9, 2, 1]
    (update,) = plan(rows_of(lengths), ranks=2, updates=1, micro_tokens=1000)
    assert update == [[[0, 3]], [[1, 2]]]
    assert token_counts(update, lengths) == [11, 11]


def test_a_rank_with_less_to_do_gets_dummy_micro_batches() -> None:
    (update,) = plan(rows_of([50, 20, 20]), ranks=2, updates=1, micro_tokens=20)
    assert update == [[[0], []], [[1], [2]]]
    (update,) = plan(rows_of([5]), ranks=3, updates=1, micro_tokens=20)
    assert update == [[[0]], [[]], [[]]]


def test_micro_batches_are_as_few_as_the_budget_allows_and_about_equal() -> None:
    rows = rows_of([10, 4, 4, 2])
    assert plan(rows, ranks=1, updates=1, micro_tokens=20) == [[[[0, 1, 2, 3]]]]
    assert plan(rows, ranks=1, updates=1, micro_tokens=19) == [[[[0], [1, 2, 3]]]]
    assert plan(rows, ranks=1, updates=1, micro_tokens=9) == [[[[0], [1, 3], [2]]]]


def test_a_row_above_the_budget_runs_alone() -> None:
    assert plan(rows_of([100, 3, 3]), ranks=1, updates=1, micro_tokens=60) == [[[[0], [1, 2]]]]


def test_mini_batches_keep_the_order_of_the_step() -> None:
    planned = plan(rows_of([1, 9, 1, 9]), ranks=1, updates=2, micro_tokens=100)
    assert planned == [[[[1, 0]]], [[[3, 2]]]]


def test_equal_plans_come_from_equal_steps() -> None:
    rows = rows_of([5, 5, 5, 5, 5])
    plans = [plan(rows, ranks=2, updates=1, micro_tokens=10) for _ in range(2)]
    assert plans[0] == plans[1] == [[[[0, 4], [2]], [[1, 3], []]]]


def test_without_a_shared_prefix_each_answer_is_a_row_of_the_same_weight() -> None:
    groups = [scored_group(2, [2, 0, 1], [True, True, False], "a"), scored_group(1, [3], [True], "b")]
    advantages = [np.array([0.5, 0.0, -0.5]), np.array([1.0])]
    settings = {"updates": 1, "loss_weights": LOSS_WEIGHTS["token_mean"], "max_tokens": 10}
    shared = pack_step(groups, advantages, **settings, shared_prefix=True)
    apart = pack_step(groups, advantages, **settings, shared_prefix=False)
    assert [row.token_ids.tolist() for row in apart] == [[1, 2, 10, 11], [1, 2], [1, 2, 30], [1, 10, 11, 12]]
    assert [row.segments.tolist() for row in apart] == [[0, 0, 1, 1], [0, 0], [0, 0, 1], [0, 1, 1, 1]]
    for field in ("loss_weights", "sampler_logprobs", "advantages"):
        found, expected = (
            np.concatenate([getattr(row, field)[row.segments > 0] for row in rows]) for rows in (apart, shared)
        )
        assert found.tolist() == expected.tolist()


def test_the_rows_of_a_group_stay_in_one_optimiser_step() -> None:
    rows = [packed(1, [1], name=name) for name in "aaaabb"]
    assert plan(rows, ranks=1, updates=2, micro_tokens=100) == [[[[0, 1, 2, 3]]], [[[4, 5]]]]


def test_more_updates_than_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=r"algo\.updates_per_step = 3 .* 2 groups.*train\.prompts_per_step"):
        plan(rows_of([1, 1]), ranks=1, updates=3, micro_tokens=10)


def weighted_sum(rows: list[Pack], micro: list[int]) -> float:
    values: NDArray[np.float64] = np.concatenate(
        [rows[row].loss_weights * rows[row].advantages for row in micro] or [np.zeros(1)]
    )
    return float(values.sum())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_tokens", [1, 20, 1000])
def test_the_loss_of_a_step_does_not_depend_on_how_it_is_spread(ranks: int, micro_tokens: int) -> None:
    rows = [
        packed(2, [3, 1, 4], groups_in_step=3),
        packed(5, [2, 2], groups_in_step=3),
        packed(1, [1, 6], groups_in_step=3),
    ]
    # answer k has advantage k: group means 2, 1.5 and 1.5
    (update,) = plan(rows, ranks=ranks, updates=1, micro_tokens=micro_tokens)
    total = sum(weighted_sum(rows, micro) for rank in update for micro in rank)
    assert total == pytest.approx(5 / 3)

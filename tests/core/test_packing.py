"""Shared-prefix rows, their masks, and how they are spread over updates, ranks and micro-batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from othink_ray.core.packing import (
    LOSS_WEIGHTS,
    answer_index,
    attention_mask,
    pack,
    pack_step,
    plan,
    position_offsets,
    predictor_index,
)
from othink_ray.types import Completion, Group, Message, Pack, Prompt, ScoredGroup
from tests.reference import grpo_d

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)
LENGTHS = st.lists(st.integers(0, 4), min_size=2, max_size=5)


def scored_group(prompt_len: int, lengths: list[int], valid: list[bool]) -> ScoredGroup:
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
        id="q7", messages=(Message(role="user", text="How many?"),), images=(b"png",), answer="3", task="counting"
    )
    group = Group(prompt=prompt, prompt_token_ids=np.arange(1, prompt_len + 1), completions=completions, version=0)
    return ScoredGroup(group=group, rewards=np.zeros(len(lengths)), parts={}, valid=np.array(valid))


def packed(prompt_len: int, lengths: list[int], *, groups_in_step: int = 1) -> Pack:
    scored = scored_group(prompt_len, lengths, [True] * len(lengths))
    return pack(scored, np.arange(1, len(lengths) + 1, dtype=np.float64), groups_in_step)


def segments_of(rows: list[tuple[int, list[int]]]) -> torch.Tensor:
    """Right-padded segments (B, L) of rows given as (prompt length, answer lengths)."""
    segments = [torch.from_numpy(packed(prompt_len, lengths).segments) for prompt_len, lengths in rows]
    return torch.nn.utils.rnn.pad_sequence(segments, batch_first=True, padding_value=-1)


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
    scored = [scored_group(2, lengths, valid) for lengths, valid in groups]
    advantages = [np.zeros(len(lengths)) for lengths, _ in groups]
    rows = pack_step(scored, advantages, updates=updates, loss_weights=LOSS_WEIGHTS[name], max_tokens=10)
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


def test_answers_are_counted_over_all_rows_and_empty_ones_left_out() -> None:
    segments = segments_of([(2, [2, 0, 1]), (1, [1, 3])])
    assert answer_index(segments).tolist() == [0, 0, 1, 2, 3, 3, 3]


def test_mask_of_a_small_row_is_the_one_drawn_by_hand() -> None:
    drawn = """
        x.....
        xx....
        xxx...
        xxxx..
        xx..x.
        .....x
    """.split()
    expected = torch.tensor([[mark == "x" for mark in line] for line in drawn])
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert mask.shape == (1, 1, 6, 6)
    assert mask.dtype == torch.bool
    assert torch.equal(mask[0, 0], expected)


@REPEATABLE
@given(st.lists(st.tuples(st.integers(1, 4), LENGTHS), min_size=1, max_size=3), st.booleans())
def test_mask_predictors_and_offsets_equal_the_slow_reference(
    rows: list[tuple[int, list[int]]], padding_first: bool
) -> None:
    segments = segments_of(rows)
    if padding_first:
        padding = (segments == -1).sum(1).tolist()
        segments = torch.stack([row.roll(shift) for row, shift in zip(segments, padding, strict=True)])
    mask, predictors, offsets = attention_mask(segments), predictor_index(segments), position_offsets(segments)
    for b, row in enumerate(segments.tolist()):
        for i, segment in enumerate(row):
            assert [grpo_d.sees(row, i, j) for j in range(len(row))] == mask[b, 0, i].tolist()
            assert predictors[b, i] == (grpo_d.predictor(row, i) if segment > 0 else 0)
            assert offsets[b, i] == (grpo_d.offset(row, i) if segment > 0 else 0)


class OneLayer(torch.nn.Module):
    """A one-layer attention language model with learned positions: enough to tell a right mask from a wrong one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = torch.nn.Embedding(60, 8), torch.nn.Embedding(12, 8)
        self.qkv, self.head = torch.nn.Linear(8, 24), torch.nn.Linear(8, 60)
        self.double()

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(token_ids) + self.positions(positions)
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        log_p: torch.Tensor = self.head(hidden + attended).log_softmax(-1)
        return log_p

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(self.parameters()))])


def shared_prefix_logprobs(model: OneLayer, row: Pack, padding: int) -> torch.Tensor:
    """Logprobs of the answer tokens of one row, run as a shared-prefix row with some padding after it."""
    token_ids = torch.nn.functional.pad(torch.from_numpy(row.token_ids), (0, padding))[None]
    segments = torch.nn.functional.pad(torch.from_numpy(row.segments), (0, padding), value=-1)[None]
    columns = torch.arange(segments.shape[1])
    positions = torch.where(segments > 0, row.prompt_len + position_offsets(segments), columns.clamp(max=11))
    log_p = model(token_ids, positions, attention_mask(segments)[:, 0])[0]
    answers = segments[0] > 0
    logprobs: torch.Tensor = log_p[predictor_index(segments)[0]][columns, token_ids[0]][answers]
    return logprobs


def padded_row_logprobs(model: OneLayer, row: Pack) -> torch.Tensor:
    """The same logprobs from one padded row an answer."""
    prompt = row.token_ids[row.segments == 0].tolist()
    answers = [row.token_ids[row.segments == k].tolist() for k in range(1, row.segments.max() + 1)]
    rows, is_answer = grpo_d.padded_rows(prompt, answers, pad=0)
    token_ids = torch.tensor(rows)
    width = token_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    log_p = model(token_ids, torch.arange(width).expand_as(token_ids), causal)
    next_token = log_p[:, :-1].gather(2, token_ids[:, 1:, None]).squeeze(2)
    logprobs: torch.Tensor = next_token[torch.tensor(is_answer)[:, 1:]]
    return logprobs


@pytest.mark.parametrize("lengths", [[1, 1], [3, 1, 4], [2, 0, 3], [4, 4, 4, 4]])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_shared_prefix_row_gives_the_logprobs_and_gradients_of_padded_rows(lengths: list[int], padding: int) -> None:
    model, row = OneLayer(), packed(3, lengths)
    shared, padded = shared_prefix_logprobs(model, row, padding), padded_row_logprobs(model, row)
    torch.testing.assert_close(shared, padded)
    weights = torch.linspace(-1, 2, len(shared), dtype=torch.float64)
    torch.testing.assert_close(model.gradient((weights * shared).sum()), model.gradient((weights * padded).sum()))


def rows_of(lengths: list[int]) -> list[Pack]:
    return [packed(length, [0, 0]) for length in lengths]


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
            assert len(micro) * max(lengths[row] for row in micro) <= micro_tokens
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


def test_the_micro_token_budget_counts_padding() -> None:
    rows = rows_of([10, 4, 4])
    assert plan(rows, ranks=1, updates=1, micro_tokens=29) == [[[[0, 1], [2]]]]
    assert plan(rows, ranks=1, updates=1, micro_tokens=30) == [[[[0, 1, 2]]]]


def test_a_row_above_the_budget_runs_alone() -> None:
    assert plan(rows_of([100, 3, 3]), ranks=1, updates=1, micro_tokens=6) == [[[[0], [1, 2]]]]


def test_mini_batches_keep_the_order_of_the_step() -> None:
    planned = plan(rows_of([1, 9, 1, 9]), ranks=1, updates=2, micro_tokens=100)
    assert planned == [[[[1, 0]]], [[[3, 2]]]]


def test_equal_plans_come_from_equal_steps() -> None:
    rows = rows_of([5, 5, 5, 5, 5])
    plans = [plan(rows, ranks=2, updates=1, micro_tokens=10) for _ in range(2)]
    assert plans[0] == plans[1] == [[[[0, 2], [4]], [[1, 3], []]]]


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

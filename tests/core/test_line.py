"""Shared-prefix rows on a line: who sees whom, who predicts whom, and attention computed in several ways."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from othink_ray.core import blocks, fused
from othink_ray.core.attention import (
    ATTENTIONS,
    Attention,
    BlockAttention,
    DenseAttention,
    FlexAttention,
    FusedAttention,
    GroupedAttention,
    attention_for,
)
from othink_ray.core.blocks import ENOUGH
from othink_ray.core.packed_sequence import (
    PackedSequence,
    answer_index,
    build_packed_sequence,
    offsets,
    predicting,
    predictors,
    seen_spans,
    stretches,
    visibility,
)
from tests.reference import grpo_d

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)
ROWS = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.integers(0, 4), min_size=1, max_size=5)), min_size=1, max_size=3
)
CPU = torch.device("cpu")
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def segments_of(prompt: int, answers: list[int]) -> list[int]:
    return [0] * prompt + [k for k, length in enumerate(answers, start=1) for _ in range(length)]


def line_of(rows: list[tuple[int, list[int]]]) -> PackedSequence:
    return build_packed_sequence([np.array(segments_of(*row), dtype=np.int32) for row in rows])


def test_visibility_of_a_small_line_is_the_one_drawn_by_hand() -> None:
    drawn = """
        x.......
        xx......
        xxx.....
        xxxx....
        xx..x...
        .....x..
        .....xx.
        .....xxx
    """.split()
    expected = torch.tensor([[mark == "x" for mark in row] for row in drawn])
    assert torch.equal(visibility(line_of([(2, [2, 1]), (1, [2])])), expected)


@pytest.mark.parametrize("segments", [[[0], []], [[0, 1], [1]], [[1], [0]]])
def test_a_row_without_a_prompt_in_front_is_refused(segments: list[list[int]]) -> None:
    with pytest.raises(AssertionError):
        build_packed_sequence([np.array(own, dtype=np.int32) for own in segments])


def test_a_line_is_of_numbers_that_tensors_are_indexed_with() -> None:
    line = line_of([(2, [2])])
    assert line.rows.dtype == line.segments.dtype == torch.int64


def test_stretches_are_plain_numbers_of_each_prompt_and_answer() -> None:
    found = stretches(line_of([(2, [2, 0, 1]), (1, [3])]))
    assert repr(found) == "[(0, 2, False), (2, 4, True), (4, 5, True), (5, 6, False), (6, 9, True)]"


def test_answers_are_counted_over_all_rows_and_empty_ones_left_out() -> None:
    assert answer_index(line_of([(2, [2, 0, 1]), (1, [1, 3])])).tolist() == [0, 0, 1, 2, 3, 3, 3]


def test_an_answers_last_token_is_read_by_nobody() -> None:
    line = line_of([(2, [2, 0, 1]), (1, [1, 3]), (2, [])])
    read = predicting(line)
    assert read.tolist() == [True, True, True, False, False, True, False, True, True, False, True, True]
    kept = line[read]
    assert kept.rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert kept.segments.tolist() == [0, 0, 1, 0, 2, 2, 0, 0]


@REPEATABLE
@given(ROWS)
def test_visibility_predictors_and_offsets_equal_the_slow_reference(rows: list[tuple[int, list[int]]]) -> None:
    line = line_of(rows)
    seen, found_predictors, found_offsets = visibility(line), predictors(line).tolist(), offsets(line).tolist()
    read = predicting(line)
    start = 0
    for row in rows:
        segments = segments_of(*row)
        own = slice(start, start + len(segments))
        assert not seen[own, : own.start].any()
        assert not seen[own, own.stop :].any()
        for i, segment in enumerate(segments):
            assert seen[own, own][i].tolist() == [grpo_d.sees(segments, i, j) for j in range(len(segments))]
            assert found_offsets[start + i] == (grpo_d.offset(segments, i) if segment else 0)
            assert read[start + i] == (segment == 0 or segments[i + 1 : i + 2] == [segment])
            if segment:
                assert read[found_predictors[0]]
                assert found_predictors.pop(0) == start + grpo_d.predictor(segments, i)
        start = own.stop
    assert not found_predictors


@REPEATABLE
@given(ROWS)
def test_spans_are_what_is_visible(rows: list[tuple[int, list[int]]]) -> None:
    line = line_of(rows)
    prompt, prompt_end, own = (span[:, None] for span in seen_spans(line))
    seen = torch.arange(len(line))
    assert torch.equal((((prompt <= seen) & (seen < prompt_end)) | (own <= seen)).tril(), visibility(line))
    assert own.flatten().tolist() == [start for start, stop, _ in stretches(line) for _ in range(start, stop)]


def states(length: int) -> list[Tensor]:
    """Query, key and value."""
    rng = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, heads, length, WIDTH, generator=rng, dtype=torch.float64).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def attended(own: Attention, length: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What comes out, and the gradients of a random direction in it."""
    inputs = states(length)
    out = own(*inputs, 0.4)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return out.detach(), torch.autograd.grad((out * direction).sum(), inputs)


def slow_attention(line: PackedSequence) -> Tensor:
    """Token by token, head by head."""
    query, key, value = (own.detach() for own in states(len(line)))
    seen = visibility(line)
    out = torch.empty(1, len(line), HEADS, WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        source = head // (HEADS // KEY_HEADS)
        for token in range(len(line)):
            keys, values = key[0, source, seen[token]], value[0, source, seen[token]]
            out[0, token, head] = torch.softmax(0.4 * keys @ query[0, head, token], dim=0) @ values
    return out


@REPEATABLE
@given(ROWS)
def test_every_attention_is_the_slow_one(rows: list[tuple[int, list[int]]]) -> None:
    line = line_of(rows)
    expected = slow_attention(line)
    for name in ("dense", "grouped", "blocks"):
        torch.testing.assert_close(attended(ATTENTIONS[name](line, CPU), len(line))[0], expected)


@REPEATABLE
@given(ROWS)
def test_every_attention_has_the_same_gradients(rows: list[tuple[int, list[int]]]) -> None:
    line = line_of(rows)
    _, expected = attended(DenseAttention(line, CPU), len(line))
    for name in ("grouped", "blocks"):
        torch.testing.assert_close(attended(ATTENTIONS[name](line, CPU), len(line))[1], expected)


def needed(line: PackedSequence) -> Tensor:
    """(N,): the tokens whose last hidden states predict something: answers, and the last one of each prompt."""
    segments = line.segments.tolist()
    return torch.tensor(
        [
            bool(own) or segments[i + 1 : i + 2] != [0] or line.rows[i] != line.rows[i + 1]
            for i, own in enumerate(segments)
        ]
    )


@REPEATABLE
@given(ROWS)
def test_the_last_layer_attends_where_something_is_predicted(rows: list[tuple[int, list[int]]]) -> None:
    line = line_of(rows)
    kept = needed(line)[None, :, None, None]
    inputs = states(len(line))
    expected = DenseAttention(line, CPU)(*inputs, 0.4) * kept
    exact = torch.autograd.grad(expected.square().sum(), inputs)
    for name in ("dense", "grouped", "blocks"):
        whole = ATTENTIONS[name](line, CPU).in_last_layer(*inputs, 0.4)
        assert whole.isfinite().all()
        torch.testing.assert_close(whole * kept, expected)
        torch.testing.assert_close(torch.autograd.grad((whole * kept).square().sum(), inputs), exact)


@pytest.mark.parametrize("name", ["blocks", "fused"])
def test_the_last_layer_leaves_out_what_predicts_nothing(name: str) -> None:
    line = line_of([(4, [2, 0, 3]), (1, [2]), (3, [1])])
    with torch.no_grad():
        found = ATTENTIONS[name](line, CPU).in_last_layer(*states(len(line)), 0.4)
    assert torch.equal(found.any(dim=-1).any(dim=-1)[0], needed(line))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_without_a_scale_it_is_one_over_the_root_of_the_width(name: str) -> None:
    line = line_of([(3, [2, 4]), (1, [5])])
    inputs = [own.detach() for own in states(len(line))]
    attend = ATTENTIONS[name](line, CPU)
    torch.testing.assert_close(attend(*inputs, None), attend(*inputs, WIDTH**-0.5))


def test_prompts_and_answers_of_several_blocks_are_attended_alike() -> None:
    line = line_of([(ENOUGH + 90, [3, 305]), (7, [2]), (ENOUGH - 30, [4])])
    (found, gradients), (expected, exact) = (attended(ATTENTIONS[n](line, CPU), len(line)) for n in ("blocks", "dense"))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, exact)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Whether the kernel for CPUs is for images too, which is for good in a process: here for one test."""
    monkeypatch.setattr(fused, "_CHOSEN", Event())
    return fused.is_chosen


def test_the_kernel_for_cpus_is_taken_where_it_is_quick(chosen: Callable[[], bool]) -> None:
    assert fused.is_quick()
    assert isinstance(attention_for("auto", CPU)(line_of([(7, [2])]), CPU), FusedAttention)
    assert chosen()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_that_is_named_is_taken_on_any_device(name: str, device: str, chosen: Callable[[], bool]) -> None:
    assert attention_for(name, torch.device(device)) is ATTENTIONS[name]
    assert chosen() == (name == "fused")


def test_gpus_have_flex_attention_without_being_told(chosen: Callable[[], bool]) -> None:
    assert attention_for("auto", torch.device("cuda", 1)) is FlexAttention
    assert not chosen()


@pytest.mark.parametrize("quicker", [True, False])
def test_a_long_prompt_is_attended_in_blocks_where_they_are_quicker_without_being_told(
    monkeypatch: pytest.MonkeyPatch, chosen: Callable[[], bool], quicker: bool
) -> None:
    monkeypatch.setattr(fused, "is_quick", lambda: False)
    monkeypatch.setattr(blocks, "products_gain", lambda: 9.0 if quicker else 1.0)
    attend, for_long = attention_for("auto", CPU), BlockAttention if quicker else GroupedAttention
    assert isinstance(attend(line_of([(ENOUGH, [2]), (7, [4])]), CPU), for_long)
    assert isinstance(attend(line_of([(7, [2]), (ENOUGH, [4])]), CPU), for_long)
    assert isinstance(attend(line_of([(7, [ENOUGH]), (ENOUGH - 1, [4])]), CPU), GroupedAttention)
    assert not chosen()


@pytest.mark.parametrize("rows", [[(3, [2, 4]), (1, [5])], [(4, [0, 0])]])
def test_the_fused_kernels_mask_is_the_same(rows: list[tuple[int, list[int]]]) -> None:
    line = line_of(rows)
    with torch.no_grad():
        found = ATTENTIONS["flex"](line, CPU)(*(own.detach() for own in states(len(line))), 0.4)
    torch.testing.assert_close(found, slow_attention(line))

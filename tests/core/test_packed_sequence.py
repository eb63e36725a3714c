"""Packed sequences: visibility, predictors and positions, and every attention implementation over them."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from othink_ray.core import blocks
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
from othink_ray.core.blocks import MIN_KEYS
from othink_ray.core.packed_sequence import (
    PackedSequence,
    answer_index,
    build_packed_sequence,
    offsets,
    predicting,
    predictors,
    segment_spans,
    visibility,
    visible_spans,
)
from othink_ray.cpu import kernels
from tests.reference import grpo_d

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=60)
SAMPLES = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.integers(0, 4), min_size=1, max_size=5)), min_size=1, max_size=3
)
CPU = torch.device("cpu")
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def segments_of(prompt: int, answers: list[int]) -> list[int]:
    return [0] * prompt + [k for k, length in enumerate(answers, start=1) for _ in range(length)]


def sequence_of(samples: list[tuple[int, list[int]]]) -> PackedSequence:
    return build_packed_sequence([np.array(segments_of(*sample), dtype=np.int32) for sample in samples])


def test_visibility_equals_a_mask_drawn_by_hand() -> None:
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
    assert torch.equal(visibility(sequence_of([(2, [2, 1]), (1, [2])])), expected)


@pytest.mark.parametrize("segments", [[[0], []], [[0, 1], [1]], [[1], [0]]])
def test_a_sample_without_a_leading_prompt_is_rejected(segments: list[list[int]]) -> None:
    with pytest.raises(AssertionError):
        build_packed_sequence([np.array(ids, dtype=np.int32) for ids in segments])


def test_a_packed_sequence_has_int64_indices() -> None:
    sequence = sequence_of([(2, [2])])
    assert sequence.sample_ids.dtype == sequence.segment_ids.dtype == torch.int64


def test_segment_spans_are_python_ints() -> None:
    found = segment_spans(sequence_of([(2, [2, 0, 1]), (1, [3])]))
    assert repr(found) == "[(0, 2, False), (2, 4, True), (4, 5, True), (5, 6, False), (6, 9, True)]"


def test_answers_count_over_all_samples_without_empty_ones() -> None:
    assert answer_index(sequence_of([(2, [2, 0, 1]), (1, [1, 3])])).tolist() == [0, 0, 1, 2, 3, 3, 3]


def test_the_last_token_of_an_answer_predicts_nothing() -> None:
    sequence = sequence_of([(2, [2, 0, 1]), (1, [1, 3]), (2, [])])
    needed_tokens = predicting(sequence)
    assert needed_tokens.tolist() == [True, True, True, False, False, True, False, True, True, False, True, True]
    kept = sequence[needed_tokens]
    assert kept.sample_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert kept.segment_ids.tolist() == [0, 0, 1, 0, 2, 2, 0, 0]


@REPEATABLE
@given(SAMPLES)
def test_visibility_predictors_and_offsets_equal_slow_ones(samples: list[tuple[int, list[int]]]) -> None:
    sequence = sequence_of(samples)
    seen, found_predictors, found_offsets = (
        visibility(sequence),
        predictors(sequence).tolist(),
        offsets(sequence).tolist(),
    )
    predicts = predicting(sequence)
    start = 0
    for sample in samples:
        segments = segments_of(*sample)
        span = slice(start, start + len(segments))
        assert not seen[span, : span.start].any()
        assert not seen[span, span.stop :].any()
        for i, segment in enumerate(segments):
            assert seen[span, span][i].tolist() == [grpo_d.sees(segments, i, j) for j in range(len(segments))]
            assert found_offsets[start + i] == (grpo_d.offset(segments, i) if segment else 0)
            assert predicts[start + i] == (segment == 0 or segments[i + 1 : i + 2] == [segment])
            if segment:
                assert predicts[found_predictors[0]]
                assert found_predictors.pop(0) == start + grpo_d.predictor(segments, i)
        start = span.stop
    assert not found_predictors


@REPEATABLE
@given(SAMPLES)
def test_visible_spans_equal_visibility(samples: list[tuple[int, list[int]]]) -> None:
    sequence = sequence_of(samples)
    prompt, prompt_end, segment = (bound[:, None] for bound in visible_spans(sequence))
    seen = torch.arange(len(sequence))
    assert torch.equal((((prompt <= seen) & (seen < prompt_end)) | (segment <= seen)).tril(), visibility(sequence))
    assert segment.flatten().tolist() == [
        start for start, stop, _ in segment_spans(sequence) for _ in range(start, stop)
    ]


def states(length: int) -> list[Tensor]:
    """Return random query, key and value in float64."""
    rng = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, heads, length, WIDTH, generator=rng, dtype=torch.float64).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def attended(attention: Attention, length: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output, and the gradients of its projection on a random direction."""
    inputs = states(length)
    out = attention(*inputs, 0.4)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return out.detach(), torch.autograd.grad((out * direction).sum(), inputs)


def slow_attention(sequence: PackedSequence) -> Tensor:
    """Compute attention token by token and head by head."""
    query, key, value = (tensor.detach() for tensor in states(len(sequence)))
    seen = visibility(sequence)
    out = torch.empty(1, len(sequence), HEADS, WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        source = head // (HEADS // KEY_HEADS)
        for token in range(len(sequence)):
            keys, values = key[0, source, seen[token]], value[0, source, seen[token]]
            out[0, token, head] = torch.softmax(0.4 * keys @ query[0, head, token], dim=0) @ values
    return out


@REPEATABLE
@given(SAMPLES)
def test_every_attention_equals_the_slow_one(samples: list[tuple[int, list[int]]]) -> None:
    sequence = sequence_of(samples)
    expected = slow_attention(sequence)
    for name in ("dense", "grouped", "blocks"):
        torch.testing.assert_close(attended(ATTENTIONS[name](sequence, CPU), len(sequence))[0], expected)


@REPEATABLE
@given(SAMPLES)
def test_every_attention_has_the_same_gradients(samples: list[tuple[int, list[int]]]) -> None:
    sequence = sequence_of(samples)
    _, expected = attended(DenseAttention(sequence, CPU), len(sequence))
    for name in ("grouped", "blocks"):
        torch.testing.assert_close(attended(ATTENTIONS[name](sequence, CPU), len(sequence))[1], expected)


def needed(sequence: PackedSequence) -> Tensor:
    """Return a mask (N,) of the tokens that last-layer pruning must keep: answers and each prompt's last token."""
    segments = sequence.segment_ids.tolist()
    return torch.tensor(
        [
            bool(segment) or segments[i + 1 : i + 2] != [0] or sequence.sample_ids[i] != sequence.sample_ids[i + 1]
            for i, segment in enumerate(segments)
        ]
    )


@REPEATABLE
@given(SAMPLES)
def test_last_layer_pruning_keeps_the_needed_outputs(samples: list[tuple[int, list[int]]]) -> None:
    sequence = sequence_of(samples)
    kept = needed(sequence)[None, :, None, None]
    inputs = states(len(sequence))
    expected = DenseAttention(sequence, CPU)(*inputs, 0.4) * kept
    exact = torch.autograd.grad(expected.square().sum(), inputs)
    for name in ("dense", "grouped", "blocks"):
        whole = ATTENTIONS[name](sequence, CPU).in_last_layer(*inputs, 0.4)
        assert whole.isfinite().all()
        torch.testing.assert_close(whole * kept, expected)
        torch.testing.assert_close(torch.autograd.grad((whole * kept).square().sum(), inputs), exact)


@pytest.mark.parametrize("name", ["blocks", "fused"])
def test_last_layer_pruning_skips_other_queries(name: str) -> None:
    sequence = sequence_of([(4, [2, 0, 3]), (1, [2]), (3, [1])])
    with torch.no_grad():
        found = ATTENTIONS[name](sequence, CPU).in_last_layer(*states(len(sequence)), 0.4)
    assert torch.equal(found.any(dim=-1).any(dim=-1)[0], needed(sequence))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_default_scale_is_one_over_sqrt_of_head_dim(name: str) -> None:
    sequence = sequence_of([(3, [2, 4]), (1, [5])])
    inputs = [tensor.detach() for tensor in states(len(sequence))]
    attend = ATTENTIONS[name](sequence, CPU)
    torch.testing.assert_close(attend(*inputs, None), attend(*inputs, WIDTH**-0.5))


def test_segments_of_several_blocks_equal_dense_attention() -> None:
    sequence = sequence_of([(MIN_KEYS + 90, [3, 305]), (7, [2]), (MIN_KEYS - 30, [4])])
    (found, gradients), (expected, exact) = (
        attended(ATTENTIONS[n](sequence, CPU), len(sequence)) for n in ("blocks", "dense")
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, exact)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Return the query for whether the CPU kernel is chosen for images; the process-wide flag is reset per test."""
    monkeypatch.setattr(kernels, "_IMAGES", Event())
    return kernels.enabled_for_images


def test_auto_takes_the_cpu_kernel_where_it_is_fast(chosen: Callable[[], bool]) -> None:
    assert kernels.attention_is_faster()
    assert isinstance(attention_for("auto", CPU)(sequence_of([(7, [2])]), CPU), FusedAttention)
    assert chosen()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_named_attention_is_used_on_any_device(name: str, device: str, chosen: Callable[[], bool]) -> None:
    assert attention_for(name, torch.device(device)) is ATTENTIONS[name]
    assert chosen() == (name == "fused")


def test_auto_takes_flex_attention_on_gpus(chosen: Callable[[], bool]) -> None:
    assert attention_for("auto", torch.device("cuda", 1)) is FlexAttention
    assert not chosen()


@pytest.mark.parametrize("faster", [True, False])
def test_auto_takes_blocks_for_long_prompts_if_faster(
    monkeypatch: pytest.MonkeyPatch, chosen: Callable[[], bool], faster: bool
) -> None:
    monkeypatch.setattr(kernels, "attention_is_faster", lambda: False)
    monkeypatch.setattr(blocks, "matmul_gain", lambda: 9.0 if faster else 1.0)
    attend, for_long = attention_for("auto", CPU), BlockAttention if faster else GroupedAttention
    assert isinstance(attend(sequence_of([(MIN_KEYS, [2]), (7, [4])]), CPU), for_long)
    assert isinstance(attend(sequence_of([(7, [2]), (MIN_KEYS, [4])]), CPU), for_long)
    assert isinstance(attend(sequence_of([(7, [MIN_KEYS]), (MIN_KEYS - 1, [4])]), CPU), GroupedAttention)
    assert not chosen()


@pytest.mark.parametrize("samples", [[(3, [2, 4]), (1, [5])], [(4, [0, 0])]])
def test_flex_attention_equals_the_slow_one(samples: list[tuple[int, list[int]]]) -> None:
    sequence = sequence_of(samples)
    with torch.no_grad():
        found = ATTENTIONS["flex"](sequence, CPU)(*(tensor.detach() for tensor in states(len(sequence))), 0.4)
    torch.testing.assert_close(found, slow_attention(sequence))

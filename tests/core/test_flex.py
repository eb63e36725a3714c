"""FlexAttention of lines and of packed images: the blocks that its kernels are told of, and how those are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.allocations import Allocations
from othink_ray.core import attention, flex
from othink_ray.core.attention import FlexAttention
from othink_ray.core.flex import PackedImages
from othink_ray.core.packed_sequence import PackedSequence, build_packed_sequence, predicting
from tests.gpu.flex_kernels import IMAGES, TABLES

CPU = torch.device("cpu")
Rows = list[tuple[int, list[int]]]  # tokens of each prompt, and of its answers


def assert_blocks_of_all_pairs(mask: Any, length: int) -> None:
    """The operations on a CPU read the mask alone: wrong blocks would be seen on a GPU only."""
    whole = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu")
    for name in TABLES:
        own, expected = getattr(mask, name), getattr(whole, name)
        assert own.dtype == expected.dtype, name
        assert torch.equal(own, expected), name
    assert (mask.seq_lengths, mask.BLOCK_SIZE) == (whole.seq_lengths, whole.BLOCK_SIZE)


# ---- blocks of images


def packed(lengths: list[int]) -> PackedImages:
    return PackedImages(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]), CPU)


def drawn_images(seed: int) -> list[int]:
    """Lengths of up to 11 images, short and long, some of whole blocks."""
    draw = torch.Generator().manual_seed(seed)
    count, longest = int(torch.randint(1, 12, (), generator=draw)), (30, 200, 600, 3)[seed % 4]
    lengths = torch.randint(1, longest + 1, (count,), generator=draw)
    return (lengths * 128 if longest == 3 else lengths).tolist()


EDGES = [[127, 1, 128], [1, 127, 127, 129], [128, 1, 126, 1]]  # an image begins or ends one patch beside a block


@pytest.mark.parametrize("lengths", [*map(drawn_images, range(16)), *EDGES, *map(list, IMAGES)], ids=str)
def test_blocks_of_images_are_those_of_all_pairs(lengths: list[int]) -> None:
    assert_blocks_of_all_pairs(packed(lengths).mask, sum(lengths))


# ---- blocks of lines


def line_of(rows: Rows) -> PackedSequence:
    return build_packed_sequence(
        [np.repeat(np.arange(1 + len(answers), dtype=np.int32), [prompt, *answers]) for prompt, answers in rows]
    )


def drawn_line(seed: int) -> PackedSequence:
    """Up to 3 rows of up to 4 answers, some of them empty; short ones, long ones, and some that end beside a block."""
    rng = np.random.default_rng(seed)
    longest = (8, 40, 150, 300, 2)[seed % 5]

    def length(least: int) -> int:
        drawn = int(rng.integers(least, longest + 1))
        return drawn if longest > 2 else max(least, 128 * drawn + int(rng.integers(-1, 2)))

    return line_of([(length(1), [length(0) for _ in range(rng.integers(0, 5))]) for _ in range(rng.integers(1, 4))])


ENDS = [
    [(128, [128, 128])],
    [(127, [1, 128])],
    [(129, [127, 256])],
    [(100, [400, 1, 300])],  # a block of a prompt's end and its first answer's start, which all of that answer see
    [(100, [0, 400, 300])],
    [(100, [20, 400])],  # and one with a second answer beside it
    [(256, [1] * 300)],
    [(1, [127]), (1, [])],
    [(300, []), (1, [500]), (130, [])],
]


@pytest.mark.parametrize("rows", ENDS, ids=str)
def test_blocks_of_a_line_are_those_of_all_pairs(rows: Rows) -> None:
    line = line_of(rows)
    assert_blocks_of_all_pairs(FlexAttention(line, CPU).mask, len(line))


@pytest.mark.parametrize("seed", range(60))
def test_blocks_of_any_line_are_those_of_all_pairs(seed: int) -> None:
    """And of what the last layer keeps of it."""
    line = drawn_line(seed)
    for own in (line, line[predicting(line)]):
        assert_blocks_of_all_pairs(FlexAttention(own, CPU).mask, len(own))


def test_a_lines_blocks_take_memory_far_below_its_pairs() -> None:
    line = line_of([(1024, [1920] * 8)])
    assert len(line) == 16_384
    with Allocations(line.rows, line.segments) as counted:
        made = FlexAttention(line, CPU)
    pairs_of_blocks = (len(line) // 128) ** 2
    assert counted.peak < 100 * len(line) + 100 * pairs_of_blocks < len(line) ** 2 / 50
    assert made.mask.full_kv_num_blocks.sum() > 0


def test_a_lines_blocks_are_never_read_back() -> None:
    """The meta device has no values: reading one raises."""
    made = FlexAttention(line_of([(300, [200, 90]), (5, [7])]), torch.device("meta"))
    assert {getattr(made.mask, name).device.type for name in TABLES} == {"meta"}
    assert made.mask.kv_indices.shape == (1, 1, 5, 5)


# ---- kernels

KERNELS = pytest.mark.parametrize("kernel", [attention._flex_kernel, flex._kernel], ids=["line", "images"])


@KERNELS
def test_a_kernel_for_cuda_is_compiled_once_for_any_length(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each length anew it would take minutes, and torch gives up after eight of them."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda kernel, **how: asked.append(how) or kernel)
    kernel.__wrapped__("cpu")
    assert not asked
    kernel.__wrapped__("cuda")
    assert asked == [{"dynamic": True, "fullgraph": True}]


@KERNELS
def test_a_kernel_for_cuda_that_cannot_be_compiled_raises(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would otherwise go on without one, and write all scores out."""

    def uncompilable(query: Tensor, key: Tensor, value: Tensor, **settings: object) -> Tensor:
        torch._dynamo.graph_break()
        return query

    attend = kernel_around(uncompilable, kernel, "cuda", monkeypatch)
    state = torch.ones(1, 1, 4, 16)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        attend(state, state, state, None, 1.0)


@KERNELS
def test_a_short_line_has_the_kernel_of_a_long_one(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    attend = kernel_around(lambda *_, **settings: given.append(settings), kernel, "cpu", monkeypatch)
    attend(None, None, None, None, 1.0)
    assert given[0]["kernel_options"] == {"FORCE_USE_FLEX_ATTENTION": True}


def kernel_around(
    attention: Callable[..., Any], kernel: Any, device_type: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", attention)
    made: Callable[..., Any] = kernel.__wrapped__(device_type)
    return made

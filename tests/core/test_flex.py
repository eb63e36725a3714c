"""FlexAttention of packed sequences and packed images: block masks, and how the kernels are compiled."""

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
Samples = list[tuple[int, list[int]]]  # tokens of each prompt, and of its answers


def assert_equals_create_block_mask(mask: Any, length: int) -> None:
    """Compare the block tables: the CPU operations ignore them, so wrong blocks would only show on a GPU."""
    whole = create_block_mask(mask.mask_mod, None, None, length, length, device="cpu")
    for name in TABLES:
        found, expected = getattr(mask, name), getattr(whole, name)
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
    assert (mask.seq_lengths, mask.BLOCK_SIZE) == (whole.seq_lengths, whole.BLOCK_SIZE)


# ---- block masks of images


def packed(lengths: list[int]) -> PackedImages:
    return PackedImages(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]), CPU)


def random_images(seed: int) -> list[int]:
    """Return lengths of up to 11 images, short and long, some multiples of the block size."""
    draw = torch.Generator().manual_seed(seed)
    count, longest = int(torch.randint(1, 12, (), generator=draw)), (30, 200, 600, 3)[seed % 4]
    lengths = torch.randint(1, longest + 1, (count,), generator=draw)
    return (lengths * 128 if longest == 3 else lengths).tolist()


EDGES = [[127, 1, 128], [1, 127, 127, 129], [128, 1, 126, 1]]  # an image starts or ends one patch off a block boundary


@pytest.mark.parametrize("lengths", [*map(random_images, range(16)), *EDGES, *map(list, IMAGES)], ids=str)
def test_image_blocks_equal_create_block_mask(lengths: list[int]) -> None:
    assert_equals_create_block_mask(packed(lengths).mask, sum(lengths))


# ---- block masks of packed sequences


def sequence_of(samples: Samples) -> PackedSequence:
    return build_packed_sequence(
        [np.repeat(np.arange(1 + len(answers), dtype=np.int32), [prompt, *answers]) for prompt, answers in samples]
    )


def random_sequence(seed: int) -> PackedSequence:
    """Draw up to 3 samples of up to 4 answers, some empty; short, long, and ending near block boundaries."""
    rng = np.random.default_rng(seed)
    longest = (8, 40, 150, 300, 2)[seed % 5]

    def length(least: int) -> int:
        drawn = int(rng.integers(least, longest + 1))
        return drawn if longest > 2 else max(least, 128 * drawn + int(rng.integers(-1, 2)))

    return sequence_of([(length(1), [length(0) for _ in range(rng.integers(0, 5))]) for _ in range(rng.integers(1, 4))])


ENDS = [
    [(128, [128, 128])],
    [(127, [1, 128])],
    [(129, [127, 256])],
    [(100, [400, 1, 300])],  # a block with a prompt's end and its first answer's start, all visible to that answer
    [(100, [0, 400, 300])],
    [(100, [20, 400])],  # and one that contains a second answer too
    [(256, [1] * 300)],
    [(1, [127]), (1, [])],
    [(300, []), (1, [500]), (130, [])],
]


@pytest.mark.parametrize("samples", ENDS, ids=str)
def test_sequence_blocks_equal_create_block_mask(samples: Samples) -> None:
    sequence = sequence_of(samples)
    assert_equals_create_block_mask(FlexAttention(sequence, CPU).mask, len(sequence))


@pytest.mark.parametrize("seed", range(60))
def test_random_sequence_blocks_equal_create_block_mask(seed: int) -> None:
    """Also for the tokens that last-layer pruning keeps."""
    sequence = random_sequence(seed)
    for kept in (sequence, sequence[predicting(sequence)]):
        assert_equals_create_block_mask(FlexAttention(kept, CPU).mask, len(kept))


def test_block_masks_need_far_less_memory_than_all_pairs() -> None:
    sequence = sequence_of([(1024, [1920] * 8)])
    assert len(sequence) == 16_384
    with Allocations(sequence.sample_ids, sequence.segment_ids) as counted:
        made = FlexAttention(sequence, CPU)
    pairs_of_blocks = (len(sequence) // 128) ** 2
    assert counted.peak < 100 * len(sequence) + 100 * pairs_of_blocks < len(sequence) ** 2 / 50
    assert made.mask.full_kv_num_blocks.sum() > 0


def test_block_masks_are_never_read_back_from_the_device() -> None:
    """The meta device has no values: reading one raises."""
    made = FlexAttention(sequence_of([(300, [200, 90]), (5, [7])]), torch.device("meta"))
    assert {getattr(made.mask, name).device.type for name in TABLES} == {"meta"}
    assert made.mask.kv_indices.shape == (1, 1, 5, 5)


# ---- kernels

KERNELS = pytest.mark.parametrize("kernel", [attention._flex_kernel, flex._kernel], ids=["sequence", "images"])


@KERNELS
def test_a_cuda_kernel_is_compiled_once_for_any_length(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompiling for every length would take minutes, and torch gives up after eight recompilations."""
    requested = []
    monkeypatch.setattr(torch, "compile", lambda kernel, **options: requested.append(options) or kernel)
    kernel.__wrapped__("cpu")
    assert not requested
    kernel.__wrapped__("cuda")
    assert requested == [{"dynamic": True, "fullgraph": True}]


@KERNELS
def test_a_cuda_kernel_that_does_not_compile_raises(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise torch would fall back to eager mode and materialize all scores."""

    def uncompilable(query: Tensor, key: Tensor, value: Tensor, **settings: object) -> Tensor:
        torch._dynamo.graph_break()
        return query

    attend = kernel_around(uncompilable, kernel, "cuda", monkeypatch)
    state = torch.ones(1, 1, 4, 16)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        attend(state, state, state, None, 1.0)


@KERNELS
def test_short_sequences_use_the_kernel_of_long_ones(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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

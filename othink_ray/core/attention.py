"""Attention over a packed sequence of shared-prefix samples: five implementations with the same result.

`kernel_shape` and `KernelShape` stand in for a fused kernel on the meta device, where memory is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from othink_ray.core import flex
from othink_ray.core.blocks import Block, attend_in_blocks, blocks_are_faster, blocks_of_sequence
from othink_ray.core.packed_sequence import PackedSequence, segment_spans, visibility, visible_spans
from othink_ray.cpu import kernels


class Attention(ABC):
    """Attention of one packed sequence, prepared once and used in every layer."""

    @abstractmethod
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Map query (1, heads, N, D), key and value (1, key heads, N, D) to (1, N, heads, D); GQA is allowed."""

    def in_last_layer(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Return the result of a call for answers and each prompt's last token; other tokens get any finite values."""
        return self(query, key, value, scale)


class DenseAttention(Attention):
    """One dense mask over the packed sequence: simple, but quadratic in its total length."""

    def __init__(self, sequence: PackedSequence, device: torch.device) -> None:
        self.mask = visibility(sequence)[None, None].to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        attended = scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scale, enable_gqa=True)
        return attended.transpose(1, 2)


class GroupedAttention(Attention):
    """Prompts attend to themselves, then each answer to its prompt and itself; no scores between answers.

    Prompts are right-padded to the longest prompt, answers to the longest answer; masks hide the padding.
    """

    def __init__(self, sequence: PackedSequence, device: torch.device) -> None:
        (samples, segments), lengths = torch.stack([sequence.sample_ids, sequence.segment_ids]).unique_consecutive(
            dim=1, return_counts=True
        )
        blocks = torch.arange(len(sequence)).split(lengths.tolist())
        of_answer = segments > 0
        prompts = [block for block, answers in zip(blocks, of_answer.tolist(), strict=True) if not answers]
        answers = [block for block, answers in zip(blocks, of_answer.tolist(), strict=True) if answers]
        self.prompts = pad_sequence(prompts, batch_first=True).to(device)
        self.answers = pad_sequence(answers or [torch.empty(0, dtype=torch.long)], batch_first=True).to(device)
        # Every packed sample starts with its prompt, so the sample index is also the prompt's index.
        prompt_of = samples[of_answer] if answers else torch.zeros(1, dtype=torch.long)
        self.prompt_of = prompt_of.to(device)
        self.mask = _answer_mask(lengths[~of_answer][prompt_of], *self.prompts.shape[1:], *self.answers.shape[1:])
        self.mask = self.mask.to(device)
        self.unpad = _unpad_indices(len(sequence), prompts, answers).to(device)
        lasts = [prompt[-1:] for prompt in prompts]
        self.lasts = torch.stack(lasts).to(device)
        self.last_mask = (torch.arange(self.prompts.shape[1]) < lengths[~of_answer][:, None])[:, None, None].to(device)
        self.unpad_lasts = _unpad_indices(len(sequence), lasts, answers).to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.prompts, self.unpad, is_causal=True)

    def in_last_layer(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.lasts, self.unpad_lasts, attn_mask=self.last_mask)

    def _attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        prompt_queries: Tensor,
        unpad: Tensor,
        **prompt_mask: Any,
    ) -> Tensor:
        """Attend in prompts and answers; `prompt_queries` (P, Q) are indices of the prompt tokens used as queries."""
        queries, keys, values = (heads[0].transpose(0, 1) for heads in (query, key, value))
        prompt_key, prompt_value = (states[self.prompts].transpose(1, 2) for states in (keys, values))
        answer_key, answer_value = (states[self.answers].transpose(1, 2) for states in (keys, values))
        prompt_query, answer_query = (queries[tokens].transpose(1, 2) for tokens in (prompt_queries, self.answers))
        seen_key = torch.cat([prompt_key[self.prompt_of], answer_key], dim=2)
        seen_value = torch.cat([prompt_value[self.prompt_of], answer_value], dim=2)
        settings: dict[str, Any] = {"scale": scale, "enable_gqa": True}
        attended = [
            scaled_dot_product_attention(prompt_query, prompt_key, prompt_value, **prompt_mask, **settings),
            scaled_dot_product_attention(answer_query, seen_key, seen_value, attn_mask=self.mask, **settings),
        ]
        return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in attended])[unpad][None]


def _answer_mask(prompt_lengths: Tensor, longest_prompt: int, longest_answer: int) -> Tensor:
    """Return a mask (A, 1, longest answer, longest prompt + longest answer).

    Each answer token attends to its whole prompt, and to its answer up to itself.
    """
    prompt = torch.arange(longest_prompt) < prompt_lengths[:, None, None]
    past = torch.ones(longest_answer, longest_answer, dtype=torch.bool).tril()
    answers = len(prompt_lengths)
    return torch.cat([prompt.expand(-1, longest_answer, -1), past.expand(answers, -1, -1)], dim=2)[:, None]


def _unpad_indices(length: int, prompts: list[Tensor], answers: list[Tensor]) -> Tensor:
    """Return (length,) the index of each token when the padded prompts and answers are concatenated.

    Tokens in none of them get index 0.
    """
    unpad = torch.zeros(length, dtype=torch.long)
    start = 0
    for blocks in (prompts, answers):
        width = max(map(len, blocks), default=0)
        for block in blocks:
            unpad[block] = start + torch.arange(len(block))
            start += width
    return unpad


class BlockAttention(Attention):
    """Block-by-block attention for long prompts, without padding and without gathering."""

    def __init__(self, sequence: PackedSequence, device: torch.device) -> None:
        self.blocks = blocks_of_sequence(sequence)
        self.last_blocks = blocks_of_sequence(sequence, in_last_layer=True)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.blocks)

    def in_last_layer(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.last_blocks)

    @staticmethod
    def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float | None, blocks: Sequence[Block]) -> Tensor:
        heads, width = key.shape[1], key.shape[3]
        grouped = query[0].unflatten(0, (heads, -1)).transpose(1, 2)  # (key heads, N, heads per key head, D)
        scale = width**-0.5 if scale is None else scale
        attended = attend_in_blocks(grouped.flatten(1, 2), key[0], value[0], blocks, scale)
        return attended.view(grouped.shape).transpose(0, 1).flatten(1, 2)[None]


class FusedAttention(Attention):
    """The C++ kernel of this package, for CPUs."""

    def __init__(self, sequence: PackedSequence, device: torch.device) -> None:
        segments = segment_spans(sequence)
        self.blocks, self.last_blocks = (kernels.causal_blocks(segments, in_last_layer=last) for last in (False, True))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.blocks)

    def in_last_layer(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.last_blocks)

    @staticmethod
    def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float | None, blocks: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return kernels.fused_attention(query[0], key[0], value[0], blocks, scale)[None]


class FlexAttention(Attention):
    """FlexAttention: one fused kernel that skips the blocks of the mask that are entirely False.

    Nothing is read back from the device, and memory grows with the number of tokens and of pairs of blocks, not with
    pairs of tokens.
    """

    def __init__(self, sequence: PackedSequence, device: torch.device) -> None:
        ids = (sequence.sample_ids, sequence.segment_ids)
        sample_ids, segment_ids = (each.to(device, non_blocking=True) for each in ids)

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            shared = (segment_ids[key] == 0) | (segment_ids[key] == segment_ids[query])
            return (query >= key) & (sample_ids[key] == sample_ids[query]) & shared

        self.mask = flex.block_mask(*_blocks(sequence, device), sees, len(sequence))
        self.attend = _flex_kernel(device.type)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        attended: Tensor = self.attend(query, key, value, self.mask, scale)
        return attended.transpose(1, 2)


def _blocks(sequence: PackedSequence, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two masks (B, B): pairs of blocks in which some but not all tokens attend, and pairs in which all do.

    A token attends to its prompt and to its segment, from their starts. These starts never decrease along the sequence,
    so the first token of a block reaches furthest back, and what both its first and its last token see, all others see.
    """
    # Padding tokens of the last block see nothing, so the block never counts as seeing all of another.
    spans = pad(torch.stack(visible_spans(sequence)), (0, -len(sequence) % flex.BLOCK), value=len(sequence))
    bounds = torch.stack([spans[:, :: flex.BLOCK], spans[:, flex.BLOCK - 1 :: flex.BLOCK]])
    (prompt, prompt_end, segment), (last_prompt, _, last_segment) = bounds[..., None].to(device, non_blocking=True)
    start = torch.arange(0, len(sequence), flex.BLOCK, device=device)
    end = start + flex.BLOCK
    some = (segment < end) | ((prompt < end) & (start < prompt_end))
    # All tokens are in one packed sample, and all keys behind its prompt are in the segment of the last query.
    full = (last_prompt <= start) & ((end <= prompt_end) | (last_segment <= start.maximum(prompt_end)))
    full = full.tril(-1)
    return some.tril() & ~full, full


@cache
def _flex_kernel(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float | None) -> Any:
        settings: Any = {"block_mask": mask, "scale": scale, "kernel_options": flex.OPTIONS}
        return flex_attention(query, key, value, enable_gqa=True, **settings)

    return flex.compiled(attend, device_type)


ATTENTIONS: dict[str, Callable[[PackedSequence, torch.device], Attention]] = {
    "dense": DenseAttention,
    "grouped": GroupedAttention,
    "blocks": BlockAttention,
    "fused": FusedAttention,
    "flex": FlexAttention,
}


def attention_for(name: str, device: torch.device) -> Callable[[PackedSequence, torch.device], Attention]:
    """Return the constructor of the named attention.

    `auto` is flex on GPUs; on CPUs fused where that kernel is fast, else grouped or blocks by prompt length. Choosing
    fused selects that kernel for images too, in this process.
    """
    if name == "auto" and device.type == "cuda":
        name = "flex"
    elif name == "auto" and kernels.attention_is_faster():
        name = "fused"
    if name == "fused":
        kernels.enable_for_images()
    return _by_length if name == "auto" else ATTENTIONS[name]


def packs_images(attention: Attention, device: torch.device) -> bool:
    """Return whether all images of a packed sequence share one FlexAttention call: with flex on CUDA only."""
    return isinstance(attention, FlexAttention) and device.type == "cuda"


def _by_length(sequence: PackedSequence, device: torch.device) -> Attention:
    prompts = [stop - start for start, stop, of_answer in segment_spans(sequence) if not of_answer]
    return (BlockAttention if blocks_are_faster(max(prompts)) else GroupedAttention)(sequence, device)


class _Kernel(torch.autograd.Function):
    """Saves for backward what fused kernels save (inputs, output, log-sum-exp in float32); computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def kernel_shape(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Map query (B, heads, N, D), key and value (B, key heads, N, D) to an uninitialized tensor (B, N, heads, D)."""
    out: Tensor = _Kernel.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


class KernelShape(Attention):
    """Stand-in for attention on the meta device, to measure memory: its output has the right shape, but no values."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return kernel_shape(query, key, value)

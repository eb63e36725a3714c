"""Attention over a line of shared-prefix rows, five ways with one result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from othink_ray.core import flex, fused
from othink_ray.core.blocks import Block, attend_in_blocks, blocks_of_sequence, worth_it
from othink_ray.core.packed_sequence import PackedSequence, seen_spans, stretches, visibility


class Attention(ABC):
    """One line's attention, prepared once and used in every layer."""

    @abstractmethod
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """(1, heads, N, D) and twice (1, key heads, N, D) -> (1, N, heads, D); heads are a multiple of key heads."""

    def in_last_layer(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """The same on answers and each prompt's last token; on the other tokens anything finite, as nobody reads it."""
        return self(query, key, value, scale)


class DenseAttention(Attention):
    """One mask over the whole line: plain to read, and quadratic in all answers of all rows together."""

    def __init__(self, line: PackedSequence, device: torch.device) -> None:
        self.mask = visibility(line)[None, None].to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        attended = scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scale, enable_gqa=True)
        return attended.transpose(1, 2)


class GroupedAttention(Attention):
    """Prompts among themselves, then each answer against its prompt and itself: answers never meet.

    Short prompts and answers are padded at their end, where causality hides the padding from all others.
    """

    def __init__(self, line: PackedSequence, device: torch.device) -> None:
        (rows, segments), lengths = torch.stack([line.rows, line.segments]).unique_consecutive(
            dim=1, return_counts=True
        )
        blocks = torch.arange(len(line)).split(lengths.tolist())
        of_answer = segments > 0
        prompts = [block for block, answers in zip(blocks, of_answer.tolist(), strict=True) if not answers]
        answers = [block for block, answers in zip(blocks, of_answer.tolist(), strict=True) if answers]
        self.prompts = pad_sequence(prompts, batch_first=True).to(device)
        self.answers = pad_sequence(answers or [torch.empty(0, dtype=torch.long)], batch_first=True).to(device)
        # Every row begins with its prompt, so a row's number is its prompt's place among the prompts.
        owners = rows[of_answer] if answers else torch.zeros(1, dtype=torch.long)
        self.owners = owners.to(device)
        self.mask = _seen_by_answers(lengths[~of_answer][owners], *self.prompts.shape[1:], *self.answers.shape[1:])
        self.mask = self.mask.to(device)
        self.homes = _homes(len(line), prompts, answers).to(device)
        lasts = [prompt[-1:] for prompt in prompts]
        self.lasts = torch.stack(lasts).to(device)
        self.whole = (torch.arange(self.prompts.shape[1]) < lengths[~of_answer][:, None])[:, None, None].to(device)
        self.homes_of_lasts = _homes(len(line), lasts, answers).to(device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.prompts, self.homes, is_causal=True)

    def in_last_layer(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.lasts, self.homes_of_lasts, attn_mask=self.whole)

    def _attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        asking: Tensor,
        homes: Tensor,
        **seen_by_prompts: Any,
    ) -> Tensor:
        """`asking`: the tokens of prompts that ask."""
        queries, keys, values = (heads[0].transpose(0, 1) for heads in (query, key, value))
        prompt_key, prompt_value = (own[self.prompts].transpose(1, 2) for own in (keys, values))
        own_key, own_value = (own[self.answers].transpose(1, 2) for own in (keys, values))
        asked, answered = (queries[own].transpose(1, 2) for own in (asking, self.answers))
        seen_key = torch.cat([prompt_key[self.owners], own_key], dim=2)
        seen_value = torch.cat([prompt_value[self.owners], own_value], dim=2)
        settings: dict[str, Any] = {"scale": scale, "enable_gqa": True}
        attended = [
            scaled_dot_product_attention(asked, prompt_key, prompt_value, **seen_by_prompts, **settings),
            scaled_dot_product_attention(answered, seen_key, seen_value, attn_mask=self.mask, **settings),
        ]
        return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in attended])[homes][None]


def _seen_by_answers(prompt_lengths: Tensor, longest_prompt: int, longest_answer: int) -> Tensor:
    """(A, 1, longest answer, longest prompt + longest answer): all of the own prompt, then the answer's past."""
    prompt = torch.arange(longest_prompt) < prompt_lengths[:, None, None]
    past = torch.ones(longest_answer, longest_answer, dtype=torch.bool).tril()
    answers = len(prompt_lengths)
    return torch.cat([prompt.expand(-1, longest_answer, -1), past.expand(answers, -1, -1)], dim=2)[:, None]


def _homes(length: int, prompts: list[Tensor], answers: list[Tensor]) -> Tensor:
    """For each token of the line, where it stands when the padded prompts and answers are laid end to end.

    With the first one, if it is in none of them.
    """
    home = torch.zeros(length, dtype=torch.long)
    start = 0
    for blocks in (prompts, answers):
        width = max(map(len, blocks), default=0)
        for block in blocks:
            home[block] = start + torch.arange(len(block))
            start += width
    return home


class BlockAttention(Attention):
    """Long prompts: block by block, which pads nothing and gathers nothing."""

    def __init__(self, line: PackedSequence, device: torch.device) -> None:
        self.blocks = blocks_of_sequence(line)
        self.last_blocks = blocks_of_sequence(line, in_last_layer=True)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.blocks)

    def in_last_layer(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.last_blocks)

    @staticmethod
    def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float | None, blocks: Sequence[Block]) -> Tensor:
        heads, width = key.shape[1], key.shape[3]
        asked = query[0].unflatten(0, (heads, -1)).transpose(1, 2)  # (key heads, N, heads of each, D)
        scale = width**-0.5 if scale is None else scale
        attended = attend_in_blocks(asked.flatten(1, 2), key[0], value[0], blocks, scale)
        return attended.view(asked.shape).transpose(0, 1).flatten(1, 2)[None]


class FusedAttention(Attention):
    """This package's own kernel for CPUs."""

    def __init__(self, line: PackedSequence, device: torch.device) -> None:
        self.blocks, self.last_blocks = (fused.blocks_of_sequence(line, in_last_layer=last) for last in (False, True))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.blocks)

    def in_last_layer(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self._attended(query, key, value, scale, self.last_blocks)

    @staticmethod
    def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float | None, blocks: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return fused.attend_fused(query[0], key[0], value[0], blocks, scale)[None]


class FlexAttention(Attention):
    """One fused kernel that skips the blocks of the mask in which nobody sees anybody.

    Nothing is read back from the device, and what is made there grows with the tokens, and with pairs of blocks.
    """

    def __init__(self, line: PackedSequence, device: torch.device) -> None:
        rows, segments = (own.to(device, non_blocking=True) for own in (line.rows, line.segments))

        def sees(_batch: Tensor, _head: Tensor, viewer: Tensor, seen: Tensor) -> Tensor:
            shared = (segments[seen] == 0) | (segments[seen] == segments[viewer])
            return (viewer >= seen) & (rows[seen] == rows[viewer]) & shared

        self.mask = flex.block_mask(*_blocks(line, device), sees, len(line))
        self.attend = _flex_kernel(device.type)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        attended: Tensor = self.attend(query, key, value, self.mask, scale)
        return attended.transpose(1, 2)


def _blocks(line: PackedSequence, device: torch.device) -> tuple[Tensor, Tensor]:
    """Twice (B, B): pairs of blocks in which some tokens see each other but not all, and pairs in which all do.

    Of the tokens before it, one sees its prompt and its own segment from their starts. These places only grow along
    the line, so a block's first token sees the furthest back, and what its first and its last see, the others do too.
    """
    # What the last block lacks sees nothing, and so the block never sees all of another.
    spans = pad(torch.stack(seen_spans(line)), (0, -len(line) % flex.BLOCK), value=len(line))
    bounds = torch.stack([spans[:, :: flex.BLOCK], spans[:, flex.BLOCK - 1 :: flex.BLOCK]])
    (prompt, prompt_end, own), (last_prompt, _, last_own) = bounds[..., None].to(device, non_blocking=True)
    start = torch.arange(0, len(line), flex.BLOCK, device=device)
    end = start + flex.BLOCK
    meet = (own < end) | ((prompt < end) & (start < prompt_end))
    # All in one row, and either of its prompt, or of nothing between that and the own segment of all that look.
    alike = (last_prompt <= start) & ((end <= prompt_end) | (last_own <= start.maximum(prompt_end)))
    alike = alike.tril(-1)
    return meet.tril() & ~alike, alike


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
    """`auto`: flex on GPUs; on CPUs fused where that is quick, else as suits the length of a line.

    Once a line's attention is fused, so is an image's.
    """
    if name == "auto" and device.type == "cuda":
        name = "flex"
    elif name == "auto" and fused.is_quick():
        name = "fused"
    if name == "fused":
        fused.choose()
    return _by_length if name == "auto" else ATTENTIONS[name]


def packs_images(attention: Attention, device: torch.device) -> bool:
    """Whether all images beside this line are attended to in one kernel too: by the same compiler, on GPUs alone."""
    return isinstance(attention, FlexAttention) and device.type == "cuda"


def _by_length(line: PackedSequence, device: torch.device) -> Attention:
    prompts = [stop - start for start, stop, of_answer in stretches(line) if not of_answer]
    return (BlockAttention if worth_it(max(prompts)) else GroupedAttention)(line, device)


class _Kernel(torch.autograd.Function):
    """Saves what flash attention, FlexAttention and this package's CPU kernel save: inputs, output, log-sum-exp."""

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
    """(B, heads, N, D) and twice (B, key heads, N, D) -> (B, N, heads, D), without values."""
    out: Tensor = _Kernel.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


class KernelShape(Attention):
    """The attention of a packed sequence of any length, for `kernel_shape`."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return kernel_shape(query, key, value)

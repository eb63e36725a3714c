"""Fused CPU attention kernel (fused.cpp), compiled by g++ on first use, in about two seconds."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from othink_ray.core.packed_sequence import PackedSequence, segment_spans

_SOURCE = Path(__file__).with_suffix(".cpp")
_NATIVE_FLAG = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_WIDE = 16  # 23 + 54 ms (forward + backward) for an image of 2304 patches, torch 28 + 77 (EPYC 25/17, one thread)
_CHOSEN = Event()  # set once the kernel is selected for images too
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", _NATIVE_FLAG)


class _Inputs(ctypes.Structure):
    """The struct `Inputs` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("query", "key", "value") for axis in ("head", "token")),
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "key_heads", "depth")),
        ("blocks", ctypes.c_void_p),
        ("block_count", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("as_vllm", ctypes.c_int32),
    )


@cache
def open_kernel(*more_flags: str) -> ctypes.CDLL:
    """Compile and load the kernel, once per process: a cached file could have been built for another processor."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fused.so"
        command = ["g++", *_FLAGS, *more_flags, str(_SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            raise RuntimeError(
                f"g++ could not compile {_SOURCE.name}: {output.strip().splitlines()[0]}; install g++ 9 or newer, or "
                "set learner.attention=grouped"
            ) from error


def is_quick() -> bool:
    """Return whether the kernel compiles for wide registers; with narrower ones it is slower than torch or untested."""
    try:
        return bool(open_kernel().part() >= _WIDE)
    except RuntimeError as error:
        warnings.warn(str(error), stacklevel=2)
        return False


def choose() -> None:
    """Select the kernel for images too, for the rest of this process."""
    open_kernel()
    _CHOSEN.set()


def is_chosen() -> bool:
    return _CHOSEN.is_set()


def blocks_of_image(tokens: int) -> Tensor:
    """Return the single block (1, 7) of an image, in which every patch attends to every patch."""
    return torch.tensor([[0, tokens, 0, 0, 0, tokens, False]])


def blocks_of_sequence(sequence: PackedSequence, *, in_last_layer: bool) -> Tensor:
    """Return the causal blocks (S, 7) of a packed sequence, as rows of the kernel's struct `Block`.

    Prompts attend to themselves, answers to their prompt and themselves. In the last layer, the only query of a prompt
    is its last token.
    """
    blocks = []
    prompt = (0, 0)
    for start, stop, of_answer in segment_spans(sequence):
        if not of_answer:
            prompt = (start, stop)
        first = stop - 1 if in_last_layer and not of_answer else start
        blocks.append([first, stop, *(prompt if of_answer else (0, 0)), start, stop, True])
    return torch.tensor(blocks)


def suits(query: Tensor) -> bool:
    """Return whether the kernel supports this head dimension without padding."""
    kernel, width = open_kernel(), query.shape[-1]
    known: bool = width % kernel.part() == 0 and width <= kernel.deepest()
    return known


def attend_fused(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """Map query (heads, N, D), key and value (key heads, N, D) to (N, heads, D); 0 for tokens in no block."""
    kernel, width = open_kernel(), query.shape[-1]
    missing = -width % kernel.part()
    if width + missing > kernel.deepest():
        raise ValueError(f"head dimension {width} is too large for {_SOURCE.name}: set learner.attention=grouped")
    as_vllm = query.dtype != torch.float32  # the output is rounded to half precision: its last bits must match vLLM's
    states = [tensor.float() for tensor in (query, key, value)]
    if missing:  # zeros change no score; the extra output columns are cut off below
        states = [pad(tensor, (0, missing)) for tensor in states]
    attended: Tensor = _Fused.apply(*states, blocks, scale, as_vllm)  # type: ignore[no-untyped-call]
    return attended[..., :width].to(query.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float, as_vllm: bool
    ) -> Tensor:
        states = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)]
        heads, tokens, width = query.shape
        out, logs = query.new_zeros(tokens, heads, width), query.new_zeros(tokens, heads)
        open_kernel().forward(_inputs(states, blocks, scale, as_vllm), *_pointers(out, logs), torch.get_num_threads())
        ctx.save_for_backward(*states, out, logs)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, out, logs = ctx.saved_tensors
        threads = torch.get_num_threads()
        grad_query = torch.zeros_like(out)
        grad_key, grad_value = out.new_zeros(2, threads, key.shape[1], len(key), key.shape[2])
        grad_out = grad.contiguous()  # a named reference: the kernel only holds its address
        pointers = _pointers(out, logs, grad_out, grad_query, grad_key, grad_value)
        open_kernel().backward(_inputs((query, key, value), ctx.blocks, ctx.scale, False), *pointers, threads)
        summed = (grad_query, *(parts[0] if threads == 1 else parts.sum(0) for parts in (grad_key, grad_value)))
        for_query, for_key, for_value = (gradient.transpose(0, 1) for gradient in summed)
        return for_query, for_key, for_value, None, None, None


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _inputs(states: Sequence[Tensor], blocks: Tensor, scale: float, as_vllm: bool) -> Any:
    strides = [stride for tensor in states for stride in tensor.stride()[:2]]
    heads, tokens, width = states[0].shape
    sizes = (tokens, heads, len(states[1]), width)
    return ctypes.byref(
        _Inputs(
            *(tensor.data_ptr() for tensor in states), *strides, *sizes, blocks.data_ptr(), len(blocks), scale, as_vllm
        )
    )

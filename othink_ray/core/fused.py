"""Attention by a kernel of this package for CPUs, which g++ compiles when it is first wanted, in about two seconds."""

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

from othink_ray.core.packed_sequence import PackedSequence, stretches

_SOURCE = Path(__file__).with_suffix(".cpp")
_FOR_THIS_PROCESSOR = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_WIDE = 16  # where the kernel took 23 + 54 ms for an image of 2304 patches, and torch 28 + 77 (EPYC 25/17, one thread)
_CHOSEN = Event()
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", _FOR_THIS_PROCESSOR)


class _Inputs(ctypes.Structure):
    """What the kernel calls `Inputs`."""

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
    """Compiled anew in each process: a file kept for the next one might have been made for another processor."""
    with tempfile.TemporaryDirectory() as place:
        library = Path(place) / "fused.so"
        command = ["g++", *_FLAGS, *more_flags, str(_SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise RuntimeError(
                f"g++ made no kernel of {_SOURCE.name}: {said.strip().splitlines()[0]}; install g++ 9 or newer, or set "
                "learner.attention=grouped"
            ) from error


def is_quick() -> bool:
    """Whether there is a kernel for wide registers: with others it is slower than torch's, or untried."""
    try:
        return bool(open_kernel().part() >= _WIDE)
    except RuntimeError as error:
        warnings.warn(str(error), stacklevel=2)
        return False


def choose() -> None:
    """From now on for images too, in all of this process."""
    open_kernel()
    _CHOSEN.set()


def is_chosen() -> bool:
    return _CHOSEN.is_set()


def blocks_of_image(tokens: int) -> Tensor:
    """All see all."""
    return torch.tensor([[0, tokens, 0, 0, 0, tokens, False]])


def blocks_of_sequence(line: PackedSequence, *, in_last_layer: bool) -> Tensor:
    """A prompt sees its past, an answer its prompt and its own past; of prompts the last layer's last tokens ask."""
    blocks = []
    prompt = (0, 0)
    for start, stop, of_answer in stretches(line):
        if not of_answer:
            prompt = (start, stop)
        first = stop - 1 if in_last_layer and not of_answer else start
        blocks.append([first, stop, *(prompt if of_answer else (0, 0)), start, stop, True])
    return torch.tensor(blocks)


def suits(query: Tensor) -> bool:
    """Whether the kernel takes heads of this width as they are."""
    kernel, width = open_kernel(), query.shape[-1]
    known: bool = width % kernel.part() == 0 and width <= kernel.deepest()
    return known


def attend_fused(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """(heads, N, D) and twice (key heads, N, D) -> (N, heads, D); zeros where a token is in none of the blocks."""
    kernel, width = open_kernel(), query.shape[-1]
    missing = -width % kernel.part()
    if width + missing > kernel.deepest():
        raise ValueError(f"heads of {width} numbers are too wide for {_SOURCE.name}: set learner.attention=grouped")
    as_vllm = query.dtype != torch.float32  # it is rounded next: the last bits decide which way
    states = [own.float() for own in (query, key, value)]
    if missing:  # zeros change no score, and bring zeros that nobody asks for
        states = [pad(own, (0, missing)) for own in states]
    attended: Tensor = _Fused.apply(*states, blocks, scale, as_vllm)  # type: ignore[no-untyped-call]
    return attended[..., :width].to(query.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float, as_vllm: bool
    ) -> Tensor:
        states = [own if own.stride(-1) == 1 else own.contiguous() for own in (query, key, value)]
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
        came = grad.contiguous()  # kept by a name: the kernel has its address alone
        given = _pointers(out, logs, came, grad_query, grad_key, grad_value)
        open_kernel().backward(_inputs((query, key, value), ctx.blocks, ctx.scale, False), *given, threads)
        gradients = (grad_query, *(own[0] if threads == 1 else own.sum(0) for own in (grad_key, grad_value)))
        asked, seen, shown = (own.transpose(0, 1) for own in gradients)
        return asked, seen, shown, None, None, None


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(own.data_ptr()) for own in tensors]


def _inputs(states: Sequence[Tensor], blocks: Tensor, scale: float, as_vllm: bool) -> Any:
    strides = [stride for own in states for stride in own.stride()[:2]]
    heads, tokens, width = states[0].shape
    sizes = (tokens, heads, len(states[1]), width)
    return ctypes.byref(
        _Inputs(*(own.data_ptr() for own in states), *strides, *sizes, blocks.data_ptr(), len(blocks), scale, as_vllm)
    )

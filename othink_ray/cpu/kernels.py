"""Faster CPU kernels, both optional: fused attention in C++, and float32 matmul by oneDNN.

attention.cpp is compiled by g++ on first use, in about two seconds. Without a compiler, or with a torch that was built
without oneDNN, torch's slower kernels give the same results, and a `SlowerKernel` warning says so.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import Library
from torch.nn.functional import pad

_SOURCE = Path(__file__).with_name("attention.cpp")
_NATIVE_FLAG = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
# Fewest floats computed at a time with which the kernel beats torch: 23 + 54 ms (forward + backward) for an image of
# 2304 patches, torch 28 + 77 (one thread of an EPYC, family 25, model 17).
_WIDE = 16
_IMAGES = Event()  # set once the kernel is selected for images too
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", _NATIVE_FLAG)


class SlowerKernel(UserWarning):
    """A faster kernel cannot be used on this machine: torch's own takes its place."""


class _Inputs(ctypes.Structure):
    """The struct `Inputs` of attention.cpp."""

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
def attention_kernel(*more_flags: str) -> ctypes.CDLL:
    """Compile and load the kernel, once per process: a cached file could have been built for another processor."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "attention.so"
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


def attention_is_faster() -> bool:
    """Return whether the kernel compiles for wide registers; with narrower ones it is slower than torch or untested.

    Warn with `SlowerKernel` if it does not compile.
    """
    try:
        return bool(attention_kernel().part() >= _WIDE)
    except RuntimeError as error:
        warnings.warn(f"attention by torch's slower kernels: {error}", SlowerKernel, stacklevel=2)
        return False


def enable_for_images() -> None:
    """Select the attention kernel for images too, for the rest of this process."""
    attention_kernel()
    _IMAGES.set()


def enabled_for_images() -> bool:
    return _IMAGES.is_set()


def image_block(tokens: int) -> Tensor:
    """Return the single block (1, 7) of an image, in which every patch attends to every patch."""
    return torch.tensor([[0, tokens, 0, 0, 0, tokens, False]])


def causal_blocks(segments: Iterable[tuple[int, int, bool]], *, in_last_layer: bool) -> Tensor:
    """Return the causal blocks (S, 7) of a packed sequence, as rows of the kernel's struct `Block`.

    `segments` are (start, end, is answer). Prompts attend to themselves, answers to their prompt and themselves. In the
    last layer, the only query of a prompt is its last token.
    """
    blocks = []
    prompt = (0, 0)
    for start, stop, of_answer in segments:
        if not of_answer:
            prompt = (start, stop)
        first = stop - 1 if in_last_layer and not of_answer else start
        blocks.append([first, stop, *(prompt if of_answer else (0, 0)), start, stop, True])
    return torch.tensor(blocks)


def supports_head_dim(query: Tensor) -> bool:
    """Return whether the kernel supports this head dimension without padding."""
    kernel, width = attention_kernel(), query.shape[-1]
    known: bool = width % kernel.part() == 0 and width <= kernel.deepest()
    return known


def fused_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """Map query (heads, N, D), key and value (key heads, N, D) to (N, heads, D); 0 for tokens in no block."""
    kernel, width = attention_kernel(), query.shape[-1]
    missing = -width % kernel.part()
    if width + missing > kernel.deepest():
        raise ValueError(
            f"head dimension {width} must be at most {kernel.deepest()} for {_SOURCE.name}: set "
            "learner.attention=grouped"
        )
    as_vllm = query.dtype != torch.float32  # the output is rounded to half precision: its last bits must match vLLM's
    states = [tensor.float() for tensor in (query, key, value)]
    if missing:  # zeros change no score; the extra output columns are cut off below
        states = [pad(tensor, (0, missing)) for tensor in states]
    attended: Tensor = _FusedAttention.apply(*states, blocks, scale, as_vllm)  # type: ignore[no-untyped-call]
    return attended[..., :width].to(query.dtype)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float, as_vllm: bool
    ) -> Tensor:
        states = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)]
        heads, tokens, width = query.shape
        out, logs = query.new_zeros(tokens, heads, width), query.new_zeros(tokens, heads)
        attention_kernel().forward(
            _inputs(states, blocks, scale, as_vllm), *_pointers(out, logs), torch.get_num_threads()
        )
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
        attention_kernel().backward(_inputs((query, key, value), ctx.blocks, ctx.scale, False), *pointers, threads)
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


def onednn_available() -> bool:
    """Return whether this torch was built with oneDNN; warn with `SlowerKernel` if not.

    torch's default BLAS is half as fast as oneDNN on processors that it is not tuned for.
    """
    available: bool = torch.backends.mkldnn.is_available()
    if not available:
        warnings.warn(
            "float32 matmul uses torch's slower BLAS: this torch was built without oneDNN. Install a build that has "
            "it, or silence this warning with learner.onednn=false",
            SlowerKernel,
            stacklevel=2,
        )
    return available


def onednn_matmul() -> Library:
    """Route this process's float32 matrix products to oneDNN, backward included, while the returned handle lives."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*other operators may also be overridden")
        library.impl("mm", _mm, "CPU")
        library.impl("addmm", _addmm, "CPU")
    return library


def matmul(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    """Return left @ right (+ added), computed as under `onednn_matmul`."""
    return _mm(left, right) if added is None else _addmm(added, left, right)


def empty_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return uninitialized memory with the shape and strides of `left @ right`."""
    if _transposed_is_faster(left, right):
        return left.new_empty(right.shape[1], left.shape[0]).t()
    return left.new_empty(left.shape[0], right.shape[1])


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if _onednn_supports(left) and _onednn_supports(right):
        if _transposed_is_faster(left, right):
            return _onednn_linear(_dense(right).t(), left.t(), None).t()
        return _onednn_linear(_dense(left), _dense(right), None)
    return torch.mm(left, right, out=empty_matmul(left, right))  # torch's own kernel: `out=` skips the override


def _addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 1 and alpha == 1 and added.dim() == 1 and all(map(_onednn_supports, (left, right))):
        return _onednn_linear(_dense(left), _dense(right), added)
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(added, left, right, beta=beta, alpha=alpha, out=out)


def _transposed_is_faster(left: Tensor, right: Tensor) -> bool:
    """Return whether to compute (right.T @ left.T).T instead: oneDNN copies a transposed left factor."""
    return not left.is_contiguous() and left.t().is_contiguous() and left.shape[0] > right.shape[1]


def _onednn_supports(matrix: Tensor) -> bool:
    """Return whether a matrix is float32, not empty, not expanded and not a strided slice of columns."""
    return matrix.dtype == torch.float32 and matrix.numel() > 0 and 1 in matrix.stride()


def _dense(matrix: Tensor) -> Tensor:
    """Return `matrix`, copied if it is a slice: oneDNN multiplies slices in reference loops, 1000 times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _onednn_linear(left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), added, "none", [], "")
    return product

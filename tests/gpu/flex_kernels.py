"""Compile the learner's FlexAttention for an H100 on a machine without one; print each kernel as JSON.

    python -m tests.gpu.flex_kernels forward|backward sequence HEADS KEY_HEADS
    python -m tests.gpu.flex_kernels forward|backward images HEADS WIDTH

Inductor lowers the learner's calls to Triton, and Triton compiles to a cubin for sm_90: neither needs a device.
Runs as a separate program: the faked device stays for the life of the process.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import json
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ANSWERS = 8
SEQUENCES = ((600, 256), (60, 6))  # tokens of a prompt and of each answer; the second is shorter than a block
# Patches of each image of a micro-batch: ragged images, then windows of Qwen2.5-VL with cut windows at the edges.
IMAGES = ((2080, 1280, 48, 900), (*[64] * 50, *[32] * 9, 16, 48), (128,) * 5, (4,), (100,), (60, 40, 28))
STREAM_MULTIPROCESSORS, SHARED_BYTES = 132, 232_448
Captured = list[tuple[str, str]]


class LoweredError(Exception):
    """Raised once everything is compiled, where a device would run it."""


def _stop(*_: Any) -> Any:
    raise LoweredError


def pretend_hopper() -> Captured:
    """Fake one H100 for torch; return the list that collects kernels as (name, source) instead of loading them."""
    import torch
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import async_compile, output_code
    from torch._inductor import config as inductor
    from torch._inductor.fx_passes import joint_graph, post_grad
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = SimpleNamespace(
        name="NVIDIA H100",
        major=9,
        minor=0,
        multi_processor_count=STREAM_MULTIPROCESSORS,
        total_memory=80 * 2**30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_BYTES,
        shared_memory_per_multiprocessor=233_472,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
    )
    shared = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _device: None,
        "get_device_properties": lambda _device=None: properties,
        "current_stream": lambda *_: mock.Mock(),
        "synchronize": lambda _device=None: None,
    }
    of_cuda = {
        "get_device_capability": lambda _device=None: (9, 0),
        "get_device_name": lambda _device=None: properties.name,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda *_: torch.zeros(1),
        "set_rng_state": lambda *_, **__: None,
        "_exchange_device": lambda _device: 0,
        "_maybe_exchange_device": lambda _device: 0,
    }
    interface = {
        "get_compute_capability": lambda _device=None: 90,
        "exchange_device": lambda _device: 0,
        "maybe_exchange_device": lambda _device: 0,
        "is_triton_capable": lambda _device=None: True,
        "raise_if_triton_unavailable": lambda _device=None: None,
        "is_bf16_supported": lambda including_emulation=False: True,
        "get_raw_stream": lambda _device=0: 0,
    }
    for name, value in (shared | of_cuda).items():
        setattr(torch.cuda, name, value)
    for name, value in (shared | interface).items():
        setattr(CudaInterface, name, staticmethod(value))
    for name in ("current_device", "set_device", "get_device_properties"):
        setattr(CudaInterface.Worker, name, staticmethod(shared[name]))
    torch.version.cuda = "13.0"
    torch.accelerator.is_available = lambda: False  # type: ignore[assignment]
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")  # type: ignore[assignment]
    torch._C._cuda_getCurrentRawStream = lambda _device=0: 0
    torch._C._cuda_setDevice = lambda _device: None

    class Driver(mock.MagicMock):
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> Any:
            return torch.device("cuda", 0)

    driver.set_active(Driver())
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_, **__: None  # patterns are traced on a device
    inductor.pattern_matcher = False
    inductor.force_disable_caches = True
    import torch._higher_order_ops.flex_attention

    # The original would copy to the query's strides, which the result already has.
    flex = sys.modules["torch._higher_order_ops.flex_attention"]
    flex._permute_strides = lambda out, _strides: torch.empty_like(out)  # type: ignore[attr-defined]
    output_code.CompiledFxGraph.__call__ = _stop  # type: ignore[method-assign, assignment]
    captured: Captured = []

    def keep(_self: Any, name: str, source: str, device_str: str = "cuda") -> Any:
        captured.append((name, source))
        return mock.MagicMock()

    async_compile.AsyncCompile.triton = keep  # type: ignore[method-assign, assignment]
    return captured


@dataclass(frozen=True, slots=True)
class Case:
    """An attention of the learner, built on the CPU, and the shapes of its inputs."""

    attention: Any  # has a block mask, and is called with query, key, value and scale
    kernel: Callable[..., Any]  # the kernel that it runs on CUDA
    captured: tuple[str, ...]  # names of the tensors that its mask function closes over
    heads: int
    key_heads: int
    width: int  # of a head

    @property
    def length(self) -> int:
        length: int = self.attention.mask.seq_lengths[0]
        return length

    def states(self) -> tuple[Any, Any, Any]:
        """Return query, key and value in bfloat16, with a token's heads contiguous, as a projection returns them."""
        import torch

        made = [
            torch.empty(1, self.length, heads, self.width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for heads in (self.heads, self.key_heads, self.key_heads)
        ]
        return made[0], made[1], made[2]


def packed_sequence(heads: int, key_heads: int, prompt: int, answer: int) -> Case:
    """Build `core.attention.FlexAttention` over one packed sequence: a prompt with its answers."""
    import numpy as np
    import torch

    from othink_ray.core import attention as ours
    from othink_ray.core.packed_sequence import build_packed_sequence

    segments = [0] * prompt + [1 + index // answer for index in range(ANSWERS * answer)]
    sequence = build_packed_sequence([np.array(segments, dtype=np.int32)])
    attention = ours.FlexAttention(sequence, torch.device("cpu"))
    return Case(attention, ours._flex_kernel("cuda"), ("sample_ids", "segment_ids"), heads, key_heads, 128)


def packed_images(heads: int, width: int, patches: Sequence[int]) -> Case:
    """Build `core.flex.PackedImages` over images, or windows, with these numbers of patches."""
    import torch

    from othink_ray.core import flex as ours

    attention = ours.PackedImages(torch.tensor([0, *itertools.accumulate(patches)]), torch.device("cpu"))
    return Case(attention, ours._kernel("cuda"), ("image_of",), heads, heads, width)


def over(mask: Callable[..., Any], tensors: dict[str, Any]) -> Callable[..., Any]:
    """Return the learner's mask function with these tensors in its closure."""
    assert isinstance(mask, types.FunctionType)
    assert set(mask.__code__.co_freevars) == set(tensors), mask.__code__.co_freevars
    cells = tuple(types.CellType(tensors[name]) for name in mask.__code__.co_freevars)
    return types.FunctionType(mask.__code__, mask.__globals__, mask.__name__, mask.__defaults__, cells)


TABLES = [
    f"{full}{axis}_{what}" for axis in "kv q".split() for full in ("", "full_") for what in ("num_blocks", "indices")
]


def lower_forward(case: Case) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    attention = case.attention
    with FakeTensorMode(shape_env=ShapeEnv()):
        closure = {name: torch.zeros(case.length, dtype=torch.int64, device="cuda") for name in case.captured}
        attention.mask.mask_mod = over(attention.mask.mask_mod, closure)
        for name in TABLES:
            table = getattr(attention.mask, name)
            setattr(attention.mask, name, torch.empty(table.shape, dtype=table.dtype, device="cuda"))
        attention.attend = case.kernel
        with contextlib.suppress(LoweredError):
            attention(*case.states(), case.width**-0.5)


def lower_backward(case: Case) -> None:
    """Trace the kernel's backward and give it to Inductor directly: running autograd would need a device."""
    import torch
    import torch._higher_order_ops.flex_attention
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    flex = sys.modules["torch._higher_order_ops.flex_attention"]
    block_mask, length = case.attention.mask, case.length
    options = {
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": True,
        "OUTPUT_MAX": False,
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        scalars = [torch.zeros((), dtype=torch.bfloat16, requires_grad=True)]
        scalars += [torch.zeros((), dtype=torch.int32) for _ in range(4)]
        forward, joint = flex.create_fw_bw_graph(lambda score, _b, _h, _m, _n: score, tuple(scalars), ())
    with FakeTensorMode(shape_env=ShapeEnv()) as fake:

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        def mask(b: Any, h: Any, viewer: Any, seen: Any, *closure: Any) -> Any:
            return over(block_mask.mask_mod, dict(zip(case.captured, closure, strict=True)))(b, h, viewer, seen)

        query, key, value = case.states()
        sums = [empty(1, case.heads, length, dtype=torch.float32) for _ in range(2)]
        numbers = [torch.zeros(length, dtype=torch.int64, device="cuda") for _ in case.captured]
        tables = [empty(*table.shape, dtype=table.dtype) for table in (getattr(block_mask, name) for name in TABLES)]
        out, grad = torch.empty_like(query), torch.empty_like(query)
        inputs = [query, key, value, out, sums[0], grad, sums[1], *numbers]

        def back(query: Any, key: Any, value: Any, out: Any, lse: Any, grad: Any, grad_lse: Any, *rest: Any) -> Any:
            closure, blocks = rest[: len(case.captured)], rest[len(case.captured) :]
            described = (length, length, *blocks, None, None, None, None, *block_mask.BLOCK_SIZE, mask)
            return flex.flex_attention_backward(
                query, key, value, out, lse, grad, grad_lse, forward, joint, described, case.width**-0.5, options,
                (), closure,
            )[:3]  # fmt: skip

        graph = make_fx(back, tracing_mode="real")(*inputs, *tables)
        with tracing(TracingContext(fake)), V.set_fake_mode(fake):
            compile_fx_inner(graph, [*inputs, *tables])


def compiled(name: str, source: str, folder: Path) -> dict[str, Any]:
    """Compile a kernel's source with Triton for sm_90, with the warps and stages that Inductor chose."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def chosen(pattern: str, otherwise: str) -> Any:
        found = re.search(pattern, source, re.DOTALL)
        return ast.literal_eval(found.group(1) if found else otherwise)

    body = source[source.index("@triton.jit") :]
    imports = (
        "from torch._inductor.runtime import triton_helpers\n"
        "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"
        "import triton\nimport triton.language as tl\n"
    )
    file = folder / f"{name}.py"
    file.write_text(imports + body)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = triton.compile(
        ASTSource(
            fn=getattr(module, name),
            signature=chosen(r"'signature': (\{.*?\})", "{}"),
            constexprs=chosen(r"'constants': (\{.*?\})", "{}"),
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": chosen(r"num_warps=(\d+)", "4"), "num_stages": chosen(r"num_stages=(\d+)", "3")},
    )
    return {
        "name": name,
        "shared": made.metadata.shared,
        "tensor cores": "wgmma" in made.asm["ptx"],
        "cubin": len(made.asm["cubin"]),
    }


def main(direction: str, kind: str, *numbers: int) -> None:
    lower = lower_forward if direction == "forward" else lower_backward
    with tempfile.TemporaryDirectory() as made:
        os.environ |= {
            "TORCHINDUCTOR_CACHE_DIR": f"{made}/inductor",
            "TRITON_CACHE_DIR": f"{made}/triton",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        captured = pretend_hopper()
        if kind == "sequence":
            cases = [partial(packed_sequence, *numbers, *lengths) for lengths in SEQUENCES]
        else:
            cases = [partial(packed_images, *numbers, patches) for patches in IMAGES]
        for case in cases if direction == "forward" else cases[:1]:
            lower(case())
        for name, source in captured:
            if name.startswith("triton_tem"):  # the attention template; other kernels are reductions
                print("KERNEL " + json.dumps(compiled(name, source, Path(made))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

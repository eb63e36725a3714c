"""Machines on which a faster kernel is absent: torch's own takes its place, with one line and equal results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from othink_ray.core.attention import FusedAttention, GroupedAttention, attention_for
from othink_ray.cpu.kernels import SlowerKernel, onednn_available
from tests.core.test_packed_sequence import CPU, sequence_of
from tests.cpu.test_attention import HEADS, LONG, SCALE, states

ROOT = Path(__file__).resolve().parents[2]

# A learner process as Ray runs it, with an engine that only chooses its attention.
_LOADING = """
import json, sys, torch
from othink_ray.core.attention import attention_for
from othink_ray.runtime.actors import LearnerActor
from tests.cpu.test_absent import attended

actor = LearnerActor()
notices = actor.start(lambda _: attention_for("auto", torch.device("cpu")), None)
kind, *tensors = attended(actor.engine)
torch.save(tensors, sys.argv[1])
print(json.dumps({"notices": notices, "kind": kind}))
"""


def attended(attend: object = None) -> list[object]:
    """Return the class that `auto` chooses, and its output and gradients on a packed sequence."""
    sequence = sequence_of(LONG)
    attention = (attend or attention_for("auto", CPU))(sequence, CPU)  # type: ignore[operator]
    given = states(sequence, *HEADS[0])
    out: Tensor = attention(*given, SCALE)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return [type(attention).__name__, out.detach(), *torch.autograd.grad((out * direction).sum(), given)]


def test_without_a_compiler_attention_is_torchs_with_one_line(tmp_path: Path) -> None:
    saved, empty = tmp_path / "attended.pt", tmp_path / "bin"
    empty.mkdir()
    environment = os.environ | {"PATH": str(empty), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _LOADING, str(saved)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    [line] = found["notices"]
    assert line.startswith("attention by torch's slower kernels: g++ could not compile attention.cpp: ")
    assert "install g++ 9 or newer" in line and "\n" not in line
    kind, *expected = attended()
    assert (found["kind"], kind) == (GroupedAttention.__name__, FusedAttention.__name__)
    assert_close(torch.load(saved), expected, atol=2e-5, rtol=1e-4)


def test_without_onednn_one_line_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.warns(SlowerKernel, match=r"^float32 matmul uses torch's slower BLAS: .* with learner\.onednn=false$"):
        assert not onednn_available()

"""Devices of the learner and the Hugging Face engine, compiled and pruned layers, and the prefetch thread."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from othink_ray.config.schema import Config
from othink_ray.cpu.kernels import SlowerKernel
from othink_ray.engines import deepspeed_learner
from othink_ray.engines.deepspeed_learner import DeepSpeedLearner
from othink_ray.engines.hf_rollout import HFRollout
from othink_ray.engines.policy import Policy
from othink_ray.families.hugging_face import is_pruned


class _DeviceChosenError(Exception):
    """Stops an engine's constructor after it has chosen its device."""


class Stop:
    """Rendezvous info and family in one, which stop the constructor at their first use."""

    rank, world_size = 0, 2

    def join(self, device: torch.device) -> None:
        raise _DeviceChosenError

    def load_network(self, dtype: torch.dtype) -> None:
        raise _DeviceChosenError


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "cuda"), (1, "cuda")])
def test_the_hf_engine_runs_where_its_gpu_share_is(config: Config, gpus: float, device: str) -> None:
    engine, family = HFRollout.__new__(HFRollout), Stop()
    with pytest.raises(_DeviceChosenError):
        engine.__init__(replace(config.rollout, gpus_per_actor=gpus), config.model, family)  # type: ignore[misc]
    assert engine.device.type == device


@pytest.mark.parametrize(
    ("gpus", "onednn", "built", "device", "threads", "override"),
    [
        (0, True, True, "cpu", [3], "oneDNN"),
        (0, False, True, "cpu", [3], None),
        (0, True, False, "cpu", [3], None),
        (0.5, True, True, "cuda", [], "none"),
    ],
)
def test_the_learner_runs_where_its_gpu_share_is(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    gpus: float,
    onednn: bool,
    built: bool,
    device: str,
    threads: list[int],
    override: str | None,
) -> None:
    """On a GPU, neither threads nor matmul are changed; a torch that was built without oneDNN is no failure."""
    set_threads: list[int] = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(ops=SimpleNamespace(__compatible_ops__={})))
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(deepspeed_learner, "onednn_matmul", lambda: "oneDNN")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    learner = DeepSpeedLearner.__new__(DeepSpeedLearner)
    rendezvous: Any = Stop()
    how: dict[str, Any] = dict.fromkeys(("family", "temperature", "clip_eps", "kl_estimator", "tis_bounds"))
    settings = replace(config.learner, gpus_per_rank=gpus, onednn=onednn, threads=None, world_size=2)
    warned = nullcontext() if built else pytest.warns(SlowerKernel, match="built without oneDNN")
    with warned, pytest.raises(_DeviceChosenError):
        learner.__init__(  # type: ignore[misc]
            settings, **how, dtype="float32", with_reference=False, seed=0, rendezvous=rendezvous, shares_gpu=False
        )
    assert (learner.device.type, os.environ["DS_ACCELERATOR"], set_threads) == (device, device, threads)
    assert getattr(learner, "matmul_override", "none") == override


@pytest.mark.parametrize("requested", [True, False])
def test_layers_are_compiled_and_the_last_pruned_on_request(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, requested: bool
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(deepspeed_learner, "compile_layers", lambda *_, by_onednn: compiled.append(by_onednn))
    settings = SimpleNamespace(prune_last_layer=requested, compile=requested, logit_rows=64)
    learner: Any = SimpleNamespace(learner=settings, family=policy.family, by_onednn=True)
    opened = DeepSpeedLearner._open_policy(learner, torch.float32, 1.0)
    *others, last = policy.family.layers(opened.network)
    assert is_pruned(last) == requested and not any(map(is_pruned, others))
    assert compiled == ([True] if requested else [])


@pytest.mark.parametrize(
    ("cores", "device", "prefetched"), [(8, "cpu", False), (9, "cpu", True), (None, "cpu", False), (9, "cuda", False)]
)
def test_the_reference_is_prefetched_where_a_core_is_free(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, cores: int | None, device: str, prefetched: bool
) -> None:
    """Two ranks of four threads leave one of nine cores free."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    learner: Any = SimpleNamespace(
        learner=SimpleNamespace(world_size=2, logit_rows=64),
        reference=policy,
        device=torch.device(device),
        family=policy.family,
    )
    second = DeepSpeedLearner._open_prefetch_reference(learner, 1.0)
    assert (second is not None) == prefetched
    if second is not None:
        assert second is not policy
        assert second.network is policy.network
    learner.reference = None
    assert DeepSpeedLearner._open_prefetch_reference(learner, 1.0) is None

"""Where learner and oracle compute, what the learner makes of its layers, and what it does on a second thread."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from othink_ray.config.schema import Config
from othink_ray.engines import deepspeed_learner
from othink_ray.engines.deepspeed_learner import DeepSpeedLearner
from othink_ray.engines.hf_rollout import HFRollout
from othink_ray.engines.policy import Policy
from othink_ray.families.hugging_face import is_pruned


class _EnoughError(Exception):
    """The device is chosen."""


class Nowhere:
    """A place where no other rank comes, and a family without a network."""

    rank, world_size = 0, 2

    def rendezvous(self, device: torch.device) -> None:
        raise _EnoughError

    def load_network(self, dtype: torch.dtype) -> None:
        raise _EnoughError


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "cuda"), (1, "cuda")])
def test_the_oracle_is_where_its_share_of_a_gpu_is(config: Config, gpus: float, device: str) -> None:
    engine, family = HFRollout.__new__(HFRollout), Nowhere()
    with pytest.raises(_EnoughError):
        engine.__init__(replace(config.rollout, gpus_per_actor=gpus), config.model, family)  # type: ignore[misc]
    assert engine.device.type == device


@pytest.mark.parametrize(
    ("gpus", "onednn", "device", "threads", "products"),
    [(0, True, "cpu", [3], "oneDNN"), (0, False, "cpu", [3], None), (0.5, True, "cuda", [], "none")],
)
def test_a_learner_is_where_its_share_of_a_gpu_is(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    gpus: float,
    onednn: bool,
    device: str,
    threads: list[int],
    products: str | None,
) -> None:
    """Elsewhere than on a CPU neither its threads nor its products are changed."""
    told: list[int] = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(ops=SimpleNamespace(__compatible_ops__={})))
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(deepspeed_learner, "onednn_matmul", lambda: "oneDNN")
    monkeypatch.setattr(deepspeed_learner, "onednn_available", lambda: True)
    learner = DeepSpeedLearner.__new__(DeepSpeedLearner)
    place: Any = Nowhere()
    how: dict[str, Any] = dict.fromkeys(("family", "temperature", "clip_eps", "kl_estimator", "correction_bounds"))
    settings = replace(config.learner, gpus_per_rank=gpus, onednn=onednn, threads=None, world_size=2)
    with pytest.raises(_EnoughError):
        learner.__init__(  # type: ignore[misc]
            settings, **how, dtype="float32", with_reference=False, seed=0, place=place, shares_gpu=False
        )
    assert (learner.device.type, os.environ["DS_ACCELERATOR"], told) == (device, device, threads)
    assert getattr(learner, "matmul_override", "none") == products


@pytest.mark.parametrize("asked", [True, False])
def test_a_policys_layers_are_compiled_and_the_last_one_narrowed_where_that_is_asked(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    compiled: list[bool] = []
    monkeypatch.setattr(deepspeed_learner, "compile_layers", lambda *_, by_onednn: compiled.append(by_onednn))
    settings = SimpleNamespace(narrow_last_layer=asked, compile=asked, logit_rows=64)
    learner: Any = SimpleNamespace(learner=settings, family=policy.family, by_onednn=True)
    opened = DeepSpeedLearner._open_policy(learner, torch.float32, 1.0)
    *others, last = policy.family.layers(opened.network)
    assert is_pruned(last) == asked and not any(map(is_pruned, others))
    assert compiled == ([True] if asked else [])


@pytest.mark.parametrize(
    ("cores", "device", "beside"), [(8, "cpu", False), (9, "cpu", True), (None, "cpu", False), (9, "cuda", False)]
)
def test_the_reference_runs_beside_the_policy_where_a_core_is_left(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, cores: int | None, device: str, beside: bool
) -> None:
    """Two ranks of four threads leave one of nine cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    learner: Any = SimpleNamespace(
        learner=SimpleNamespace(world_size=2, logit_rows=64),
        reference=policy,
        device=torch.device(device),
        family=policy.family,
    )
    second = DeepSpeedLearner._open_prefetch_reference(learner, 1.0)
    assert (second is not None) == beside
    if second is not None:
        assert second is not policy
        assert second.network is policy.network
    learner.reference = None
    assert DeepSpeedLearner._open_prefetch_reference(learner, 1.0) is None

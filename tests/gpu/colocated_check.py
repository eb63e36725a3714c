"""The GPU check's colocated parts with the DeepSpeed learner instead of the check's plain learner."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu import colocated, engine_process
from benchmarks.gpu.rows import Row
from benchmarks.gpu.setup import Setup
from benchmarks.work import BETA
from othink_ray.config.load import load
from othink_ray.core.packing import pack
from othink_ray.engines.base import RendezvousInfo, rendezvous_store
from othink_ray.types import Pack, Probe, ScoredGroup, UpdateSettings
from tests.gpu import fake_device


class RunsLearner:
    """The DeepSpeed learner on one rank, behind the interface of the check's learner."""

    def __init__(self, setup: Setup, *, lr: float, shares_gpu: bool = False) -> None:
        from othink_ray.engines.deepspeed_learner import DeepSpeedLearner
        from othink_ray.families import open_family

        model = setup.model()
        assert model.path is not None
        self.lr = lr
        self.store = rendezvous_store()
        self.engine = DeepSpeedLearner(
            load(["learner.threads=1", f"learner.lr={lr}"]).learner,
            open_family(model, model.path),
            dtype=setup.dtype,
            temperature=1.0,
            clip_eps=(0.2, 0.2),
            kl_estimator="k3",
            tis_bounds=(0.5, 2.0),
            with_reference=True,
            seed=0,
            rendezvous=RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=self.store.port),
            shares_gpu=shares_gpu,
        )

    def packs(self, groups: Sequence[ScoredGroup]) -> list[Pack]:
        return [pack(one, one.rewards - one.rewards.mean(), len(groups)) for one in groups]

    def batch(self, row: Pack) -> Pack:
        return row

    def update(self, rows: Sequence[Pack]) -> None:
        micro_batches = [[row] for row in rows]
        stats = self.engine.update([micro_batches], UpdateSettings(beta=BETA, lr=self.lr, loss="grpo", tis="none"))
        assert stats.tokens > 0 and stats.skipped == 0

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.engine.named_weights()

    def release_memory(self) -> None:
        self.engine.release_memory()

    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        return self.engine.candidate_logprobs(probes)

    def peak_gb(self) -> float:
        return 0.0


def rehearse(setup: Setup, part: str) -> list[dict[str, Any]]:
    """Run one part of the check and return its records; DeepSpeed's process group stays in the calling process."""
    os.environ[fake_device.FOLDER] = str(setup.folder)
    part_of_check = getattr(colocated, part)
    with (
        mock.patch.object(engine_process, "serve_engine", fake_device.serve),
        mock.patch.object(colocated, "open_learner", RunsLearner),
        mock.patch.object(torch.cuda, "device_count", lambda: 2),
        fake_device.device(),
    ):
        rows: list[Row] = list(part_of_check(setup))
    return [row.record() for row in rows]

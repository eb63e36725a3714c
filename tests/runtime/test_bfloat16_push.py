"""Pushes in bfloat16 at a real model's rate, where an update turns the last bit of one weight in a hundred.

Every stage passes both proofs after each of its updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from othink_ray.config.schema import Config
from othink_ray.driver.build import learner_engine, open_team
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.placement import Placement
from othink_ray.runtime.push import AuditedPush, SharedMemoryPush
from othink_ray.runtime.seating import learner_bundles
from othink_ray.runtime.team import Team
from othink_ray.types import Prompt
from othink_ray.weights.audit import Tolerance
from tests.runtime.conftest import incidents, train_one_step

LR = 1e-6
LAYERS = 5
HEAD = "model.language_model.embed_tokens.weight"
Weights = Iterable[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def bf16_config(team_config: Config) -> Config:
    """Two ranks, and seats beside those of other tests."""
    return replace(
        team_config,
        model=replace(team_config.model, dtype="bfloat16"),
        learner=replace(team_config.learner, world_size=2, zero_stage=1, threads=1, cpus_per_rank=0.1),
        rollout=replace(team_config.rollout, cpus_per_actor=0.1, threads=1),
        weights=replace(team_config.weights, bucket_mb=1),
    )


@pytest.fixture(scope="module")
def first(ray_here: None, bf16_config: Config, taught_folder: Path, asked: list[Prompt]) -> Iterator[Team]:
    with open_team(bf16_config, str(taught_folder), asked, incidents(), print, tuple) as team:
        yield team


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda stage: f"zero_{stage}")
def team(
    request: pytest.FixtureRequest, first: Team, bf16_config: Config, taught_folder: Path, asked: list[Prompt]
) -> Iterator[Team]:
    """One engine; the learner of each stage pushes to it in turn."""
    if request.param == 1:
        yield first
        return
    learner = replace(bf16_config.learner, zero_stage=request.param)
    with Placement(learner_bundles(learner), bf16_config.cluster, print) as placement:
        make = partial(learner_engine, replace(bf16_config, learner=learner), str(taught_folder), with_reference=False)
        pool = LearnerPool(make, learner, placement)
        pool.wait(pool.start())
        transport = SharedMemoryPush(pool, first.rollout, bf16_config.weights.bucket_mb)
        tolerance = Tolerance("bfloat16", LAYERS)
        pusher = AuditedPush(transport, pool, first.rollout, bf16_config.weights, asked, 1.0, tolerance)
        yield replace(first, learner=pool, pusher=pusher)


def sent(team: Team) -> dict[str, Any]:
    [digests] = ray.get(list(team.pusher.pushed))
    return digests


def test_each_stage_pushes_every_weight_and_passes_both_proofs(team: Team, asked: list[Prompt]) -> None:
    audits, digests = [], []
    for version in range(3):
        audits.append(team.push(version))
        digests.append(sent(team))
        train_one_step(team, asked, version, lr=LR)
    assert {weight.dtype for weight in digests[0].values()} == {torch.bfloat16}
    for before, after in pairwise(digests):
        assert {name for name in before if before[name] != after[name]} >= {HEAD}
    for audit in audits:
        assert audit.verified == len(digests[0]) == 69
        assert 0 < audit.gap_mean <= audit.tolerance <= Tolerance("bfloat16", LAYERS).of(audit)
    assert audits[0].tolerance == Tolerance("bfloat16", LAYERS).of(audits[0])

"""The audit on real engines: a clean push passes with room to spare, and each way of going wrong is caught at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from othink_ray.core.advantages import group_advantages
from othink_ray.core.packing import pack
from othink_ray.runtime.pools import LearnerPool, RolloutPool, WorkerFailed
from othink_ray.runtime.team import Team
from othink_ray.types import Prompt
from othink_ray.weights.audit import AuditError
from othink_ray.weights.chunks import Chunk, from_chunks, to_chunks

BUCKET = 2**26
Weights = Iterable[tuple[str, torch.Tensor]]


class TamperedPush:
    """Sends what the learner has, but for one fault."""

    def __init__(self, learner: LearnerPool, rollout: RolloutPool, fault: Callable[[Weights], Weights]) -> None:
        self.learner, self.rollout, self.fault = learner, rollout, fault

    def send(self, version: int) -> list[int]:
        chunks: list[Chunk] = ray.get(list(self.learner.chunks(BUCKET)))
        return self.rollout.load_weights(version, list(to_chunks(self.fault(from_chunks(chunks)), BUCKET)))


@pytest.fixture(scope="module")
def version() -> Iterator[Callable[[], int]]:
    count = iter(range(1, 1000))
    yield lambda: next(count)


def train_one_step(team: Team, prompts: list[Prompt], step: int) -> None:
    """One real step with rewards that differ, so that all weights move as in training."""
    scored = team.score(team.generate(prompts, step))
    rigged = [replace(one, rewards=np.arange(len(one.rewards), dtype=float)) for one in scored]
    packs = [pack(one, group_advantages(one.rewards, one.valid), len(rigged)) for one in rigged]
    team.update(packs, updates=1, beta=0.04, lr=2e-4, stale=False)


def tampered(team: Team, fault: Callable[[Weights], Weights]) -> Callable[[int], object]:
    push = team.pusher
    return type(push)(
        TamperedPush(team.learner, team.rollout, fault),
        team.learner,
        team.rollout,
        push.weights,
        push.probe_prompts,
        team.temperature,
    )


def test_a_clean_push_leaves_a_gap_of_rounding_only(
    team: Team, asked: list[Prompt], version: Callable[[], int]
) -> None:
    for _ in range(2):
        audit = team.push(version())
        assert audit.gap_mean < 1e-4
        assert audit.tokens >= 4 * 8
        train_one_step(team, asked, version())
    assert team.push(version()).gap_mean < 1e-4


def test_a_stale_lm_head_is_caught(team: Team, asked: list[Prompt], version: Callable[[], int]) -> None:
    team.push(version())
    train_one_step(team, asked, version())
    without_head = tampered(team, lambda weights: ((n, w) for n, w in weights if n != "lm_head.weight"))
    with pytest.raises(AuditError, match="tied lm_head"):
        without_head(version())
    team.push(version())


@pytest.mark.parametrize(
    "layer",
    [
        "model.language_model.layers.0.mlp.down_proj.weight",
        "model.language_model.layers.2.self_attn.v_proj.weight",
        "model.language_model.norm.weight",
        "model.visual.merger.mlp.2.weight",
    ],
)
def test_a_layer_scaled_by_one_percent_is_caught(team: Team, version: Callable[[], int], layer: str) -> None:
    scaled = tampered(team, lambda weights: ((n, w * 1.01 if n == layer else w) for n, w in weights))
    with pytest.raises(AuditError, match="nats on average"):
        scaled(version())
    assert team.push(version()).gap_mean < 1e-4


def keep(team: Team, cache: str) -> None:
    """From now on the engine does not drop this cache."""
    [actor] = team.rollout.actors
    ray.get(actor.__ray_call__.remote(lambda self: setattr(self.engine.engine, cache, lambda: True)))


def test_keys_and_values_kept_over_a_push_are_caught(
    team: Team, asked: list[Prompt], version: Callable[[], int]
) -> None:
    keep(team, "reset_prefix_cache")
    team.push(version())
    train_one_step(team, asked, version())
    with pytest.raises(AuditError, match="caches kept over the push"):
        team.push(version())
    [actor] = team.rollout.actors
    ray.get(actor.__ray_call__.remote(lambda self: delattr(self.engine.engine, "reset_prefix_cache")))
    team.push(version())


def test_engines_that_report_another_version_are_named(team: Team, version: Callable[[], int]) -> None:
    class Deaf(TamperedPush):
        def send(self, version: int) -> list[int]:
            return super().send(version - 1)

    push = tampered(team, lambda weights: weights)
    push.transport = Deaf(team.learner, team.rollout, lambda weights: weights)  # type: ignore[attr-defined]
    with pytest.raises(AuditError, match="engines report weights versions"):
        push(version())
    team.push(version())


def test_image_features_kept_over_a_push_are_caught(
    team: Team, asked: list[Prompt], version: Callable[[], int]
) -> None:
    """The last one of this team: its engine does not survive it."""
    team.push(version())
    keep(team, "reset_encoder_cache")
    train_one_step(team, asked, version())
    with pytest.raises((AuditError, WorkerFailed)):
        team.push(version())

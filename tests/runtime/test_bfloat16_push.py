"""Pushes in bfloat16 at a real model's rate, where an update flips the last bit of one weight in a hundred.

Each fault stops the run at its push; logprobs alone would let most of them pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from othink_ray.config.schema import Config
from othink_ray.driver.build import learner_engine, open_workers
from othink_ray.runtime import weight_sync
from othink_ray.runtime.bundles import learner_bundles
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.placement import Placement
from othink_ray.runtime.weight_sync import AuditedPush, SharedMemoryPush
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Prompt
from othink_ray.weights import AuditError, Tolerance, from_buckets, to_buckets
from tests.engines.samples import worker_of
from tests.runtime.conftest import incidents, train_one_step
from tests.runtime.test_push import keep_packed_head, on_engine, pack_again

pytestmark = pytest.mark.slow

LR = 1e-6
LAYERS = 5
HEAD = "model.language_model.embed_tokens.weight"
Weights = Iterable[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def bf16_config(workers_config: Config) -> Config:
    """Two ranks; few enough CPUs to fit beside the actors of other tests."""
    return replace(
        workers_config,
        model=replace(workers_config.model, dtype="bfloat16"),
        learner=replace(workers_config.learner, world_size=2, zero_stage=1, threads=1, cpus_per_rank=0.1),
        rollout=replace(workers_config.rollout, cpus_per_actor=0.1, threads=1),
        weights=replace(workers_config.weights, bucket_mb=1),
    )


@pytest.fixture(scope="module")
def first(ray_here: None, bf16_config: Config, taught_folder: Path, prompts: list[Prompt]) -> Iterator[WorkerGroup]:
    with open_workers(bf16_config, str(taught_folder), prompts, incidents(), print) as opened:
        yield opened


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda stage: f"zero_{stage}")
def workers(
    request: pytest.FixtureRequest, first: WorkerGroup, bf16_config: Config, taught_folder: Path, prompts: list[Prompt]
) -> Iterator[WorkerGroup]:
    """Workers with one shared engine, to which the learner of each ZeRO stage pushes in turn."""
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
        pusher = AuditedPush(transport, pool, first.rollout, bf16_config.weights, prompts, 1.0, tolerance)
        yield replace(first, learner=pool, pusher=pusher)


def sent(workers: WorkerGroup) -> dict[str, Any]:
    [digests] = ray.get(list(workers.pusher.pushed))
    return digests


def test_each_zero_stage_pushes_every_weight_and_passes_audits(workers: WorkerGroup, prompts: list[Prompt]) -> None:
    audits, digests = [], []
    for version in range(3):
        audits.append(workers.push(version))
        digests.append(sent(workers))
        train_one_step(workers, prompts, version, lr=LR)
    assert {weight.dtype for weight in digests[0].values()} == {torch.bfloat16}
    for before, after in pairwise(digests):
        assert {name for name in before if before[name] != after[name]} >= {HEAD}
    for audit in audits:
        assert audit.verified == len(digests[0]) == 69
        assert 0 <= audit.gap_mean <= audit.tolerance <= Tolerance("bfloat16", LAYERS).of(audit)
    assert audits[0].tolerance == Tolerance("bfloat16", LAYERS).of(audits[0])


# ---- faults in transit


def flipped(weights: Weights) -> Weights:
    for name, weight in weights:
        if name == "model.language_model.layers.1.mlp.down_proj.weight":
            weight.view(torch.int16)[3, 4] ^= 1
        yield name, weight


def swapped(weights: Weights, first: str, second: str) -> Weights:
    found = dict(weights)
    names = [f"model.language_model.layers.{each}.weight" for each in (first, second)]
    assert found[names[0]].shape == found[names[1]].shape
    found[names[0]], found[names[1]] = found[names[1]], found[names[0]]
    return found.items()


def changed_in_transit(workers: WorkerGroup, fault: Callable[[Weights], Weights]) -> AuditedPush:
    """Return a push of changed buckets from the gather that runs: a second gather would wait for it forever."""
    push = copy.copy(workers.pusher)
    push.transport = SharedMemoryPush(workers.learner, workers.rollout, bucket_mb=1)
    real = workers.pusher.transport
    assert isinstance(real, SharedMemoryPush) and real.gathering is not None
    buckets = [bucket for bucket in ray.get(list(real.gathering)) if bucket is not None]
    real.gathering = None
    push.transport.gathering = iter([ray.put(bucket) for bucket in to_buckets(fault(from_buckets(buckets)), 2**20)])
    return push


IN_TRANSIT: dict[str, Callable[[Weights], Weights]] = {
    "one bit": flipped,
    "keys and values": partial(swapped, first="0.self_attn.k_proj", second="0.self_attn.v_proj"),
    "halves of a fused matrix": partial(swapped, first="2.mlp.gate_proj", second="2.mlp.up_proj"),
    "two layers": partial(swapped, first="0.self_attn.o_proj", second="1.self_attn.o_proj"),
}


@pytest.mark.parametrize("fault", IN_TRANSIT)
def test_a_weight_changed_in_transit_is_caught(first: WorkerGroup, prompts: list[Prompt], fault: str) -> None:
    first.push(10)
    train_one_step(first, prompts, 10, lr=LR)
    with pytest.raises(AuditError, match=r"digests of [12] weights are wrong: .* differs from what the learner sent"):
        changed_in_transit(first, IN_TRANSIT[fault])(11)
    first.push(12)


# ---- faults in the engine


def not_loaded(engine: Any, lost: str) -> None:
    """Make the engine drop buckets that hold a weight of this name."""
    write = engine._write

    def some(weights: Weights) -> None:
        arrived = list(weights)
        if not any(lost in name for name, _ in arrived):
            write(arrived)

    engine._write = some


def loaded_again(engine: Any) -> None:
    del engine._write


def other_pixels(engine: Any) -> None:
    """Make the engine probe with one channel of one pixel a level darker."""
    from othink_ray.engines.prefetch import Inputs

    def darker(prompt: Prompt) -> Any:
        given = engine._input(prompt)
        [image] = given["mm_kwargs"]["image"]
        image["pixel_values"].data[0, 0] -= 1
        return given

    engine.probed = Inputs(darker)


def same_pixels(engine: Any) -> None:
    from othink_ray.engines.prefetch import Inputs

    engine.probed = Inputs(engine._input)


def untied_head(engine: Any) -> None:
    """Replace the tied head by a copy of it."""
    worker = worker_of(engine).worker
    head = worker.network.language_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)


def tied_head(engine: Any) -> None:
    worker = worker_of(engine).worker
    model = worker.network.language_model
    model.lm_head.weight = model.model.embed_tokens.weight
    worker.pack(model.lm_head)


IN_THE_ENGINE: dict[str, tuple[Callable[[Any], None], Callable[[Any], None], str]] = {
    "version 0 stays": (partial(not_loaded, lost=""), loaded_again, r"digests of \d\d weights are wrong"),
    "the head is not packed": (keep_packed_head, pack_again, r"lm_head\.weight is newer than the packed copy"),
    "other pixels": (other_pixels, same_pixels, "have different pixels for the images of prompt"),
}


@pytest.mark.parametrize("fault", IN_THE_ENGINE)
def test_an_engine_that_computes_with_other_inputs_is_caught(
    first: WorkerGroup, prompts: list[Prompt], fault: str
) -> None:
    inject, undo, message = IN_THE_ENGINE[fault]
    first.push(20)
    on_engine(first, inject)
    train_one_step(first, prompts, 20, lr=LR)
    with pytest.raises(AuditError, match=rf"audit of weights version 21 failed.*{message}"):
        first.push(21)
    on_engine(first, undo)
    first.push(22)


def test_a_bucket_that_is_received_but_not_loaded_is_caught(first: WorkerGroup, prompts: list[Prompt]) -> None:
    first.push(50)
    on_engine(first, partial(not_loaded, lost="layers.1.mlp"))
    train_one_step(first, prompts, 50, lr=LR)
    with pytest.raises(AuditError, match=r"digests of \d+ weights are wrong: .* differs") as caught:
        first.pusher(51)
    wrong = int(str(caught.value).partition("digests of ")[2].split()[0])
    assert 0 < wrong < 50  # the other buckets arrived
    on_engine(first, loaded_again)
    first.push(52)


def test_an_untied_head_is_caught_on_a_new_engine(first: WorkerGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pushed weight reaches the copy; only the complete check of a new engine sees it."""
    monkeypatch.setattr(first.pusher, "prompts", first.pusher.first_prompts)
    on_engine(first, untied_head)
    with pytest.raises(AuditError, match=r"(lm_head|embed_tokens)\.weight is not reached by any weight of the learner"):
        first.push(30)
    on_engine(first, tied_head)
    first.push(31)


def test_logprobs_alone_would_let_old_weights_pass(
    first: WorkerGroup, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    first.push(40)
    on_engine(first, partial(not_loaded, lost=""))
    train_one_step(first, prompts, 40, lr=LR)
    with monkeypatch.context() as blind:
        blind.setattr(weight_sync, "require_arrived", lambda engines, version: None)
        audit = first.push(41)
    assert audit.gap_mean <= audit.tolerance
    with pytest.raises(AuditError, match="digests of"):
        first.push(41)
    on_engine(first, loaded_again)
    first.push(42)

"""The audit on real engines: a clean push passes by a wide margin, and each kind of fault is caught at once."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import ray
import torch
from PIL import Image

from othink_ray.config.schema import Config
from othink_ray.engines.base import Receiver, RendezvousInfo, Sampling
from othink_ray.engines.policy import Policy
from othink_ray.runtime.bundles import ProcessSpec
from othink_ray.runtime.futures import WorkerFailed
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.placement import Placement
from othink_ray.runtime.rollout_pool import RolloutPool
from othink_ray.runtime.weight_sync import AuditedPush, Sent, SharedMemoryPush
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Group, Probe, Prompt
from othink_ray.weights import AuditError, Bucket, TensorDigest, Tolerance, WorkerDigests, from_buckets, to_buckets
from tests.engines.samples import ask, picture, sent_weights, worker_of
from tests.runtime.conftest import incidents, train_one_step

BUCKET = 2**26
FLOAT32 = Tolerance("float32", layers=5)
Weights = Iterable[tuple[str, torch.Tensor]]


class TamperedPush:
    """Sends the learner's weights with one fault."""

    def __init__(self, learner: LearnerPool, rollout: RolloutPool, fault: Callable[[Weights], Weights]) -> None:
        self.learner, self.rollout, self.fault = learner, rollout, fault

    def begin(self) -> None:
        raise NotImplementedError

    def send(self, version: int) -> Sent:
        buckets: list[Bucket] = ray.get(list(self.learner.buckets(BUCKET, in_flight=2)))
        [bucket] = to_buckets(self.fault(from_buckets(buckets)), BUCKET)
        loading = [self.rollout.begin_push(), self.rollout.load_weights(bucket)]
        return Sent(loading=loading, versions=self.rollout.finish_push(version, buckets=1))

    def send_again(self, version: int, engines: Sequence[int] | None) -> Sent:
        raise NotImplementedError


@pytest.fixture(scope="module")
def version() -> Iterator[Callable[[], int]]:
    count = iter(range(1, 1000))
    yield lambda: next(count)


def tampered(workers: WorkerGroup, fault: Callable[[Weights], Weights]) -> AuditedPush:
    push = copy.copy(workers.pusher)
    push.transport = TamperedPush(workers.learner, workers.rollout, fault)
    return push


def on_engine(workers: WorkerGroup, change: Callable[[Any], object]) -> None:
    """Apply a change to the only engine, inside its actor."""
    [actor] = workers.rollout.actors
    ray.get(actor.__ray_call__.remote(lambda self: (change(self.engine), None)[1]))


def keep_packed_head(engine: Any) -> None:
    """Stop the engine from repacking the kernel's copy of the head."""
    worker = worker_of(engine).worker
    head, pack = worker.network.language_model.lm_head, worker.pack
    worker.pack = lambda module: None if module is head else pack(module)


def pack_again(engine: Any) -> None:
    del worker_of(engine).worker.pack


def test_a_clean_push_leaves_a_gap_of_rounding_only(
    workers: WorkerGroup, taught: Policy, prompts: list[Prompt], version: Callable[[], int]
) -> None:
    for _ in range(2):
        audit = workers.push(version())
        assert audit.gap_mean < 1e-4
        assert audit.tokens >= 4 * 8
        assert audit.sent_bytes == sum(weight.nbytes for _, weight in sent_weights(taught.network))
        train_one_step(workers, prompts, version())
    assert workers.push(version()).gap_mean < 1e-4


def test_a_stale_lm_head_is_caught(workers: WorkerGroup, prompts: list[Prompt], version: Callable[[], int]) -> None:
    """The embedding looks up in the new matrix; the head multiplies by its packed copy of the old one."""
    workers.push(version())
    train_one_step(workers, prompts, version())
    on_engine(workers, keep_packed_head)
    with pytest.raises(AuditError, match=r"lm_head\.weight is newer than the packed copy"):
        workers.push(version())
    on_engine(workers, pack_again)
    workers.push(version())


@pytest.mark.parametrize(
    "layer",
    [
        "model.language_model.layers.0.mlp.down_proj.weight",
        "model.language_model.layers.2.self_attn.v_proj.weight",
        "model.language_model.norm.weight",
        "model.visual.merger.mlp.2.weight",
    ],
)
def test_a_layer_scaled_by_one_percent_is_caught(workers: WorkerGroup, version: Callable[[], int], layer: str) -> None:
    scaled = tampered(workers, lambda weights: ((n, w * 1.01 if n == layer else w) for n, w in weights))
    with pytest.raises(AuditError, match=rf"digests of 1 weights are wrong: {layer} differs from what the learner"):
        scaled(version())
    assert workers.push(version()).gap_mean < 1e-4


@pytest.mark.parametrize("cache", ["reset_prefix_cache", "reset_encoder_cache"])
def test_caches_kept_over_a_push_are_caught(
    workers: WorkerGroup, prompts: list[Prompt], version: Callable[[], int], cache: str
) -> None:
    workers.push(version())
    on_engine(workers, lambda engine: setattr(engine.engine, cache, lambda: True))
    train_one_step(workers, prompts, version())
    with pytest.raises(AuditError, match="caches kept across the push"):
        workers.push(version())
    on_engine(workers, lambda engine: delattr(engine.engine, cache))
    workers.push(version())


def test_images_are_small_after_the_first_push(workers: WorkerGroup, version: Callable[[], int]) -> None:
    large = ask("large", picture(280, 200, 0))
    push = AuditedPush(
        workers.pusher.transport, workers.learner, workers.rollout, workers.pusher.weights, [large], 1.0, FLOAT32
    )
    first, second = push(version()), push(version())
    assert first.tokens == 2 * second.tokens > 0
    assert max(first.gap_mean, second.gap_mean) < 1e-4
    [small] = ray.get(push.quick_prompts)
    assert Image.open(io.BytesIO(small.images[0])).size == (112, 80)
    workers.push(version())


class CountingPush(AuditedPush):
    """Counts how often the learner's logprobs are used."""

    computed = 0

    def _learner_probes(self, probes: Sequence[Probe], logprobs: Sequence[Any]) -> list[Probe]:
        self.computed += 1
        return super()._learner_probes(probes, logprobs)


def test_changed_answers_make_the_learner_compute_again(
    workers: WorkerGroup, prompts: list[Prompt], version: Callable[[], int]
) -> None:
    weights = workers.pusher.weights
    push = CountingPush(workers.pusher.transport, workers.learner, workers.rollout, weights, prompts, 1.0, FLOAT32)
    push(version())
    push(version())
    every = push.audited[0].logprobs.size * len(push.audited)
    train_one_step(workers, prompts, version())
    unchanged = push(version())
    assert (push.computed, every / 2 <= unchanged.tokens <= every) == (3, True)
    push.audited = [replace(probe, candidates=0 * probe.candidates) for probe in push.audited]
    train_one_step(workers, prompts, version())
    audit = push(version())
    assert (push.computed, audit.tokens) == (5, every)
    assert max(audit.gap_mean, unchanged.gap_mean) < 1e-4
    workers.push(version())


def test_engines_that_report_another_version_are_named(workers: WorkerGroup, version: Callable[[], int]) -> None:
    class StaleVersion(TamperedPush):
        def send(self, version: int) -> Sent:
            return super().send(version - 1)

    push = copy.copy(workers.pusher)
    push.transport = StaleVersion(workers.learner, workers.rollout, lambda weights: weights)
    with pytest.raises(AuditError, match="engines report weights versions"):
        push(version())
    workers.push(version())


def test_a_push_in_many_buckets_is_as_good_as_one(workers: WorkerGroup, version: Callable[[], int]) -> None:
    push = copy.copy(workers.pusher)
    push.transport = SharedMemoryPush(workers.learner, workers.rollout, bucket_mb=1)
    assert len(list(workers.learner.buckets(2**20, in_flight=2))) > 3
    assert push(version()).gap_mean < 1e-4


def test_after_half_a_push_engines_refuse_until_a_whole_one(
    workers: WorkerGroup, prompts: list[Prompt], version: Callable[[], int]
) -> None:
    cut = tampered(workers, lambda weights: ((name, weight[:-1]) for name, weight in weights))
    with pytest.raises(WorkerFailed, match="loading weights"):
        cut(version())
    with pytest.raises(WorkerFailed, match="parts of two policies"):
        workers.score(workers.generate(prompts, 0))
    workers.push(version())
    assert len(workers.score(workers.generate(prompts, 0))) == len(prompts)


# ---- order of gathering and loading, with engines that record when they do what


WEIGHTS = 8
WEIGHT_BYTES = 2**20


class RecordingLearner:
    """Gathers one weight of a megabyte at a time, slowly if so set."""

    def __init__(self, rendezvous: RendezvousInfo, seconds: float = 0.0, fails_at: int = WEIGHTS) -> None:
        self.seconds, self.fails_at = seconds, fails_at
        self.gathered: list[float] = []

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(WEIGHTS):
            if number == self.fails_at:
                raise ValueError("a rank was lost")
            time.sleep(self.seconds)
            self.gathered.append(time.monotonic())
            yield str(number), torch.full((WEIGHT_BYTES,), number, dtype=torch.uint8)

    def release_memory(self) -> None: ...


class RecordingEngine(Receiver):
    """Loads one weight at a time, slowly if so set."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.loaded: list[tuple[str, float]] = []

    def _write(self, weights: Weights) -> None:
        for name, weight in weights:
            time.sleep(self.seconds)
            assert (weight == int(name)).all()
            self.loaded.append((name, time.monotonic()))

    def _drop_caches(self) -> None: ...

    def _held_weights(self, expected: Mapping[str, TensorDigest], complete: bool) -> Sequence[WorkerDigests]:
        raise NotImplementedError

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        self._require_whole()
        yield from ()


RecordingPools = tuple[LearnerPool, RolloutPool]


@pytest.fixture
def recording(ray_here: None, workers_config: Config) -> Iterator[Callable[..., RecordingPools]]:
    """Open pools of one recording learner and two recording engines."""
    bundles = [(ProcessSpec(role=role, cpus=0.1, gpus=0),) for role in ("learner", "rollout", "rollout")]
    with Placement(bundles, workers_config.cluster, print) as placement:

        def pools(engine: Callable[[], Any], learner: Callable[[RendezvousInfo], Any]) -> RecordingPools:
            several = replace(workers_config.rollout, num_actors=2, step_timeout_s=20)
            rollout = RolloutPool(engine, several, placement, incidents())
            learning = LearnerPool(learner, replace(workers_config.learner, step_timeout_s=20), placement)
            rollout.wait()
            learning.wait(learning.start())
            return learning, rollout

        yield pools


def recorded(learner: LearnerPool, rollout: RolloutPool) -> tuple[list[float], list[list[tuple[str, float]]]]:
    gathered = ray.get(learner.ranks[0].__ray_call__.remote(lambda self: self.engine.gathered))
    return gathered, ray.get([actor.__ray_call__.remote(lambda self: self.engine.loaded) for actor in rollout.actors])


def test_a_bucket_is_loaded_while_the_next_ones_are_gathered(recording: Callable[..., RecordingPools]) -> None:
    learner, rollout = recording(RecordingEngine, partial(RecordingLearner, seconds=0.1))
    sent = SharedMemoryPush(learner, rollout, bucket_mb=1).send(1)
    assert ray.get(list(sent.versions)) == [1, 1]
    gathered, by_engine = recorded(learner, rollout)
    for loaded in by_engine:
        assert [name for name, _ in loaded] == [str(number) for number in range(WEIGHTS)]
        ends = [when for _, when in loaded]
        assert all(ends[number] < gathered[number + 4] for number in range(WEIGHTS - 4))


@pytest.mark.slow
def test_a_begun_push_is_gathered_before_engines_are_called(recording: Callable[..., RecordingPools]) -> None:
    learner, rollout = recording(RecordingEngine, RecordingLearner)
    push = SharedMemoryPush(learner, rollout, bucket_mb=1)
    for version in (1, 2):
        push.begin()
        with pytest.raises(AssertionError, match="the previous update was not pushed"):
            push.begin()
        time.sleep(1)
        called = time.monotonic()
        assert ray.get(list(push.send(version).versions)) == [version] * 2
        gathered, by_engine = recorded(learner, rollout)
        assert (
            0 < sum(when < called for when in gathered[-WEIGHTS:]) < WEIGHTS
        )  # and no more than the bound on buckets ahead
        assert [[name for name, _ in loaded] for loaded in by_engine] == [[*map(str, range(WEIGHTS))] * version] * 2


@pytest.mark.slow
def test_a_learner_does_not_run_ahead_of_slow_engines(recording: Callable[..., RecordingPools]) -> None:
    """The memory of a push does not grow with the model."""
    learner, rollout = recording(partial(RecordingEngine, seconds=0.1), RecordingLearner)
    sent = SharedMemoryPush(learner, rollout, bucket_mb=1).send(1)
    assert ray.get(list(sent.versions)) == [1, 1]
    gathered, by_engine = recorded(learner, rollout)
    for loaded in by_engine:
        waiting = [number - sum(when < moment for _, when in loaded) for number, moment in enumerate(gathered)]
        assert max(waiting) <= 6 < WEIGHTS


@pytest.mark.slow
def test_engines_refuse_after_a_learner_failed_in_gathering(
    recording: Callable[..., RecordingPools], prompts: list[Prompt], workers_config: Config
) -> None:
    learner, rollout = recording(RecordingEngine, partial(RecordingLearner, fails_at=5))
    with pytest.raises(WorkerFailed, match="a rank was lost"):
        SharedMemoryPush(learner, rollout, bucket_mb=1).send(1)
    sampling = Sampling(answers=2, max_tokens=4, temperature=1.0, seed=0)
    with pytest.raises(WorkerFailed, match="parts of two policies"):
        ray.get(list(rollout.generate(prompts, sampling)))

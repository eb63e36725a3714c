"""The audit on real engines: a clean push passes with room to spare, and each way of going wrong is caught at once."""

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
from othink_ray.runtime.futures import WorkerFailed
from othink_ray.runtime.learner_pool import LearnerPool
from othink_ray.runtime.placement import Placement, ProcessSpec
from othink_ray.runtime.rollout_pool import RolloutPool
from othink_ray.runtime.weight_sync import AuditedPush, Sent, SharedMemoryPush
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import Group, Probe, Prompt
from othink_ray.weights.audit import AuditError, Tolerance
from othink_ray.weights.buckets import Chunk, from_chunks, to_chunks
from othink_ray.weights.digest import Held, TensorDigest
from tests.engines.samples import ask, picture, sent_weights, worker_of
from tests.runtime.conftest import incidents, train_one_step

BUCKET = 2**26
FLOAT32 = Tolerance("float32", layers=5)
Weights = Iterable[tuple[str, torch.Tensor]]


class TamperedPush:
    """Sends what the learner has, but for one fault."""

    def __init__(self, learner: LearnerPool, rollout: RolloutPool, fault: Callable[[Weights], Weights]) -> None:
        self.learner, self.rollout, self.fault = learner, rollout, fault

    def begin(self) -> None:
        raise NotImplementedError

    def send(self, version: int) -> Sent:
        chunks: list[Chunk] = ray.get(list(self.learner.chunks(BUCKET, ahead=2)))
        [bucket] = to_chunks(self.fault(from_chunks(chunks)), BUCKET)
        loading = [self.rollout.begin_push(), self.rollout.load_weights(bucket)]
        return Sent(loading=loading, versions=self.rollout.finish_push(version, buckets=1))

    def send_again(self, version: int, to: Sequence[int] | None) -> Sent:
        raise NotImplementedError


@pytest.fixture(scope="module")
def version() -> Iterator[Callable[[], int]]:
    count = iter(range(1, 1000))
    yield lambda: next(count)


def tampered(team: WorkerGroup, fault: Callable[[Weights], Weights]) -> AuditedPush:
    push = copy.copy(team.pusher)
    push.transport = TamperedPush(team.learner, team.rollout, fault)
    return push


def on_engine(team: WorkerGroup, change: Callable[[Any], object]) -> None:
    """Changes the one engine where it runs."""
    [actor] = team.rollout.actors
    ray.get(actor.__ray_call__.remote(lambda self: (change(self.engine), None)[1]))


def keep_packed_head(engine: Any) -> None:
    """The kernel's copy of the head is not made anew any more."""
    worker = worker_of(engine).worker
    head, pack = worker.network.language_model.lm_head, worker.pack
    worker.pack = lambda module: None if module is head else pack(module)


def pack_again(engine: Any) -> None:
    del worker_of(engine).worker.pack


def test_a_clean_push_leaves_a_gap_of_rounding_only(
    team: WorkerGroup, taught: Policy, asked: list[Prompt], version: Callable[[], int]
) -> None:
    for _ in range(2):
        audit = team.push(version())
        assert audit.gap_mean < 1e-4
        assert audit.tokens >= 4 * 8
        assert audit.sent_bytes == sum(weight.nbytes for _, weight in sent_weights(taught.network))
        train_one_step(team, asked, version())
    assert team.push(version()).gap_mean < 1e-4


def test_a_stale_lm_head_is_caught(team: WorkerGroup, asked: list[Prompt], version: Callable[[], int]) -> None:
    """The embedding looks up in the new matrix; the head multiplies by its packed copy of the old one."""
    team.push(version())
    train_one_step(team, asked, version())
    on_engine(team, keep_packed_head)
    with pytest.raises(AuditError, match=r"lm_head\.weight is newer than the packed copy"):
        team.push(version())
    on_engine(team, pack_again)
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
def test_a_layer_scaled_by_one_percent_is_caught(team: WorkerGroup, version: Callable[[], int], layer: str) -> None:
    scaled = tampered(team, lambda weights: ((n, w * 1.01 if n == layer else w) for n, w in weights))
    with pytest.raises(AuditError, match=rf"digests of 1 weights are wrong: {layer} differs from what the learner"):
        scaled(version())
    assert team.push(version()).gap_mean < 1e-4


@pytest.mark.parametrize("cache", ["reset_prefix_cache", "reset_encoder_cache"])
def test_what_was_cached_before_a_push_is_caught(
    team: WorkerGroup, asked: list[Prompt], version: Callable[[], int], cache: str
) -> None:
    team.push(version())
    on_engine(team, lambda engine: setattr(engine.engine, cache, lambda: True))
    train_one_step(team, asked, version())
    with pytest.raises(AuditError, match="caches kept over the push"):
        team.push(version())
    on_engine(team, lambda engine: delattr(engine.engine, cache))
    team.push(version())


def test_images_are_small_after_the_first_push(team: WorkerGroup, version: Callable[[], int]) -> None:
    large = ask("large", picture(280, 200, 0))
    push = AuditedPush(team.pusher.transport, team.learner, team.rollout, team.pusher.weights, [large], 1.0, FLOAT32)
    first, second = push(version()), push(version())
    assert first.tokens == 2 * second.tokens > 0
    assert max(first.gap_mean, second.gap_mean) < 1e-4
    [small] = ray.get(push.quick_prompts)
    assert Image.open(io.BytesIO(small.images[0])).size == (112, 80)
    team.rollout.sync_new_engines = team.pusher.sync_new_engines
    team.push(version())


class AskedAgain(AuditedPush):
    """Counts what the learner is asked."""

    asked = 0

    def _by_learner(self, answers: Sequence[Probe], logprobs: Sequence[Any]) -> list[Probe]:
        self.asked += 1
        return super()._by_learner(answers, logprobs)


def test_where_engines_answer_otherwise_than_last_time_the_learner_is_asked_again(
    team: WorkerGroup, asked: list[Prompt], version: Callable[[], int]
) -> None:
    weights = team.pusher.weights
    push = AskedAgain(team.pusher.transport, team.learner, team.rollout, weights, asked, 1.0, FLOAT32)
    push(version())
    push(version())
    every = push.audited[0].logprobs.size * len(push.audited)
    train_one_step(team, asked, version())
    as_last_time = push(version())
    assert (push.asked, every / 2 <= as_last_time.tokens <= every) == (3, True)
    push.audited = [replace(probe, candidates=0 * probe.candidates) for probe in push.audited]
    train_one_step(team, asked, version())
    audit = push(version())
    assert (push.asked, audit.tokens) == (5, every)
    assert max(audit.gap_mean, as_last_time.gap_mean) < 1e-4
    team.rollout.sync_new_engines = team.pusher.sync_new_engines
    team.push(version())


def test_engines_that_report_another_version_are_named(team: WorkerGroup, version: Callable[[], int]) -> None:
    class Deaf(TamperedPush):
        def send(self, version: int) -> Sent:
            return super().send(version - 1)

    push = copy.copy(team.pusher)
    push.transport = Deaf(team.learner, team.rollout, lambda weights: weights)
    with pytest.raises(AuditError, match="engines report weights versions"):
        push(version())
    team.push(version())


def test_a_push_in_many_buckets_is_as_good_as_one(team: WorkerGroup, version: Callable[[], int]) -> None:
    push = copy.copy(team.pusher)
    push.transport = SharedMemoryPush(team.learner, team.rollout, bucket_mb=1)
    assert len(list(team.learner.chunks(2**20, ahead=2))) > 3
    assert push(version()).gap_mean < 1e-4


def test_after_half_a_push_nobody_answers_until_the_next_whole_one(
    team: WorkerGroup, asked: list[Prompt], version: Callable[[], int]
) -> None:
    cut = tampered(team, lambda weights: ((name, weight[:-1]) for name, weight in weights))
    with pytest.raises(WorkerFailed, match="loading weights"):
        cut(version())
    with pytest.raises(WorkerFailed, match="parts of two policies"):
        team.score(team.generate(asked, 0))
    team.push(version())
    assert len(team.score(team.generate(asked, 0))) == len(asked)


# ---- buckets on their way, with engines that only note when they did what


WEIGHTS = 8
WEIGHT_BYTES = 2**20


class NotingLearner:
    """Gathers slowly: a megabyte at a time."""

    def __init__(self, place: RendezvousInfo, seconds: float = 0.0, fails_at: int = WEIGHTS) -> None:
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


class NotingEngine(Receiver):
    """Loads slowly."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.loaded: list[tuple[str, float]] = []

    def _write(self, weights: Weights) -> None:
        for name, weight in weights:
            time.sleep(self.seconds)
            assert (weight == int(name)).all()
            self.loaded.append((name, time.monotonic()))

    def _forget(self) -> None: ...

    def _held_weights(self, expected: Mapping[str, TensorDigest], complete: bool) -> Sequence[Held]:
        raise NotImplementedError

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        self._require_whole()
        yield from ()


Noting = tuple[LearnerPool, RolloutPool]


@pytest.fixture
def noting(ray_here: None, team_config: Config) -> Iterator[Callable[..., Noting]]:
    """Pools of one noting learner and two noting engines."""
    seats = [(ProcessSpec(role=role, cpus=0.1, gpus=0),) for role in ("learner", "rollout", "rollout")]
    with Placement(seats, team_config.cluster, print) as placement:

        def pools(engine: Callable[[], Any], learner: Callable[[RendezvousInfo], Any]) -> Noting:
            several = replace(team_config.rollout, num_actors=2, step_timeout_s=20)
            rollout = RolloutPool(engine, several, placement, incidents())
            learning = LearnerPool(learner, replace(team_config.learner, step_timeout_s=20), placement)
            rollout.wait()
            learning.wait(learning.start())
            return learning, rollout

        yield pools


def noted(learner: LearnerPool, rollout: RolloutPool) -> tuple[list[float], list[list[tuple[str, float]]]]:
    gathered = ray.get(learner.ranks[0].__ray_call__.remote(lambda self: self.engine.gathered))
    return gathered, ray.get([actor.__ray_call__.remote(lambda self: self.engine.loaded) for actor in rollout.actors])


def test_a_bucket_is_loaded_while_the_next_ones_are_gathered(noting: Callable[..., Noting]) -> None:
    learner, rollout = noting(NotingEngine, partial(NotingLearner, seconds=0.1))
    sent = SharedMemoryPush(learner, rollout, bucket_mb=1).send(1)
    assert ray.get(list(sent.versions)) == [1, 1]
    gathered, by_engine = noted(learner, rollout)
    for loaded in by_engine:
        assert [name for name, _ in loaded] == [str(number) for number in range(WEIGHTS)]
        ends = [when for _, when in loaded]
        assert all(ends[number] < gathered[number + 4] for number in range(WEIGHTS - 4))


def test_a_push_that_has_begun_is_gathered_before_the_engines_are_asked(noting: Callable[..., Noting]) -> None:
    learner, rollout = noting(NotingEngine, NotingLearner)
    push = SharedMemoryPush(learner, rollout, bucket_mb=1)
    for version in (1, 2):
        push.begin()
        with pytest.raises(AssertionError, match="an update that was not pushed"):
            push.begin()
        time.sleep(1)
        asked = time.monotonic()
        assert ray.get(list(push.send(version).versions)) == [version] * 2
        gathered, by_engine = noted(learner, rollout)
        assert 0 < sum(when < asked for when in gathered[-WEIGHTS:]) < WEIGHTS  # and no more than is kept ready
        assert [[name for name, _ in loaded] for loaded in by_engine] == [[*map(str, range(WEIGHTS))] * version] * 2


def test_a_learner_does_not_run_ahead_of_slow_engines(noting: Callable[..., Noting]) -> None:
    """What a push holds in memory does not grow with the model."""
    learner, rollout = noting(partial(NotingEngine, seconds=0.1), NotingLearner)
    sent = SharedMemoryPush(learner, rollout, bucket_mb=1).send(1)
    assert ray.get(list(sent.versions)) == [1, 1]
    gathered, by_engine = noted(learner, rollout)
    for loaded in by_engine:
        ahead = [number - sum(when < moment for _, when in loaded) for number, moment in enumerate(gathered)]
        assert max(ahead) <= 6 < WEIGHTS


def test_a_learner_that_fails_while_gathering_leaves_engines_that_refuse(
    noting: Callable[..., Noting], asked: list[Prompt], team_config: Config
) -> None:
    learner, rollout = noting(NotingEngine, partial(NotingLearner, fails_at=5))
    with pytest.raises(WorkerFailed, match="a rank was lost"):
        SharedMemoryPush(learner, rollout, bucket_mb=1).send(1)
    sampling = Sampling(answers=2, max_tokens=4, temperature=1.0, seed=0)
    with pytest.raises(WorkerFailed, match="parts of two policies"):
        ray.get(list(rollout.generate(asked, sampling)))

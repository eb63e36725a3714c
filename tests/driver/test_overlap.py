"""The overlapped loop: staleness, what runs at the same time, failures, and the position for a resume."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from othink_ray.config.load import load
from othink_ray.data import PromptStream
from othink_ray.driver.async_loop import OVERLAP_THREADS, train_overlapped
from othink_ray.driver.build import cores_shared
from othink_ray.driver.loop import StepRecord, train
from othink_ray.driver.metrics import step_metrics
from othink_ray.driver.training import open_loop
from othink_ray.types import Audit, Group, Prompt, ScoredGroup, UpdateStats
from tests.driver.fakes import PAPER, NumberStream, RecordingCallbacks, ScriptedWorkers, recipe_of

TIMEOUT_S = 30


def run(
    workers: ScriptedWorkers,
    steps: range,
    *,
    rounds: int = 1,
    callbacks: RecordingCallbacks | None = None,
    stream: NumberStream | None = None,
    **changes: Any,
) -> list[StepRecord]:
    callbacks, how = callbacks or RecordingCallbacks(), {"prefetch_update": True} | settings(steps, rounds) | changes
    with ThreadPoolExecutor(max_workers=OVERLAP_THREADS) as executor:
        train_overlapped(executor, workers, stream or NumberStream(), callbacks=callbacks, **how)
    return callbacks.steps


def settings(steps: range, rounds: int = 1) -> dict[str, Any]:
    return {
        "steps": steps,
        "recipe": recipe_of(rounds=rounds),
        "schedule": PAPER,
        "schedule_state": PAPER.start(),
        "lr": lambda step: 1.0 / (step + 1),
    }


def versions(record: StepRecord) -> set[int]:
    return {scored.group.version for scored in record.requested}


def requested(record: StepRecord) -> list[str]:
    return [scored.group.prompt.id for scored in record.requested]


# ---- prompts and staleness


def test_each_step_but_the_first_has_staleness_1() -> None:
    workers = ScriptedWorkers()
    steps = run(workers, range(4))
    assert [versions(record) for record in steps] == [{0}, {0}, {1}, {2}]
    assert [step_metrics(record)["sampler/staleness"] for record in steps] == [0, 1, 1, 1]
    assert workers.stale == [False, True, True, True]
    assert [call[1] for call in workers.calls if call[0] == "push"] == [0, 1, 2, 3, 4]


def test_a_resumed_run_begins_on_policy() -> None:
    workers, callbacks = ScriptedWorkers(), RecordingCallbacks()
    steps = run(workers, range(3, 6), callbacks=callbacks)
    assert [versions(record) for record in steps] == [{3}, {3}, {4}]
    assert workers.calls[0] == ("push", 3)
    assert callbacks.started == [3]


def test_a_staleness_of_2_is_refused() -> None:
    class StaleAtStep2(ScriptedWorkers):
        def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
            self.lag = int(step == 2)
            return super().generate(prompts, step, sampling_round)

    with pytest.raises(AssertionError, match="other weights than version 1"):
        run(StaleAtStep2(), range(4))


def test_nothing_is_sampled_past_the_last_step() -> None:
    workers, stream = ScriptedWorkers(), NumberStream()
    run(workers, range(3), stream=stream)
    assert [call for call in workers.calls if call[0] == "generate"] == [("generate", step) for step in range(3)]
    assert stream.position == 12
    idle = ScriptedWorkers()
    assert run(idle, range(3, 3)) == []
    assert idle.calls == [("push", 3)]


def test_prompts_betas_and_rates_equal_those_of_the_plain_loop() -> None:
    workers, plain, callbacks = ScriptedWorkers(), ScriptedWorkers(), RecordingCallbacks()
    steps = run(workers, range(6))
    train(plain, NumberStream(), callbacks=callbacks, **settings(range(6)))
    assert [requested(record) for record in steps] == [requested(record) for record in callbacks.steps]
    assert [call for call in workers.calls if call[0] == "update"] == [
        call for call in plain.calls if call[0] == "update"
    ]
    assert workers.rates == plain.rates


def test_an_adaptive_schedule_uses_every_finished_step() -> None:
    kl, workers = replace(PAPER, name="target"), ScriptedWorkers(kl=0.011)
    steps = run(workers, range(4), schedule=kl, schedule_state=kl.start())
    assert [record.beta for record in steps] == pytest.approx([0.07 * 1.01**step for step in range(4)])
    assert [record.schedule_state for record in steps[:-1]] == [{"beta": record.beta} for record in steps[1:]]


def test_a_run_of_one_step_equals_the_plain_loop() -> None:
    workers, plain = ScriptedWorkers(), ScriptedWorkers()
    run(workers, range(1))
    train(plain, NumberStream(), callbacks=RecordingCallbacks(), **settings(range(1)))
    assert workers.calls == plain.calls
    assert workers.stale == plain.stale == [False]


def test_overlap_replaces_groups_of_equal_rewards() -> None:
    steps = run(ScriptedWorkers(constant=frozenset({1, 2, 4, 8})), range(2), rounds=5)
    assert [requested(record) for record in steps] == [[f"p{n}" for n in range(7)], [f"p{n}" for n in range(7, 12)]]
    assert [len(record.scored) for record in steps] == [4, 4]
    assert [versions(record) for record in steps] == [{0}, {0}]


def test_the_next_update_is_prepared_with_or_without_reference() -> None:
    workers, without_kl = ScriptedWorkers(), ScriptedWorkers()
    run(workers, range(3))
    updates = [(call[1], call[2]) for call in workers.calls if call[0] == "update"]
    assert workers.prepared == [(*update, True) for update in updates[1:]]
    run(without_kl, range(3), schedule=replace(PAPER, beta_min=0.0, beta_max=0.0))
    assert [with_reference for *_, with_reference in without_kl.prepared] == [False, False]


def test_a_reference_is_prepared_only_if_the_next_beta_needs_it() -> None:
    workers = ScriptedWorkers()
    falling = replace(PAPER, name="linear", total=2, beta_min=0.1, beta_max=0.0)
    steps = run(workers, range(3), schedule=falling)
    assert [record.beta > 0 for record in steps] == [True, True, False]
    assert [with_reference for *_, with_reference in workers.prepared] == [True, False]


def test_prefetch_update_false_prepares_nothing() -> None:
    workers, off = ScriptedWorkers(), ScriptedWorkers()
    run(workers, range(3))
    run(off, range(3), prefetch_update=False)
    assert off.prepared == []
    assert [call for call in off.calls if call[0] == "update"] == [
        call for call in workers.calls if call[0] == "update"
    ]


# ---- concurrency


@dataclass
class BarrierWorkers(ScriptedWorkers):
    """Sampling and learning meet at a barrier, so each runs while the other does; sampling ends last."""

    last: int = 2
    both: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    busy: list[str] = field(default_factory=list)

    def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
        self.busy.append("sampling")
        if ("score", 4) in self.calls:  # the first sampling has no update beside it
            self.both.wait(TIMEOUT_S)
        time.sleep(0.05)
        scored = super().score(groups)
        self.busy.remove("sampling")
        return scored

    def finish_update(self, update: UpdateStats) -> UpdateStats:
        self.busy.append("learning")
        if self.version != self.last:  # the last update has no sampling beside it
            self.both.wait(TIMEOUT_S)
        stats = super().finish_update(update)
        self.busy.remove("learning")
        return stats

    def push(self, version: int) -> Audit:
        assert self.busy == []
        return super().push(version)


def test_sampling_of_the_next_step_overlaps_the_update() -> None:
    assert len(run(BarrierWorkers(last=2), range(3))) == 3  # a broken barrier would have raised


def test_nothing_runs_during_the_push_and_the_callbacks() -> None:
    workers = BarrierWorkers(last=2)

    class IdleCheck(RecordingCallbacks):
        def on_step(self, record: StepRecord) -> None:
            assert workers.busy == []
            assert workers.version == record.step + 1
            super().on_step(record)

    assert len(run(workers, range(3), callbacks=IdleCheck())) == 3


def test_hidden_time_is_not_part_of_the_step_time() -> None:
    class Slow(ScriptedWorkers):
        def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
            time.sleep(0.05)
            return super().score(groups)

        def finish_update(self, update: UpdateStats) -> UpdateStats:
            time.sleep(0.1)
            return super().finish_update(update)

    began = time.perf_counter()
    found = [step_metrics(record) for record in run(Slow(), range(3))]
    whole = time.perf_counter() - began
    for line in found:
        laps = [line[f"time/{name}_s"] for name in ("generate", "score", "update", "push")]
        assert line["time/step_s"] == pytest.approx(sum(laps))
        assert line["time/hidden_s"] <= line["time/update_s"]
    assert sum(line["time/step_s"] for line in found) <= whole
    assert min(found[0]["time/hidden_s"], found[1]["time/hidden_s"]) >= 0.05
    assert found[2]["time/hidden_s"] == 0


def test_waiting_for_slow_sampling_counts_as_generate() -> None:
    class SlowToSample(ScriptedWorkers):
        def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
            time.sleep(0.5)
            return super().score(groups)

    first, second, last = (record.times for record in run(SlowToSample(), range(3)))
    assert min(first["generate"], second["generate"]) > 0.3 > max(first["update"], second["update"])
    assert last["generate"] < 0.3


# ---- failures


@dataclass
class Stuck(ScriptedWorkers):
    """From the second sampling on, one thread fails and the other hangs, or both hang, until they are released."""

    failing: str = ""
    hanging: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    released: threading.Event = field(default_factory=threading.Event)

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
        if step > 0:
            self._fail_or_hang("generate")
        return super().generate(prompts, step, sampling_round)

    def finish_update(self, update: UpdateStats) -> UpdateStats:
        self._fail_or_hang("update")
        return super().finish_update(update)

    def _fail_or_hang(self, verb: str) -> None:
        if self.failing == verb:
            raise RuntimeError(f"{verb} broke")
        self.hanging.release()
        self.released.wait(TIMEOUT_S)


@pytest.mark.parametrize("failing", ["generate", "update"])
def test_a_failed_thread_raises_while_the_other_one_hangs(failing: str) -> None:
    workers, callbacks = Stuck(failing=failing), RecordingCallbacks()
    with ThreadPoolExecutor(max_workers=OVERLAP_THREADS) as executor:
        try:
            began = time.monotonic()
            with pytest.raises(RuntimeError, match=f"{failing} broke"):
                train_overlapped(
                    executor, workers, NumberStream(), callbacks=callbacks, prefetch_update=True, **settings(range(3))
                )
            assert time.monotonic() - began < TIMEOUT_S / 2
        finally:
            workers.released.set()
    assert callbacks.steps == []
    assert [call for call in workers.calls if call[0] == "push"] == [("push", 0)]


def test_ctrl_c_works_while_both_threads_hang() -> None:
    workers = Stuck()

    def interrupt() -> None:
        for _ in range(OVERLAP_THREADS):
            workers.hanging.acquire(timeout=TIMEOUT_S)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with ThreadPoolExecutor(max_workers=OVERLAP_THREADS) as executor:
        try:
            threading.Thread(target=interrupt).start()
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                train_overlapped(
                    executor,
                    workers,
                    NumberStream(),
                    callbacks=RecordingCallbacks(),
                    prefetch_update=True,
                    **settings(range(3)),
                )
            assert time.monotonic() - began < TIMEOUT_S / 2
        finally:
            workers.released.set()
            signal.signal(signal.SIGINT, before)


# ---- resuming, and choosing the loop


def test_the_data_position_is_that_of_the_next_step() -> None:
    assert [record.data_position for record in run(ScriptedWorkers(), range(3))] == [4, 8, 12]
    constant = frozenset({1, 2, 4, 8})
    assert [record.data_position for record in run(ScriptedWorkers(constant=constant), range(2), rounds=5)] == [7, 12]


def opened_loop(overrides: list[str]) -> ScriptedWorkers:
    """Run three steps of the loop that a configuration opens."""
    workers, stream = ScriptedWorkers(), cast(PromptStream, NumberStream())
    config = load(["train.prompts_per_step=4", *overrides])
    with open_loop(config) as loop:
        loop(workers, stream, path="", steps=range(3), schedule_state={}, callbacks=RecordingCallbacks())
    return workers


@pytest.mark.parametrize("overrides", [[], ["train.overlap=false"]])
def test_without_overlap_the_plain_loop_is_opened(overrides: list[str]) -> None:
    workers = opened_loop(overrides)
    assert [call[0] for call in workers.calls] == ["push", *["generate", "score", "update", "push"] * 3]
    assert workers.prepared == []


def test_train_overlap_opens_the_overlapped_loop() -> None:
    assert len(opened_loop(["train.overlap=true"]).prepared) == 2


def test_engines_and_learner_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    pools = ["rollout.num_actors=2", "learner.world_size=2"]
    shared = cores_shared(load([*pools, "train.overlap=true"]))
    assert (shared.rollout.threads, shared.learner.threads) == (2, 2)
    chosen = cores_shared(load([*pools, "train.overlap=true", "rollout.threads=3"]))
    assert (chosen.rollout.threads, chosen.learner.threads) == (3, 2)
    sequential = load(pools)
    assert cores_shared(sequential) is sequential

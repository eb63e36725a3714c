"""Sampling and learning side by side: whose weights answered, what runs when, how it ends, and where it would go on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from othink_ray.config.load import load
from othink_ray.driver.async_loop import SIDES, train_overlapped
from othink_ray.driver.build import cores_shared, open_loop
from othink_ray.driver.loop import Step, train
from othink_ray.driver.metrics import measures
from othink_ray.types import Audit, Group, Pack, Prompt, ScoredGroup, UpdateStats
from tests.driver.fakes import PAPER, Diary, Numbers, ScriptedTeam, recipe_of

PATIENCE_S = 30


def run(
    team: ScriptedTeam,
    steps: range,
    *,
    rounds: int = 1,
    diary: Diary | None = None,
    stream: Numbers | None = None,
    **changes: Any,
) -> list[Step]:
    diary, how = diary or Diary(), {"prepare_ahead": True} | settings(steps, rounds) | changes
    with ThreadPoolExecutor(max_workers=SIDES) as sides:
        train_overlapped(sides, team, stream or Numbers(), journal=diary, **how)
    return diary.steps


def settings(steps: range, rounds: int = 1) -> dict[str, Any]:
    return {
        "steps": steps,
        "recipe": recipe_of(rounds=rounds),
        "schedule": PAPER,
        "schedule_state": PAPER.start(),
        "lr": lambda step: 1.0 / (step + 1),
    }


def versions(seen: Step) -> set[int]:
    return {one.group.version for one in seen.requested}


def requested(seen: Step) -> list[str]:
    return [one.group.prompt.id for one in seen.requested]


# ---- what is sampled, and with which weights


def test_each_step_but_the_first_trains_answers_of_the_weights_one_step_older() -> None:
    team = ScriptedTeam()
    steps = run(team, range(4))
    assert [versions(seen) for seen in steps] == [{0}, {0}, {1}, {2}]
    assert [measures(seen)["sampler/staleness"] for seen in steps] == [0, 1, 1, 1]
    assert team.stale == [False, True, True, True]
    assert [call[1] for call in team.calls if call[0] == "push"] == [0, 1, 2, 3, 4]


def test_a_resumed_run_begins_with_answers_of_its_own_weights() -> None:
    team, diary = ScriptedTeam(), Diary()
    steps = run(team, range(3, 6), diary=diary)
    assert [versions(seen) for seen in steps] == [{3}, {3}, {4}]
    assert team.calls[0] == ("push", 3)
    assert diary.begun == [3]


def test_answers_of_still_older_weights_are_refused() -> None:
    class Forgetful(ScriptedTeam):
        def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
            self.lag = int(step == 2)
            return super().generate(prompts, step, sampling_round)

    with pytest.raises(AssertionError, match="other weights than version 1"):
        run(Forgetful(), range(4))


def test_nothing_is_sampled_past_the_last_step() -> None:
    team, stream = ScriptedTeam(), Numbers()
    run(team, range(3), stream=stream)
    assert [call for call in team.calls if call[0] == "generate"] == [("generate", step) for step in range(3)]
    assert stream.position == 12
    nothing = ScriptedTeam()
    assert run(nothing, range(3, 3)) == []
    assert nothing.calls == [("push", 3)]


def test_questions_betas_and_rates_are_those_of_the_plain_loop() -> None:
    team, plain, diary = ScriptedTeam(), ScriptedTeam(), Diary()
    steps = run(team, range(6))
    train(plain, Numbers(), journal=diary, **settings(range(6)))
    assert [requested(seen) for seen in steps] == [requested(seen) for seen in diary.steps]
    assert [call for call in team.calls if call[0] == "update"] == [call for call in plain.calls if call[0] == "update"]
    assert team.rates == plain.rates


def test_a_schedule_with_a_state_steers_by_every_step_that_was_learned() -> None:
    kl, team = replace(PAPER, name="target"), ScriptedTeam(kl=0.011)
    steps = run(team, range(4), schedule=kl, schedule_state=kl.start())
    assert [seen.beta for seen in steps] == pytest.approx([0.07 * 1.01**step for step in range(4)])
    assert [seen.schedule_state for seen in steps[:-1]] == [{"beta": seen.beta} for seen in steps[1:]]


def test_a_run_of_one_step_is_the_plain_loop() -> None:
    team, plain = ScriptedTeam(), ScriptedTeam()
    run(team, range(1))
    train(plain, Numbers(), journal=Diary(), **settings(range(1)))
    assert team.calls == plain.calls
    assert team.stale == plain.stale == [False]


def test_groups_of_equal_rewards_are_replaced_by_new_questions_here_too() -> None:
    steps = run(ScriptedTeam(dull=frozenset({1, 2, 4, 8})), range(2), rounds=5)
    assert [requested(seen) for seen in steps] == [[f"p{n}" for n in range(7)], [f"p{n}" for n in range(7, 12)]]
    assert [len(seen.scored) for seen in steps] == [4, 4]
    assert [versions(seen) for seen in steps] == [{0}, {0}]


def test_the_learner_is_told_what_it_learns_next_and_whether_a_reference_will_be_asked() -> None:
    team, unsure = ScriptedTeam(), ScriptedTeam()
    run(team, range(3))
    rows = [(call[1], call[2]) for call in team.calls if call[0] == "update"]
    assert team.prepared == [(*own, True) for own in rows[1:]]
    run(unsure, range(3), schedule=replace(PAPER, beta_min=0.0, beta_max=0.0))
    assert [with_reference for *_, with_reference in unsure.prepared] == [False, False]


def test_a_reference_is_prepared_for_the_beta_of_the_step_that_will_ask_it() -> None:
    team = ScriptedTeam()
    falling = replace(PAPER, name="linear", total=2, beta_min=0.1, beta_max=0.0)
    steps = run(team, range(3), schedule=falling)
    assert [seen.beta > 0 for seen in steps] == [True, True, False]
    assert [with_reference for *_, with_reference in team.prepared] == [True, False]


def test_nothing_is_prepared_where_that_is_switched_off() -> None:
    team, off = ScriptedTeam(), ScriptedTeam()
    run(team, range(3))
    run(off, range(3), prepare_ahead=False)
    assert off.prepared == []
    assert [call for call in off.calls if call[0] == "update"] == [call for call in team.calls if call[0] == "update"]


# ---- what runs when


@dataclass
class Meeting(ScriptedTeam):
    """Each side ends only after the other one has begun, sampling last."""

    last: int = 2
    both: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    busy: list[str] = field(default_factory=list)

    def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
        self.busy.append("sampling")
        if ("score", 4) in self.calls:  # before the first learning there is nobody to meet
            self.both.wait(PATIENCE_S)
        time.sleep(0.05)
        scored = super().score(groups)
        self.busy.remove("sampling")
        return scored

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
        self.busy.append("learning")
        if self.version != self.last:  # nor after the last sampling
            self.both.wait(PATIENCE_S)
        stats = super().update(packs, updates=updates, beta=beta, lr=lr, stale=stale)
        self.busy.remove("learning")
        return stats

    def push(self, version: int) -> Audit:
        assert self.busy == []
        return super().push(version)


def test_the_next_step_is_sampled_while_this_one_is_learned() -> None:
    assert len(run(Meeting(last=2), range(3))) == 3  # a broken barrier would have raised


def test_nothing_is_in_flight_when_weights_are_pushed_and_the_journal_looks() -> None:
    team = Meeting(last=2)

    class Looking(Diary):
        def step(self, seen: Step) -> None:
            assert team.busy == []
            assert team.version == seen.step + 1
            super().step(seen)

    assert len(run(team, range(3), diary=Looking())) == 3


def test_the_laps_of_a_step_add_up_to_its_time_without_what_was_hidden() -> None:
    class Slow(ScriptedTeam):
        def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
            time.sleep(0.05)
            return super().score(groups)

        def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
            time.sleep(0.1)
            return super().update(packs, updates=updates, beta=beta, lr=lr, stale=stale)

    began = time.perf_counter()
    found = [measures(seen) for seen in run(Slow(), range(3))]
    whole = time.perf_counter() - began
    for line in found:
        laps = [line[f"time/{name}_s"] for name in ("generate", "score", "update", "push")]
        assert line["time/step_s"] == pytest.approx(sum(laps))
        assert line["time/hidden_s"] <= line["time/update_s"]
    assert sum(line["time/step_s"] for line in found) <= whole
    assert min(found[0]["time/hidden_s"], found[1]["time/hidden_s"]) >= 0.05
    assert found[2]["time/hidden_s"] == 0


def test_sampling_that_takes_longer_than_the_update_is_waited_for_under_its_own_name() -> None:
    class SlowToSample(ScriptedTeam):
        def score(self, groups: Iterable[Group]) -> list[ScoredGroup]:
            time.sleep(0.5)
            return super().score(groups)

    first, second, last = (seen.times for seen in run(SlowToSample(), range(3)))
    assert min(first["generate"], second["generate"]) > 0.3 > max(first["update"], second["update"])
    assert last["generate"] < 0.3


# ---- how it ends


@dataclass
class Stuck(ScriptedTeam):
    """From the second sampling on, one side fails and the other one hangs, or both hang, until they are released."""

    failing: str = ""
    hanging: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    released: threading.Event = field(default_factory=threading.Event)

    def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
        if step > 0:
            self._get_stuck("generate")
        return super().generate(prompts, step, sampling_round)

    def update(self, packs: Sequence[Pack], *, updates: int, beta: float, lr: float, stale: bool) -> UpdateStats:
        self._get_stuck("update")
        return super().update(packs, updates=updates, beta=beta, lr=lr, stale=stale)

    def _get_stuck(self, side: str) -> None:
        if self.failing == side:
            raise RuntimeError(f"{side} broke")
        self.hanging.release()
        self.released.wait(PATIENCE_S)


@pytest.mark.parametrize("failing", ["generate", "update"])
def test_the_failure_of_one_side_is_raised_at_once_while_the_other_one_hangs(failing: str) -> None:
    team, diary = Stuck(failing=failing), Diary()
    with ThreadPoolExecutor(max_workers=SIDES) as sides:
        try:
            began = time.monotonic()
            with pytest.raises(RuntimeError, match=f"{failing} broke"):
                train_overlapped(sides, team, Numbers(), journal=diary, prepare_ahead=True, **settings(range(3)))
            assert time.monotonic() - began < PATIENCE_S / 2
        finally:
            team.released.set()
    assert diary.steps == []
    assert [call for call in team.calls if call[0] == "push"] == [("push", 0)]


def test_ctrl_c_is_heard_while_both_sides_hang() -> None:
    team = Stuck()

    def interrupt() -> None:
        for _ in range(SIDES):
            team.hanging.acquire(timeout=PATIENCE_S)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with ThreadPoolExecutor(max_workers=SIDES) as sides:
        try:
            threading.Thread(target=interrupt).start()
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                train_overlapped(sides, team, Numbers(), journal=Diary(), prepare_ahead=True, **settings(range(3)))
            assert time.monotonic() - began < PATIENCE_S / 2
        finally:
            team.released.set()
            signal.signal(signal.SIGINT, before)


# ---- where it would go on, and when it is chosen


def test_a_step_says_where_the_questions_of_the_next_one_begin_though_they_are_asked_already() -> None:
    assert [seen.data_position for seen in run(ScriptedTeam(), range(3))] == [4, 8, 12]
    dull = frozenset({1, 2, 4, 8})
    assert [seen.data_position for seen in run(ScriptedTeam(dull=dull), range(2), rounds=5)] == [7, 12]


@pytest.mark.parametrize("overrides", [[], ["train.overlap=false"], ["mode=sft", "train.overlap=true"]])
def test_the_plain_loop_itself_runs_where_nothing_overlaps(overrides: list[str]) -> None:
    with open_loop(load(overrides)) as loop:
        assert loop is train


def test_the_overlapped_loop_runs_where_it_is_asked_for() -> None:
    team, diary = ScriptedTeam(), Diary()
    with open_loop(load(["train.overlap=true"])) as loop:
        loop(team, Numbers(), journal=diary, **settings(range(3)))
    assert team.stale == [False, True, True]


def test_the_two_sides_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    pools = ["rollout.num_actors=2", "learner.world_size=2"]
    shared = cores_shared(load([*pools, "train.overlap=true"]))
    assert (shared.rollout.threads, shared.learner.threads) == (2, 2)
    chosen = cores_shared(load([*pools, "train.overlap=true", "rollout.threads=3"]))
    assert (chosen.rollout.threads, chosen.learner.threads) == (3, 2)
    in_turn = load(pools)
    assert cores_shared(in_turn) is in_turn

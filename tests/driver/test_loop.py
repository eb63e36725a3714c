"""The loop with scripted workers: order of the verbs, betas, versions, loss weights, metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from othink_ray.core.kl import BetaSchedule, schedule
from othink_ray.driver.loop import Sampled, measure, train
from othink_ray.driver.metrics import step_metrics
from othink_ray.types import Group, Prompt
from tests.driver.fakes import PAPER, NumberStream, RecordingCallbacks, ScriptedWorkers, recipe_of


def run(
    workers: ScriptedWorkers,
    steps: range,
    *,
    updates: int = 1,
    rounds: int = 1,
    kl: BetaSchedule = PAPER,
    state: Mapping[str, float] | None = None,
) -> RecordingCallbacks:
    callbacks = RecordingCallbacks()
    train(
        workers,
        NumberStream(),
        steps=steps,
        recipe=recipe_of(updates=updates, rounds=rounds),
        schedule=kl,
        schedule_state=kl.start() if state is None else state,
        lr=lambda step: 1.0 / (step + 1),
        callbacks=callbacks,
    )
    return callbacks


def test_a_step_is_generate_score_update_push() -> None:
    workers = ScriptedWorkers()
    run(workers, range(2))
    assert [call[0] for call in workers.calls] == ["push", *["generate", "score", "update", "push"] * 2]
    assert [call[1] for call in workers.calls if call[0] == "push"] == [0, 1, 2]


def test_the_learner_works_while_engines_prefetch() -> None:
    workers = ScriptedWorkers()
    run(workers, range(2))
    verbs = ["record_lengths", "sleep", "prefetch", "begin_update", "begin_push", "finish_update"]
    assert workers.beside == verbs * 2
    assert workers.prefetched == [["p4", "p5"], ["p8", "p9"]]


def test_each_step_trains_with_the_beta_of_equation_3() -> None:
    workers = ScriptedWorkers()
    run(workers, range(10))
    betas = [call[3] for call in workers.calls if call[0] == "update"]
    assert betas == [schedule("paper", step, 10, 0.04, 0.1, 0.3) for step in range(10)]
    assert betas[0] == pytest.approx(0.07)


def test_packs_are_trained_in_the_order_of_the_prompts() -> None:
    workers = ScriptedWorkers()
    run(workers, range(1))
    [trained] = [call[1] for call in workers.calls if call[0] == "update"]
    assert trained == ["p0", "p1", "p2", "p3"]


def test_answers_of_older_weights_are_refused() -> None:
    with pytest.raises(AssertionError, match="other weights"):
        run(ScriptedWorkers(lag=1), range(1))


def test_one_group_of_older_weights_among_others_is_refused() -> None:
    class Mixed(ScriptedWorkers):
        def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
            for group in super().generate(prompts, step, sampling_round):
                yield replace(group, version=group.version - int(group.prompt.id == "p2"))

    with pytest.raises(AssertionError, match="other weights"):
        run(Mixed(), range(1))


def test_the_loss_weights_of_one_update_add_up_to_one() -> None:
    workers = ScriptedWorkers()
    run(workers, range(1))
    assert workers.weight == pytest.approx(1.0)
    run(workers, range(1), updates=2)
    assert workers.weight == pytest.approx(2.0)  # two updates, each of weight 1


def test_a_resumed_run_begins_with_the_weights_of_its_step() -> None:
    workers = ScriptedWorkers()
    callbacks = run(workers, range(3, 5))
    assert workers.calls[0] == ("push", 3)
    assert callbacks.started == [3]
    assert [record.step for record in callbacks.steps] == [3, 4]


def test_masked_answers_are_counted_but_not_averaged() -> None:
    [record] = run(ScriptedWorkers(masked=True), range(1)).steps
    metrics = step_metrics(record)
    assert metrics["groups/masked"] == 12
    assert np.isnan(metrics["reward/mean"])
    assert all(not advantages.any() for advantages in record.advantages)


def test_mean_rewards_are_over_valid_answers_only() -> None:
    [record] = run(ScriptedWorkers(), range(1)).steps
    [first, *rest] = record.requested  # answers are rewarded 0, 1, 2
    partly = replace(first, valid=np.array([True, True, False]))
    metrics = step_metrics(replace(record, requested=[partly, *rest]))
    assert metrics["reward/mean"] == metrics["reward/accuracy"] == pytest.approx((1 + 3 * 3) / 11)
    assert metrics["groups/masked"] == 1


def test_grading_layers_are_counted_over_all_groups() -> None:
    [record] = run(ScriptedWorkers(), range(1)).steps
    metrics = step_metrics(record)
    assert (metrics["reward/graded_by_rules"], metrics["reward/grader_timeouts"]) == (8, 4)
    assert (metrics["reward/graded_symbolically"], metrics["reward/grader_crashes"], metrics["reward/untagged"]) == (
        0,
        0,
        0,
    )


def test_image_encodes_are_summed_over_all_groups() -> None:
    [record] = run(ScriptedWorkers(constant=frozenset({1, 2, 4})), range(1), rounds=5).steps
    assert step_metrics(record)["rollout/image_encodes"] == 2 * len(record.requested) == 14


def test_the_times_of_the_verbs_add_up_to_the_step() -> None:
    [record] = run(ScriptedWorkers(), range(1)).steps
    metrics = step_metrics(record)
    laps = [metrics[f"time/{name}_s"] for name in ("generate", "score", "update", "push")]
    assert metrics["time/step_s"] == pytest.approx(sum(laps))
    assert metrics["time/hidden_s"] == 0


# ---- dynamic sampling


def trained(workers: ScriptedWorkers) -> list[str]:
    [ids] = [call[1] for call in workers.calls if call[0] == "update"]
    return list(ids)


def test_groups_of_equal_rewards_are_replaced_by_new_prompts() -> None:
    workers = ScriptedWorkers(constant=frozenset({1, 2, 4}))
    [record] = run(workers, range(1), rounds=5).steps
    assert [call for call in workers.calls if call[0] in ("generate", "score")] == [
        *[("generate", 0), ("score", 4)],
        *[("generate", 0), ("score", 2)],
        *[("generate", 0), ("score", 1)],
    ]
    assert workers.rounds == [0, 1, 2]
    assert trained(workers) == ["p0", "p3", "p5", "p6"]
    assert [scored.group.prompt.id for scored in record.requested] == [f"p{number}" for number in range(7)]
    assert len(record.advantages) == 4 and all(advantages.any() for advantages in record.advantages)


def test_groups_of_equal_rewards_fill_up_after_the_last_round() -> None:
    workers = ScriptedWorkers(constant=frozenset({0, 1, 3, 4, 6}))
    run(workers, range(1), rounds=2)
    assert trained(workers) == ["p0", "p1", "p2", "p5"]
    workers = ScriptedWorkers(constant=frozenset(range(100)))
    run(workers, range(1), rounds=3)
    assert trained(workers) == ["p0", "p1", "p2", "p3"]
    assert workers.calls.count(("generate", 0)) == 3


def test_a_single_round_trains_every_group_in_order() -> None:
    workers = ScriptedWorkers(constant=frozenset({0, 2}))
    [record] = run(workers, range(1)).steps
    assert trained(workers) == ["p0", "p1", "p2", "p3"]
    assert list(record.requested) == list(record.scored)


def test_metrics_cover_all_requested_groups() -> None:
    [record] = run(ScriptedWorkers(constant=frozenset({1, 2, 4})), range(1), rounds=5).steps
    metrics = step_metrics(record)
    assert metrics["groups/asked"] == 7
    assert metrics["groups/constant_frac"] == pytest.approx(3 / 7)
    assert metrics["reward/mean"] == pytest.approx(4 / 7)
    assert metrics["reward/accuracy"] == pytest.approx(4 / 7)


def test_several_rounds_time_the_same_four_verbs() -> None:
    [record] = run(ScriptedWorkers(constant=frozenset({1, 2, 4})), range(1), rounds=5).steps
    assert set(record.times) == {"generate", "score", "update", "push"}
    assert all(lap >= 0 for lap in record.times.values())


# ---- adaptive schedules


def test_an_adaptive_schedule_uses_the_last_step() -> None:
    kl = replace(PAPER, name="target")
    betas = [record.beta for record in run(ScriptedWorkers(kl=0.011), range(3), kl=kl).steps]
    assert betas == pytest.approx([0.07, 0.07 * 1.01, 0.07 * 1.01**2])


def test_the_schedule_gets_the_accuracy_of_all_requested_answers() -> None:
    kl = replace(PAPER, name="accuracy")
    first, second = run(ScriptedWorkers(constant=frozenset({0, 1, 2, 3})), range(2), kl=kl).steps
    assert first.schedule_state == {"accuracy": 0.0}
    assert second.schedule_state == pytest.approx({"accuracy": 0.1 * 1.0})


def test_without_an_accuracy_reward_the_accuracy_is_nan() -> None:
    [record] = run(ScriptedWorkers(), range(1)).steps
    others = [replace(scored, parts={"format": scored.rewards}) for scored in record.requested]
    assert np.isnan(measure(Sampled(requested=others, trained=others), record.stats).accuracy)
    partly = [replace(others[0], rewards=np.ones(3)), *record.requested[1:]]
    assert measure(Sampled(requested=partly, trained=partly), record.stats).accuracy == pytest.approx(1.0)


def test_a_step_without_graded_answers_keeps_the_accuracy() -> None:
    kl = replace(PAPER, name="accuracy")
    [record] = run(ScriptedWorkers(masked=True), range(1), kl=kl, state={"accuracy": 0.5}).steps
    assert record.schedule_state == {"accuracy": 0.5}

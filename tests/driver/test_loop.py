"""The loop, with a team that only remembers what it was requested: order of the verbs, betas, versions, shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from othink_ray.core.kl import BetaSchedule, schedule
from othink_ray.driver.loop import Sampled, measured, train
from othink_ray.driver.metrics import measures
from othink_ray.types import Group, Prompt
from tests.driver.fakes import PAPER, Diary, Numbers, ScriptedTeam, recipe_of


def run(
    team: ScriptedTeam,
    steps: range,
    *,
    updates: int = 1,
    rounds: int = 1,
    kl: BetaSchedule = PAPER,
    state: Mapping[str, float] | None = None,
) -> Diary:
    diary = Diary()
    train(
        team,
        Numbers(),
        steps=steps,
        recipe=recipe_of(updates=updates, rounds=rounds),
        schedule=kl,
        schedule_state=kl.start() if state is None else state,
        lr=lambda step: 1.0 / (step + 1),
        journal=diary,
    )
    return diary


def test_a_step_is_generate_score_update_push_on_the_newest_weights() -> None:
    team = ScriptedTeam()
    run(team, range(2))
    assert [call[0] for call in team.calls] == ["push", *["generate", "score", "update", "push"] * 2]
    assert [call[1] for call in team.calls if call[0] == "push"] == [0, 1, 2]


def test_each_step_trains_with_the_beta_of_equation_3() -> None:
    team = ScriptedTeam()
    run(team, range(10))
    betas = [call[3] for call in team.calls if call[0] == "update"]
    assert betas == [schedule("paper", step, 10, 0.04, 0.1, 0.3) for step in range(10)]
    assert betas[0] == pytest.approx(0.07)


def test_rows_are_trained_in_the_order_of_the_prompts() -> None:
    team = ScriptedTeam()
    run(team, range(1))
    [trained] = [call[1] for call in team.calls if call[0] == "update"]
    assert trained == ["p0", "p1", "p2", "p3"]


def test_answers_of_older_weights_are_refused() -> None:
    with pytest.raises(AssertionError, match="other weights"):
        run(ScriptedTeam(lag=1), range(1))


def test_one_group_of_older_weights_among_others_is_refused() -> None:
    class Mixed(ScriptedTeam):
        def generate(self, prompts: Sequence[Prompt], step: int, sampling_round: int) -> Iterator[Group]:
            for group in super().generate(prompts, step, sampling_round):
                yield replace(group, version=group.version - int(group.prompt.id == "p2"))

    with pytest.raises(AssertionError, match="other weights"):
        run(Mixed(), range(1))


def test_the_loss_weights_of_one_update_add_up_to_one() -> None:
    team = ScriptedTeam()
    run(team, range(1))
    assert team.weight == pytest.approx(1.0)
    run(team, range(1), updates=2)
    assert team.weight == pytest.approx(2.0)  # two updates, each of weight one


def test_a_resumed_run_begins_with_the_weights_of_its_step() -> None:
    team = ScriptedTeam()
    diary = run(team, range(3, 5))
    assert team.calls[0] == ("push", 3)
    assert diary.begun == [3]
    assert [seen.step for seen in diary.steps] == [3, 4]


def test_masked_answers_do_not_count_in_the_means_but_are_counted() -> None:
    [seen] = run(ScriptedTeam(masked=True), range(1)).steps
    found = measures(seen)
    assert found["groups/masked"] == 12
    assert np.isnan(found["reward/mean"])
    assert all(not advantages.any() for advantages in seen.advantages)


def test_a_mean_of_rewards_is_over_valid_answers_alone() -> None:
    [seen] = run(ScriptedTeam(), range(1)).steps
    [first, *rest] = seen.requested  # answers are rewarded 0, 1, 2
    partly = replace(first, valid=np.array([True, True, False]))
    found = measures(replace(seen, requested=[partly, *rest]))
    assert found["reward/mean"] == found["reward/accuracy"] == pytest.approx((1 + 3 * 3) / 11)
    assert found["groups/masked"] == 1


def test_the_layers_of_grading_are_counted_over_all_groups() -> None:
    [seen] = run(ScriptedTeam(), range(1)).steps
    found = measures(seen)
    assert (found["reward/graded_by_rules"], found["reward/grader_timeouts"]) == (8, 4)
    assert (found["reward/graded_symbolically"], found["reward/grader_crashes"], found["reward/untagged"]) == (0, 0, 0)


def test_images_that_the_engines_looked_at_are_counted_over_all_groups() -> None:
    [seen] = run(ScriptedTeam(dull=frozenset({1, 2, 4})), range(1), rounds=5).steps
    assert measures(seen)["rollout/image_encodes"] == 2 * len(seen.requested) == 14


def test_the_laps_of_a_step_add_up_to_its_time() -> None:
    [seen] = run(ScriptedTeam(), range(1)).steps
    found = measures(seen)
    laps = [found[f"time/{name}_s"] for name in ("generate", "score", "update", "push")]
    assert found["time/step_s"] == pytest.approx(sum(laps))
    assert found["time/hidden_s"] == 0


# ---- dynamic sampling


def trained(team: ScriptedTeam) -> list[str]:
    [ids] = [call[1] for call in team.calls if call[0] == "update"]
    return list(ids)


def test_groups_of_equal_rewards_are_replaced_by_new_questions() -> None:
    team = ScriptedTeam(dull=frozenset({1, 2, 4}))
    [seen] = run(team, range(1), rounds=5).steps
    assert [call for call in team.calls if call[0] in ("generate", "score")] == [
        *[("generate", 0), ("score", 4)],
        *[("generate", 0), ("score", 2)],
        *[("generate", 0), ("score", 1)],
    ]
    assert team.rounds == [0, 1, 2]
    assert trained(team) == ["p0", "p3", "p5", "p6"]
    assert [one.group.prompt.id for one in seen.requested] == [f"p{number}" for number in range(7)]
    assert len(seen.advantages) == 4 and all(own.any() for own in seen.advantages)


def test_what_is_missing_after_the_last_round_is_made_up_from_groups_of_equal_rewards() -> None:
    team = ScriptedTeam(dull=frozenset({0, 1, 3, 4, 6}))
    run(team, range(1), rounds=2)
    assert trained(team) == ["p0", "p1", "p2", "p5"]
    team = ScriptedTeam(dull=frozenset(range(100)))
    run(team, range(1), rounds=3)
    assert trained(team) == ["p0", "p1", "p2", "p3"]
    assert team.calls.count(("generate", 0)) == 3


def test_a_single_round_trains_every_group_in_order() -> None:
    team = ScriptedTeam(dull=frozenset({0, 2}))
    [seen] = run(team, range(1)).steps
    assert trained(team) == ["p0", "p1", "p2", "p3"]
    assert list(seen.requested) == list(seen.scored)


def test_metrics_are_of_all_that_was_asked_not_only_of_what_was_kept() -> None:
    [seen] = run(ScriptedTeam(dull=frozenset({1, 2, 4})), range(1), rounds=5).steps
    found = measures(seen)
    assert found["groups/requested"] == 7
    assert found["groups/constant_frac"] == pytest.approx(3 / 7)
    assert found["reward/mean"] == pytest.approx(4 / 7)
    assert found["reward/accuracy"] == pytest.approx(4 / 7)


def test_the_laps_of_a_step_of_several_rounds_add_up_to_its_time() -> None:
    [seen] = run(ScriptedTeam(dull=frozenset({1, 2, 4})), range(1), rounds=5).steps
    assert set(seen.times) == {"generate", "score", "update", "push"}
    assert all(lap >= 0 for lap in seen.times.values())


# ---- schedules with a state


def test_a_schedule_with_a_state_steers_by_what_the_last_step_showed() -> None:
    kl = replace(PAPER, name="target")
    betas = [seen.beta for seen in run(ScriptedTeam(kl=0.011), range(3), kl=kl).steps]
    assert betas == pytest.approx([0.07, 0.07 * 1.01, 0.07 * 1.01**2])


def test_the_accuracy_that_steers_is_that_of_all_answers_asked() -> None:
    kl = replace(PAPER, name="accuracy")
    first, second = run(ScriptedTeam(dull=frozenset({0, 1, 2, 3})), range(2), kl=kl).steps
    assert first.schedule_state == {"accuracy": 0.0}
    assert second.schedule_state == pytest.approx({"accuracy": 0.1 * 1.0})


def test_rewards_without_an_accuracy_are_no_accuracy() -> None:
    [seen] = run(ScriptedTeam(), range(1)).steps
    others = [replace(one, parts={"format": one.rewards}) for one in seen.requested]
    assert np.isnan(measured(Sampled(requested=others, trained=others), seen.stats).accuracy)
    partly = [replace(others[0], rewards=np.ones(3)), *seen.requested[1:]]
    assert measured(Sampled(requested=partly, trained=partly), seen.stats).accuracy == pytest.approx(1.0)


def test_a_step_without_graded_answers_leaves_the_accuracy_alone() -> None:
    kl = replace(PAPER, name="accuracy")
    [seen] = run(ScriptedTeam(masked=True), range(1), kl=kl, state={"accuracy": 0.5}).steps
    assert seen.schedule_state == {"accuracy": 0.5}

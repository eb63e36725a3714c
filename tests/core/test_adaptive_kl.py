"""Adaptive KL schedules, which follow the measured KL or accuracy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from othink_ray.core.kl import ADAPTIVE, SCHEDULES, BetaSchedule, Measured, schedule
from tests.reference import golden, variants

REPEATABLE = settings(deadline=None, derandomize=True)
GOLDEN = json.loads(golden.FILE.read_text())
TARGET = BetaSchedule(
    name="target", total=10, beta_min=0.04, beta_max=0.1, explore_frac=0.3, target=0.01, adapt_rate=0.5
)
ACCURACY = replace(TARGET, name="accuracy")


def betas(kl: BetaSchedule, measurements: list[Measured]) -> list[float]:
    """Return beta before each step and after the last."""
    state, found = kl.start(), []
    for step, measured in enumerate(measurements):
        found.append(kl.beta(step, state))
        state = kl.after(state, measured)
    return [*found, kl.beta(len(measurements), state)]


def of_kl(*values: float) -> list[Measured]:
    return [Measured(kl=value, accuracy=0.5) for value in values]


def of_accuracy(*values: float) -> list[Measured]:
    return [Measured(kl=0.01, accuracy=value) for value in values]


def test_stateful_schedules_give_their_golden_betas() -> None:
    assert betas(TARGET, of_kl(*golden.KLS)) == pytest.approx(GOLDEN["target"], rel=1e-12)
    assert betas(ACCURACY, of_accuracy(*golden.ACCURACIES)) == pytest.approx(GOLDEN["accuracy"], rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_fixed_schedules_give_their_golden_betas(name: str) -> None:
    fixed = replace(TARGET, name=name)
    assert fixed.start() == {}
    assert fixed.after({}, Measured(kl=9.0, accuracy=1.0)) == {}
    found = [fixed.beta(step, {}) for step in range(12)]
    assert found == [schedule(name, step, **golden.CURVE) for step in range(12)]
    assert found == pytest.approx(GOLDEN["schedules"][name], abs=1e-12)


NUMBERS = st.one_of(st.floats(0, 1), st.just(math.nan))


@REPEATABLE
@given(st.lists(NUMBERS, max_size=20), st.floats(1e-3, 0.5), st.floats(0, 1), st.floats(1e-4, 1), st.floats(0.01, 1))
def test_stateful_schedules_equal_the_slow_reference(
    seen: list[float], low: float, rise: float, target: float, rate: float
) -> None:
    kl = replace(TARGET, beta_min=low, beta_max=low + rise, target=target, adapt_rate=rate)
    expected = variants.betas_of_target(seen, low, low + rise, target, rate)
    assert betas(kl, of_kl(*seen)) == pytest.approx(expected, rel=1e-9)
    expected = variants.betas_of_accuracy(seen, low, low + rise, rate)
    assert betas(replace(kl, name="accuracy"), of_accuracy(*seen)) == pytest.approx(expected, rel=1e-9)


def test_beta_follows_the_kl_around_its_target() -> None:
    start, above, below = betas(TARGET, of_kl(0.011, 0.009))
    assert start == pytest.approx(0.07)
    assert above == pytest.approx(0.07 * (1 + 0.5 * 0.1))
    assert below == pytest.approx(above * (1 - 0.5 * 0.1))


def test_an_outlier_step_changes_beta_by_a_bounded_factor() -> None:
    assert betas(TARGET, of_kl(math.inf))[1] == pytest.approx(0.07 * 1.1)
    assert betas(TARGET, of_kl(0.0))[1] == pytest.approx(0.07 * 0.9)


def test_beta_is_clamped_without_windup() -> None:
    up = betas(TARGET, of_kl(*[1.0] * 30, 0.0))
    assert max(up) == 0.1 and up[-1] == pytest.approx(0.09)
    down = betas(TARGET, of_kl(*[0.0] * 30, 1.0))
    assert min(down) == 0.04 and down[-1] == pytest.approx(0.044)


def test_beta_rises_with_accuracy() -> None:
    wrong = betas(ACCURACY, of_accuracy(*[0.0] * 5))
    assert wrong == [0.04] * 6
    right = betas(ACCURACY, of_accuracy(*[1.0] * 40))
    assert right[1] == pytest.approx(0.07)
    assert right == sorted(right) and right[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("kl", [TARGET, ACCURACY])
def test_a_step_without_data_does_not_change_the_state(kl: BetaSchedule) -> None:
    state = kl.after(kl.start(), Measured(kl=0.5, accuracy=0.5))
    assert kl.after(state, Measured(kl=math.nan, accuracy=math.nan)) == state


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_state_restored_from_json_gives_the_same_betas(name: str) -> None:
    kl = replace(TARGET, name=name)
    seen = [Measured(kl=0.3 / (k + 1), accuracy=1 / (k + 2)) for k in range(9)]
    whole = betas(kl, seen)
    state = kl.start()
    for measured in seen[:4]:
        state = kl.after(state, measured)
    state = kl.resume(json.loads(json.dumps(dict(state))))
    resumed = []
    for measured in seen[4:]:
        resumed.append(kl.beta(0, state))
        state = kl.after(state, measured)
    assert resumed == whole[4:-1]


def test_the_state_of_another_schedule_is_ignored() -> None:
    assert TARGET.resume({"accuracy": 0.9}) == TARGET.start()
    assert TARGET.resume({}) == TARGET.start()
    assert ACCURACY.resume({"accuracy": 0.9}) == {"accuracy": 0.9}
    assert replace(TARGET, name="paper").resume({"beta": 0.05}) == {}


def test_stateful_schedules_load_without_torch() -> None:
    code = "import sys; import othink_ray.core.kl; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

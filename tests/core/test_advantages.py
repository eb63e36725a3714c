"""Group-relative advantages against the slow reference and values computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from othink_ray.core.advantages import ADVANTAGES, EPS, group_advantages, rewards_differ
from tests.reference import grpo_d

REPEATABLE = settings(deadline=None, derandomize=True)


def test_advantages_of_one_correct_answer_in_four() -> None:
    # mean 1/4, sample std sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2
    assert group_advantages(np.array([1.0, 0, 0, 0])) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-6)


@REPEATABLE
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0]), st.booleans()), min_size=2, max_size=12))
def test_advantages_equal_the_slow_reference(answers: list[tuple[float, bool]]) -> None:
    rewards, valid = zip(*answers, strict=True)
    expected = grpo_d.advantages(rewards, valid, EPS)
    assert group_advantages(np.array(rewards), np.array(valid)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 7, 8, 64])
@pytest.mark.parametrize("constant", [0.9, 0.1 + 0.2, 1 / 3, -0.7, 2.0, 0.0, 30000.0])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64]
)
def test_equal_rewards_give_exactly_zero_advantage(size: int, constant: float, dtype: torch.dtype) -> None:
    rewards = torch.full((size,), constant, dtype=torch.float64).to(dtype)
    assert torch.equal(group_advantages(rewards), torch.zeros(size, dtype=torch.float64))


@REPEATABLE
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(2, 40), st.sampled_from([np.float32, np.float64]))
def test_any_constant_in_any_group_size_gives_exactly_zero(
    constant: float, size: int, dtype: type[np.floating]
) -> None:
    rewards = np.full(size, np.clip(constant, -3e38, 3e38), dtype=dtype)
    assert not group_advantages(rewards).any()


def test_an_equal_group_next_to_an_unequal_one_gets_zero() -> None:
    advantages = group_advantages(np.array([[0.9] * 8, [0.9] * 7 + [0.1]], dtype=np.float32))
    assert not advantages[0].any()
    assert advantages[1].all()


def test_groups_are_independent() -> None:
    rewards = np.random.default_rng(0).random((5, 4))
    each = np.stack([group_advantages(group) for group in rewards])
    np.testing.assert_array_equal(group_advantages(rewards), each)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_tensors_and_arrays_give_the_same_float64_values(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[0, 1, 2, 1], [1, 1, 0, 0]]).to(dtype)
    from_tensor = group_advantages(rewards)
    assert from_tensor.dtype == torch.float64
    np.testing.assert_array_equal(from_tensor.numpy(), group_advantages(rewards.to(torch.float64).numpy()))


def test_an_invalid_answer_gets_zero_and_is_excluded() -> None:
    rewards = torch.tensor([1.0, float("nan"), 0.0, 0.0])
    advantages = group_advantages(rewards, torch.tensor([True, False, True, True]))
    assert advantages[1] == 0
    assert torch.equal(advantages[[0, 2, 3]], group_advantages(torch.tensor([1.0, 0.0, 0.0])))


@pytest.mark.parametrize("valid", [[False, False, False], [True, False, False]])
def test_fewer_than_two_valid_answers_give_zero(valid: list[bool]) -> None:
    assert not group_advantages(np.array([1.0, 0.0, 0.5]), np.array(valid)).any()


def test_nearly_equal_rewards_give_bounded_advantages() -> None:
    real_difference = group_advantages(np.array([0.5, 0.5 + 1e-5]))
    assert real_difference == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-2)
    rounding = group_advantages(np.array([0.3, 0.1 + 0.2, 0.3, 0.3]))
    assert 0 < np.abs(rounding).max() < 1e-6


@REPEATABLE
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_advantages_are_bounded_by_group_size(rewards: list[float]) -> None:
    size = len(rewards)
    assert np.abs(group_advantages(np.array(rewards))).max() <= (size - 1) / size**0.5 + 1e-9


@REPEATABLE
@given(st.lists(st.integers(0, 4), min_size=2, max_size=8), st.randoms())
def test_the_order_of_answers_does_not_matter(rewards: list[int], random: Any) -> None:
    order = list(range(len(rewards)))
    random.shuffle(order)
    ordered, shuffled = np.array(rewards), np.array(rewards)[order]
    np.testing.assert_allclose(group_advantages(shuffled), group_advantages(ordered)[order], atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rewards": np.array([1.0])}, ["algo.group_size = 1", "at least 2", "within a group"]),
        ({"rewards": torch.ones(3, 1)}, ["algo.group_size = 1 must"]),
        ({"rewards": torch.ones(2, 2, 2)}, ["have shape (2, 2, 2):"]),
        ({"rewards": np.ones((2, 2, 2))}, ["(2, 2, 2)", "(G,)", "(N, G)"]),
        ({"rewards": np.ones(3), "valid": np.ones(2, dtype=bool)}, ["valid", "(2,)", "(3,)"]),
        ({"rewards": np.array([1.0, np.nan])}, ["nan", "as invalid"]),
        ({"rewards": np.ones(3), "eps": 0.0}, ["eps", "0.0", "greater than 0"]),
    ],
)
def test_invalid_rewards_are_rejected(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        group_advantages(**arguments)
    assert all(word in str(error.value) for word in words)


# ---- other variants, over a whole step

ONE_RIGHT = np.array([[1.0, 0, 0, 0], [1.0, 1, 0, 0]])
ALL = np.ones((2, 4), dtype=bool)


def test_dr_grpo_subtracts_only_the_group_mean() -> None:
    assert ADVANTAGES["group_mean"](ONE_RIGHT, ALL).tolist() == [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]


def test_rloo_compares_an_answer_with_the_other_answers() -> None:
    expected = [[1.0, -1 / 3, -1 / 3, -1 / 3], [2 / 3, 2 / 3, -2 / 3, -2 / 3]]
    np.testing.assert_allclose(ADVANTAGES["leave_one_out"](ONE_RIGHT, ALL), expected)


def test_batch_std_is_shared_by_all_groups_of_the_step() -> None:
    # squared deviations 0.75 and 1, over 7
    expected = np.array([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]) / (1.75 / 7) ** 0.5
    np.testing.assert_allclose(ADVANTAGES["batch_std"](ONE_RIGHT, ALL), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("constant", [0.9, 0.1 + 0.2, 1 / 3, -0.7, 0.0])
def test_equal_rewards_give_zero_in_every_variant(name: str, constant: float) -> None:
    rewards = np.array([[constant] * 7, [1.0, 0, 0, 0.3, 1, 0, 0]])
    found = ADVANTAGES[name](rewards, np.ones((2, 7), dtype=bool))
    assert not found[0].any()
    assert found[1].all()
    assert not ADVANTAGES[name](rewards[:1], np.ones((1, 7), dtype=bool)).any()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_invalid_answers_are_excluded_in_every_variant(name: str) -> None:
    valid = np.array([[True, True, True, False]] * 2)
    rewards = np.where(valid, ONE_RIGHT, np.nan)
    found = ADVANTAGES[name](rewards, valid)
    np.testing.assert_allclose(found[:, :3], ADVANTAGES[name](ONE_RIGHT[:, :3], ALL[:, :3]))
    assert not found[:, 3].any()


def test_a_group_counts_only_if_valid_rewards_differ() -> None:
    assert rewards_differ(np.array([1.0, 0.0]), np.array([True, True]))
    assert not rewards_differ(np.array([1.0, 0.0]), np.array([True, False]))
    assert not rewards_differ(np.array([0.9] * 8), np.array([True] * 8))
    assert not rewards_differ(np.array([0.0, 0.0]), np.array([False, False]))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_variant_rejects_a_valid_nan_reward(name: str) -> None:
    with pytest.raises(ValueError, match="as invalid"):
        ADVANTAGES[name](np.array([[np.nan, 1.0]]), np.ones((1, 2), dtype=np.bool_))


def test_two_answers_are_divided_by_their_sample_std() -> None:
    found = ADVANTAGES["batch_std"](np.array([[0.0, 1.0]]), np.ones((1, 2), dtype=np.bool_))
    np.testing.assert_allclose(found, [[-0.5 / (0.5**0.5 + EPS), 0.5 / (0.5**0.5 + EPS)]], rtol=1e-12)


def test_a_reward_at_the_mean_does_not_hide_differences() -> None:
    assert rewards_differ(np.array([0.0, 0.5, 1.0]), np.ones(3, dtype=np.bool_))


def test_equal_rewards_next_to_masked_ones_give_exactly_zero() -> None:
    rewards = np.array([[9.0, 0.1, 0.1, 0.1, 8.0], [0.3, 0.3, 7.0, 0.3, 8.0], [9.0, 8.0, 0.1, 0.1, 0.1]])
    valid = np.array([[False, True, True, True, False], [True, True, False, True, False], [False] * 2 + [True] * 3])
    assert (ADVANTAGES["group_mean"](rewards, valid) == 0.0).all()


def test_rewards_with_gradients_and_integer_masks_are_accepted() -> None:
    rewards = torch.tensor([[0.0, 1.0, 5.0]], requires_grad=True)
    masked = group_advantages(rewards, valid=np.array([[1, 1, 0]]))
    assert torch.equal(masked, group_advantages(rewards, valid=np.array([[True, True, False]])))
    assert not masked.requires_grad

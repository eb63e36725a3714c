"""Comparing the probes of a new engine with those of an audited one, up to the token where the answers diverge."""

from __future__ import annotations

import numpy as np
import pytest

from othink_ray.types import Completion, Group, Probe, Prompt
from othink_ray.weights import AuditError, Tolerance, compare, mostly_comparable


def probe(tokens: list[int], candidates: list[list[int]], logprobs: list[list[float]]) -> Probe:
    ids = np.array(tokens)
    completion = Completion(token_ids=ids, sampler_logprobs=np.zeros(len(ids), np.float32), text="", finish="stop")
    prompt = Prompt(id="p", messages=(), images=(), answer="", task="counting")
    group = Group(prompt=prompt, prompt_token_ids=np.arange(2), completions=(completion,), version=1)
    return Probe(group=group, candidates=np.array(candidates), logprobs=np.array(logprobs, dtype=np.float32))


KNOWN = probe([5, 6], [[5, 7], [6, 8]], [[-0.5, -1.0], [-0.25, -2.0]])


def test_candidates_are_compared_in_any_order() -> None:
    audit = compare([probe([5, 6], [[7, 5], [6, 8]], [[-1.0, -0.5], [-0.25, -2.0]])], [KNOWN], 3)
    assert (audit.version, audit.gap_mean, audit.tokens) == (3, 0.0, 4)


def test_gaps_and_sizes_are_exact() -> None:
    here, there = np.float32([-10.3, -0.25]), np.float32([-0.1, -3.7])
    audit = compare([probe([5], [[5, 7]], [here.tolist()])], [probe([5], [[7, 5]], [there[::-1].tolist()])], 3)
    gaps = np.abs(here.astype(np.float64) - there.astype(np.float64))
    assert audit.gap_mean == pytest.approx(gaps.mean(), rel=1e-14)
    assert audit.gap_max == pytest.approx(gaps.max(), rel=1e-14)
    assert audit.logp_mean == pytest.approx(np.abs(there.astype(np.float64)).mean(), rel=1e-14)


def test_without_common_candidates_the_gap_is_infinite() -> None:
    audit = compare([probe([5], [[1, 2]], [[-0.5, -1.0]])], [KNOWN], 3)
    assert (audit.gap_mean, audit.gap_max, audit.tokens, audit.logp_mean) == (np.inf, np.inf, 0, 0.0)


def test_a_candidate_without_a_logprob_is_rejected() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([probe([5], [[5, 7]], [[-0.5]])], [KNOWN], 3)


def test_at_least_half_of_the_candidates_must_be_comparable() -> None:
    half = probe([5], [[5, 1]], [[-0.5, -1.0]])
    third = probe([5], [[5, 1, 2]], [[-0.5, -1.0, -2.0]])
    assert mostly_comparable([half], [KNOWN])
    assert not mostly_comparable([third], [KNOWN])


def test_positions_after_a_divergence_are_not_compared() -> None:
    """After different tokens, the same candidates correctly have different logprobs."""
    found = probe([7, 6], [[7, 5], [6, 8]], [[-1.0, -0.5], [-9.0, -9.0]])
    audit = compare([found], [KNOWN], 3)
    assert (audit.tokens, audit.gap_max) == (2, 0.0)


def test_several_engines_are_compared_on_the_same_prompts() -> None:
    other = probe([9], [[9, 1]], [[-0.1, -3.0]])
    assert compare([KNOWN, other, KNOWN, other], [KNOWN, other], 3).gap_max == 0


@pytest.mark.parametrize(
    "found",
    [
        probe([5, 6], [[5, 7], [6, 8]], [[-0.6, -1.0], [-0.25, -2.0]]),
        probe([5, 6], [[1, 2], [3, 4]], [[-0.5, -1.0], [-0.25, -2.0]]),
        probe([5], [[5, 7]], [[float("nan"), -1.0]]),
    ],
    ids=["other logprobs", "nothing in common", "nan"],
)
def test_an_engine_with_another_policy_is_rejected(found: Probe) -> None:
    with pytest.raises(AuditError):
        Tolerance("float32", layers=5, fixed=1e-3).require(compare([found], [KNOWN], 3))


def test_an_incomparable_engine_is_not_hidden_by_others() -> None:
    stranger = probe([1, 2], [[1, 2], [3, 4]], [[-0.5, -1.0], [-0.25, -2.0]])
    engines = [KNOWN, KNOWN, stranger]
    assert compare(engines, [KNOWN], 3).gap_max == 0  # nothing of the third engine can be compared
    assert not mostly_comparable(engines, [KNOWN])
    assert mostly_comparable([KNOWN, KNOWN], [KNOWN])

"""The rollout engines on which the contract suites run."""

from __future__ import annotations

import pytest

from othink_ray.engines.base import RolloutEngine
from othink_ray.engines.policy import Policy
from tests.engines.samples import give, sent_weights


@pytest.fixture(params=["vllm", "hf"])
def engine(request: pytest.FixtureRequest, policy: Policy) -> RolloutEngine:
    """Return each engine in turn, with the weights of `policy` as version 0."""
    opened: RolloutEngine = request.getfixturevalue(f"{request.param}_engine")
    give(opened, sent_weights(policy.network), 0)
    return opened

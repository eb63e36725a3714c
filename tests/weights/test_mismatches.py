"""Digests of the engines' weights against those sent: workers' parts are added up, and errors name the weights."""

from __future__ import annotations

import pytest
import torch

from othink_ray.weights import (
    AuditError,
    ShardDigest,
    WorkerDigests,
    digests,
    mismatches,
    require_arrived,
    shard_digest,
)

WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
SENT = digests([("w", WEIGHT)])
TOP, BOTTOM = (
    ShardDigest(value=int(shard_digest(WEIGHT[rows], rows.start, 0)), elements=12)
    for rows in (slice(0, 3), slice(3, 6))
)
WHOLE = ShardDigest(value=SENT["w"].value, elements=24)
DIFFERS, PARTIAL = {"w": "differs from what the learner sent"}, {"w": "is not in the engine, or not whole"}


def held(*parts: ShardDigest | None) -> list[WorkerDigests]:
    return [WorkerDigests(shards={} if part is None else {"w": part}, faults={}) for part in parts]


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        ((WHOLE,), {}),
        ((WHOLE, WHOLE), {}),
        ((TOP, BOTTOM), {}),
        ((TOP, BOTTOM, TOP, BOTTOM), {}),  # e.g. keys and values with fewer heads than workers
        ((ShardDigest(value=TOP.value + 2**64, elements=12), BOTTOM), {}),  # digests are modulo 2**64
        ((ShardDigest(value=TOP.value + 2**63, elements=12), BOTTOM), DIFFERS),
        ((ShardDigest(value=TOP.value + 3**40, elements=12), BOTTOM), DIFFERS),
        ((TOP, TOP), DIFFERS),
        ((TOP, TOP, TOP, BOTTOM), DIFFERS),
        ((WHOLE, ShardDigest(value=WHOLE.value + 1, elements=24)), DIFFERS),
        ((TOP,), PARTIAL),
        ((WHOLE, TOP), PARTIAL),
        ((None, None), PARTIAL),
    ],
)
def test_workers_may_shard_or_replicate_a_weight(parts: tuple[ShardDigest, ...], wrong: dict[str, str]) -> None:
    assert mismatches(SENT, held(*parts)) == wrong


def test_faults_of_any_worker_are_reported() -> None:
    stale = WorkerDigests(shards={"w": WHOLE}, faults={"head": "is stale"})
    assert mismatches(SENT, [*held(WHOLE), stale]) == {"head": "is stale"}


def test_the_error_names_the_engine_and_the_first_weights() -> None:
    require_arrived([{}, {}], 4)
    with pytest.raises(AuditError) as caught:
        require_arrived([{}, {f"w{number}": "differs" for number in range(5)}], 4)
    message = str(caught.value)
    for part in (
        *("audit of weights version 4 failed: in engine 1 of 2, digests of 5 weights are wrong", "weights.transport"),
        *("w0 differs; w1 differs; w2 differs; and 2 more.", "tied lm_head", "logprobs were not compared"),
    ):
        assert part in message
    for few in (["w"], ["u", "v", "w"]):
        with pytest.raises(AuditError, match=r"w differs\. The logprobs"):
            require_arrived([dict.fromkeys(few, "differs")], 4)

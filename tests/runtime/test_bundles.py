"""Bundles of a run and their placement on nodes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from othink_ray.config.load import load
from othink_ray.runtime import placement
from othink_ray.runtime.bundles import ProcessSpec, all_bundles, assign_bundles, describe, shortage, total_resources
from othink_ray.runtime.futures import TracedActor

SHARED = load(["cluster=one_node_colocated"])
SPLIT = load(["cluster=one_node"])


def roles(bundles: list[tuple[object, ...]]) -> list[tuple[str, ...]]:
    return [tuple(process.role for process in bundle) for bundle in bundles]  # type: ignore[attr-defined]


def test_a_rank_and_an_engine_on_one_gpu_share_a_bundle() -> None:
    bundles = all_bundles(SHARED.learner, SHARED.rollout)
    assert roles(bundles) == [("learner", "rollout")] * 8
    assert total_resources(bundles[:1]) == {"CPU": 4, "GPU": 1}


def test_processes_with_whole_gpus_get_separate_bundles() -> None:
    assert roles(all_bundles(SPLIT.learner, SPLIT.rollout)) == [("learner",)] * 4 + [("rollout",)] * 4


def test_an_engine_on_several_gpus_is_one_bundle() -> None:
    rollout = replace(SPLIT.rollout, num_actors=1, tensor_parallel=4, gpus_per_actor=4)
    assert total_resources(all_bundles(SPLIT.learner, rollout)[-1:]) == {"CPU": 2, "GPU": 4}


def test_ranks_fill_nodes_in_order_when_ray_scatters_bundles() -> None:
    nodes = ["a", "b"] * 8
    random.Random(0).shuffle(nodes)
    found = [nodes[index] for index in assign_bundles(["gpu"] * 16, nodes)]
    assert found == ["a"] * 8 + ["b"] * 8


def test_ranks_fill_the_node_with_most_bundles_first() -> None:
    nodes = ["a", "b", "c", "b", "c", "b"]
    assert [nodes[index] for index in assign_bundles(["gpu"] * 6, nodes)] == ["b", "b", "b", "c", "c", "a"]


class _Reserved(Exception):
    """Ends the test once the reservation is recorded."""


def test_bundles_are_reserved_with_the_configured_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = []

    def reserve(bundles: object, strategy: str = "PACK") -> None:
        reserved.append((bundles, strategy))
        raise _Reserved

    monkeypatch.setattr(placement, "placement_group", reserve)
    bundles = [(ProcessSpec(role="learner", cpus=2, gpus=0.5), ProcessSpec(role="rollout", cpus=1, gpus=0.5))]
    with pytest.raises(_Reserved):
        placement.Placement(bundles, replace(SPLIT.cluster, placement="STRICT_SPREAD"), print)
    assert reserved == [([{"CPU": 3, "GPU": 1.0}], "STRICT_SPREAD")]


def test_each_process_starts_in_its_bundle_with_its_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_start", lambda actor, arguments, **options: options)
    monkeypatch.setattr(placement, "PlacementGroupSchedulingStrategy", lambda **where: where)
    placed: Any = object.__new__(placement.Placement)
    placed.group, placed.bundle_indices = "reserved", [2, 0, 1]
    both = (ProcessSpec(role="learner", cpus=2, gpus=0.5), ProcessSpec(role="rollout", cpus=1, gpus=0.25))
    placed.bundles = [both, (ProcessSpec(role="rollout", cpus=4, gpus=1),), both]
    for role, number, cpus, gpus, bundle in (
        *(("learner", 0, 2, 0.5, 2), ("learner", 1, 2, 0.5, 1)),
        *(("rollout", 0, 1, 0.25, 2), ("rollout", 1, 4, 1, 0), ("rollout", 2, 1, 0.25, 1)),
    ):
        strategy = {"placement_group": "reserved", "placement_group_bundle_index": bundle}
        expected = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}
        assert placed.start(TracedActor, role, number) == expected


def test_a_gpu_process_does_not_fit_a_cluster_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"CPU": 4.0})
    assert placement.fits([(ProcessSpec(role="rollout", cpus=4, gpus=0),)])
    assert not placement.fits([(ProcessSpec(role="rollout", cpus=5, gpus=0),)])
    assert not placement.fits([(ProcessSpec(role="rollout", cpus=1, gpus=1),)])


def test_an_unreserved_process_takes_no_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_start", lambda actor, arguments, **options: (actor, arguments, options))
    started = placement.Placement.start_unreserved(TracedActor, 1, "two")
    assert started == (TracedActor, (1, "two"), {"num_cpus": 0})


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("abc")), min_size=1, max_size=20))
def test_each_bundle_is_assigned_once_to_one_of_equal_size(reserved: list[tuple[str, str]]) -> None:
    sizes = [size for size, _ in reserved]
    indices = assign_bundles(sizes, [node for _, node in reserved])
    assert sorted(indices) == list(range(len(reserved)))
    assert [sizes[index] for index in indices] == sizes


def test_describe_shows_every_process_once_on_its_node() -> None:
    large = replace(SPLIT.rollout, num_actors=1, tensor_parallel=2, gpus_per_actor=2)
    few = replace(SPLIT.learner, world_size=2)
    drawn = describe(all_bundles(few, large), ["10.0.0.1", "10.0.0.1", "10.0.0.2"], driver="10.0.0.3")
    assert drawn.splitlines()[1:] == ["  10.0.0.3  [driver]", "  10.0.0.1  [L0] [L1]", "  10.0.0.2  [R0 2 GPUs]"]
    both = describe(all_bundles(SHARED.learner, SHARED.rollout), ["here"] * 8, driver="here")
    assert both.splitlines()[1].startswith("  here  [driver] [L0 R0] [L1 R1]")


def test_a_shortage_names_needed_present_and_free_resources() -> None:
    text = shortage({"CPU": 32, "GPU": 16}, {"CPU": 60, "GPU": 3}, {"CPU": 64, "GPU": 8})
    assert text == "needs 32 CPUs (cluster has 64, 60 free) and 16 GPUs (cluster has 8, 3 free)"

"""Who sits beside whom."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from othink_ray.config.load import load
from othink_ray.runtime import placement
from othink_ray.runtime.futures import TraceRecorder
from othink_ray.runtime.placement import ProcessSpec, all_bundles, assign_bundles, describe, shortage, wanted

SHARED = load(["cluster=one_node_colocated"])
SPLIT = load(["cluster=one_node"])


def roles(bundles: list[tuple[object, ...]]) -> list[tuple[str, ...]]:
    return [tuple(seat.role for seat in bundle) for bundle in bundles]  # type: ignore[attr-defined]


def test_a_rank_and_an_engine_that_share_a_gpu_are_reserved_together() -> None:
    bundles = all_bundles(SHARED.learner, SHARED.rollout)
    assert roles(bundles) == [("learner", "rollout")] * 8
    assert wanted(bundles[:1]) == {"CPU": 4, "GPU": 1}


def test_processes_with_gpus_of_their_own_are_reserved_alone() -> None:
    assert roles(all_bundles(SPLIT.learner, SPLIT.rollout)) == [("learner",)] * 4 + [("rollout",)] * 4


def test_an_engine_on_several_gpus_is_one_bundle_that_no_node_can_split() -> None:
    rollout = replace(SPLIT.rollout, num_actors=1, tensor_parallel=4, gpus_per_actor=4)
    assert wanted(all_bundles(SPLIT.learner, rollout)[-1:]) == {"CPU": 2, "GPU": 4}


def test_ranks_fill_nodes_one_after_the_other_however_ray_scattered_equal_bundles() -> None:
    nodes = ["a", "b"] * 8
    random.Random(0).shuffle(nodes)
    seats = [nodes[place] for place in assign_bundles(["gpu"] * 16, nodes)]
    assert seats == ["a"] * 8 + ["b"] * 8


def test_ranks_fill_the_node_first_that_has_most_of_them() -> None:
    nodes = ["a", "b", "c", "b", "c", "b"]
    assert [nodes[place] for place in assign_bundles(["gpu"] * 6, nodes)] == ["b", "b", "b", "c", "c", "a"]


class _AskedError(Exception):
    """What Ray was asked for is known."""


def test_bundles_are_reserved_in_the_way_that_the_cluster_is_to_be_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def reserve(bundles: object, strategy: str = "PACK") -> None:
        asked.append((bundles, strategy))
        raise _AskedError

    monkeypatch.setattr(placement, "placement_group", reserve)
    bundles = [(ProcessSpec(role="learner", cpus=2, gpus=0.5), ProcessSpec(role="rollout", cpus=1, gpus=0.5))]
    with pytest.raises(_AskedError):
        placement.Placement(bundles, replace(SPLIT.cluster, placement="STRICT_SPREAD"), print)
    assert asked == [([{"CPU": 3, "GPU": 1.0}], "STRICT_SPREAD")]


def test_each_process_starts_in_its_own_bundle_with_what_was_reserved_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_start", lambda actor, arguments, **options: options)
    monkeypatch.setattr(placement, "PlacementGroupSchedulingStrategy", lambda **where: where)
    placed: Any = object.__new__(placement.Placement)
    placed.group, placed.places = "reserved", [2, 0, 1]
    both = (ProcessSpec(role="learner", cpus=2, gpus=0.5), ProcessSpec(role="rollout", cpus=1, gpus=0.25))
    placed.bundles = [both, (ProcessSpec(role="rollout", cpus=4, gpus=1),), both]
    for role, number, cpus, gpus, place in (
        *(("learner", 0, 2, 0.5, 2), ("learner", 1, 2, 0.5, 1)),
        *(("rollout", 0, 1, 0.25, 2), ("rollout", 1, 4, 1, 0), ("rollout", 2, 1, 0.25, 1)),
    ):
        seat = {"placement_group": "reserved", "placement_group_bundle_index": place}
        expected = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": seat}
        assert placed.start(TraceRecorder, role, number) == expected


def test_a_cluster_without_gpus_has_no_room_for_a_process_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"CPU": 4.0})
    assert placement.fits([(ProcessSpec(role="rollout", cpus=4, gpus=0),)])
    assert not placement.fits([(ProcessSpec(role="rollout", cpus=5, gpus=0),)])
    assert not placement.fits([(ProcessSpec(role="rollout", cpus=1, gpus=1),)])


def test_nothing_is_reserved_for_processes_without_a_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_start", lambda actor, arguments, **options: (actor, arguments, options))
    started = placement.Placement.start_unseated(TraceRecorder, 1, "two")
    assert started == (TraceRecorder, (1, "two"), {"num_cpus": 0})


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("abc")), min_size=1, max_size=20))
def test_each_gets_a_bundle_of_its_own_size_and_none_is_dealt_twice(reserved: list[tuple[str, str]]) -> None:
    sizes = [size for size, _ in reserved]
    places = assign_bundles(sizes, [node for _, node in reserved])
    assert sorted(places) == list(range(len(reserved)))
    assert [sizes[place] for place in places] == sizes


def test_the_picture_has_every_process_once_on_its_node() -> None:
    large = replace(SPLIT.rollout, num_actors=1, tensor_parallel=2, gpus_per_actor=2)
    few = replace(SPLIT.learner, world_size=2)
    drawn = describe(all_bundles(few, large), ["10.0.0.1", "10.0.0.1", "10.0.0.2"], driver="10.0.0.3")
    assert drawn.splitlines()[1:] == ["  10.0.0.3  [driver]", "  10.0.0.1  [L0] [L1]", "  10.0.0.2  [R0 2 GPUs]"]
    both = describe(all_bundles(SHARED.learner, SHARED.rollout), ["here"] * 8, driver="here")
    assert both.splitlines()[1].startswith("  here  [driver] [L0 R0] [L1 R1]")


def test_a_shortage_names_what_is_wanted_what_is_there_and_what_is_free() -> None:
    told = shortage({"CPU": 32, "GPU": 16}, {"CPU": 60, "GPU": 3}, {"CPU": 64, "GPU": 8})
    assert told == "it needs 32 CPUs (has 64, free 60) and 16 GPUs (has 8, free 3)"

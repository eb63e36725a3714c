"""Who sits beside whom: what is asked of Ray in one piece, how equal pieces are assign_bundles, and a describe of it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from othink_ray.config.rules import paired
from othink_ray.config.schema import ClusterConfig, LearnerConfig, RolloutConfig
from othink_ray.runtime.cluster import ClusterError
from othink_ray.runtime.futures import TraceRecorder


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """What one process gets."""

    role: str
    cpus: float
    gpus: float


Bundle = tuple[ProcessSpec, ...]
"""Seats on one node; those that take a part of a GPU each take it of the same one."""


def learner_bundles(learner: LearnerConfig) -> list[Bundle]:
    return [(ProcessSpec(role="learner", cpus=learner.cpus_per_rank, gpus=learner.gpus_per_rank),)] * learner.world_size


def rollout_bundles(rollout: RolloutConfig) -> list[Bundle]:
    return [
        (ProcessSpec(role="rollout", cpus=rollout.cpus_per_actor, gpus=rollout.gpus_per_actor),)
    ] * rollout.num_actors


def all_bundles(learner: LearnerConfig, rollout: RolloutConfig) -> list[Bundle]:
    ranks, engines = learner_bundles(learner), rollout_bundles(rollout)
    if paired(learner, rollout):
        return [rank + engine for rank, engine in zip_longest(ranks, engines, fillvalue=())]
    return ranks + engines


def wanted(bundles: Sequence[Bundle]) -> dict[str, float]:
    """Ray's resources of all of them together."""
    seats = [seat for bundle in bundles for seat in bundle]
    gpus = sum(seat.gpus for seat in seats)
    return {"CPU": sum(seat.cpus for seat in seats)} | ({"GPU": gpus} if gpus else {})


def assign_bundles(bundles: Sequence[Hashable], nodes: Sequence[str]) -> list[int]:
    """For each bundle the place of one of its size, of which `nodes` says where Ray put it: neighbours share nodes.

    Ray keeps no order among equal ones, but ranks that talk to each other most should talk inside a node.
    """
    crowd = Counter(nodes)
    free: dict[Hashable, list[int]] = defaultdict(list)
    for place in sorted(range(len(nodes)), key=lambda place: (-crowd[nodes[place]], nodes[place], place)):
        free[bundles[place]].append(place)
    return [free[bundle].pop(0) for bundle in bundles]


_LETTERS = {"learner": "L", "rollout": "R"}


def describe(bundles: Sequence[Bundle], nodes: Sequence[str], driver: str) -> str:
    """Each node with its bundles: [L0] is learner rank 0, [R1 4 GPUs] an engine on four, [L0 R0] both on one GPU."""
    numbers: Counter[str] = Counter()
    rows: dict[str, list[str]] = {driver: []}
    for bundle, node in zip(bundles, nodes, strict=True):
        names = []
        for seat in bundle:
            names.append(f"{_LETTERS[seat.role]}{numbers[seat.role]}")
            numbers[seat.role] += 1
        gpus = sum(seat.gpus for seat in bundle)
        rows.setdefault(node, []).append(f"[{' '.join(names)}{f' {gpus:g} GPUs' if gpus > 1 else ''}]")
    width = max(map(len, rows))
    lines = [f"  {node:<{width}}  {' '.join(['[driver]'] * (node == driver) + row)}" for node, row in rows.items()]
    return "\n".join(["who sits where (L: learner rank, R: rollout engine)", *lines])


def shortage(needed: Mapping[str, float], free: Mapping[str, float], there: Mapping[str, float]) -> str:
    """What a run asks for, and what the cluster has of it."""
    parts = [
        f"{amount:g} {name}s (has {there.get(name, 0):g}, free {free.get(name, 0):g})"
        for name, amount in needed.items()
    ]
    return f"it needs {' and '.join(parts)}"


# Set before a process starts, since malloc and OpenMP read them only then. Freed memory is kept for the next step: also
# that of threads, to which malloc otherwise gives heaps of their own that it returns, 19,000 page faults a step. Blocks
# of 768 MiB and more are returned: small ones that come to lie in the hole of one leave no room for the next, and the
# float32 copies of a bfloat16 output matrix (0.9 GiB in Qwen2-VL-2B) would be kept two or three times. The flat
# gradients of 135 million weights (514 MiB) are kept: on a virtual machine their pages cost more than a second a step,
# and would be 134,000 if new memory did not come in pages of 2 MiB.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(3 * 2**28),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # from glibc 2.35 on
}
# A thread without work looks out for it for some 30 microseconds, and then sleeps and leaves its core to others.
# Ray makes its workers nicer than all else on the machine: where engines compute on CPUs that costs a tenth of a step.
PROCESS_ENVIRONMENT = {
    **MALLOC,
    "GOMP_SPINCOUNT": "10000",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_worker_niceness": "0",
}

_TOLD_EVERY_S = 60.0
_PATIENCE_S = 3.0  # with a cluster that has room, before anything is said


def fits(bundles: Sequence[Bundle]) -> bool:
    """Whether the cluster, as it is now, has as much in all."""
    there = ray.cluster_resources()
    return all(amount <= there.get(name, 0) for name, amount in wanted(bundles).items())


class Placement:
    """A reserved set of seats; `start` puts an actor on one."""

    def __init__(
        self, bundles: Sequence[Bundle], cluster: ClusterConfig, tell: Callable[[str], None], *, forever: bool = False
    ) -> None:
        """Waits for a cluster that is too small `cluster.wait_s`, or as long as it takes."""
        self.bundles = list(bundles)
        reserved = [wanted([bundle]) for bundle in bundles]
        self.group: PlacementGroup = placement_group(reserved, strategy=cluster.placement)
        try:
            self._wait(float("inf") if forever else cluster.wait_s, tell)
            found = placement_group_table(self.group)["bundles_to_node_id"]
            nodes = [found[place] for place in range(len(bundles))]
            self.places = assign_bundles(bundles, nodes)
            self.nodes = [nodes[place] for place in self.places]
        except BaseException:
            remove_placement_group(self.group)
            raise

    def _wait(self, limit_s: float, tell: Callable[[str], None]) -> None:
        until, patience = time.monotonic() + limit_s, _PATIENCE_S
        while not self.group.wait(timeout_seconds=min(patience, left := max(0.0, until - time.monotonic()))):
            missing = shortage(wanted(self.bundles), ray.available_resources(), ray.cluster_resources())
            if left <= patience:
                raise ClusterError(
                    f"the cluster could not seat the run within {limit_s:.0f} s (cluster.wait_s): {missing}. Lower "
                    "rollout.num_actors or learner.world_size, choose a smaller cluster= file, or add nodes."
                )
            tell(f"waiting for the cluster: {missing}")
            patience = _TOLD_EVERY_S

    def describe(self) -> str:
        """Who sits where."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        here = addresses[ray.get_runtime_context().get_node_id()]
        return describe(self.bundles, [addresses[node] for node in self.nodes], here)

    def has_lost_a_node(self) -> bool:
        """Ray moves the seats of a node that is gone, when there is room elsewhere."""
        return bool(placement_group_table(self.group)["state"] != "CREATED")

    def start(self, actor: type[TraceRecorder], role: str, index: int, *arguments: Any) -> Any:
        """The index-th process of a role, on its seat."""
        seats = [(place, seat) for place, own in zip(self.places, self.bundles, strict=True) for seat in own]
        place, seat = [(place, seat) for place, seat in seats if seat.role == role][index]
        strategy = PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=place)
        return _start(actor, arguments, num_cpus=seat.cpus, num_gpus=seat.gpus, scheduling_strategy=strategy)

    @staticmethod
    def start_unseated(actor: type[TraceRecorder], *arguments: Any) -> Any:
        """A process whose work takes milliseconds: nothing is reserved for it."""
        return _start(actor, arguments, num_cpus=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the seats back; the processes on them end."""
        remove_placement_group(self.group)


def _start(actor: type[TraceRecorder], arguments: tuple[Any, ...], **options: Any) -> Any:
    remote: Any = ray.remote(concurrency_groups=dict(actor.concurrency_groups))(actor)
    return remote.options(runtime_env={"env_vars": PROCESS_ENVIRONMENT}, **options).remote(*arguments)

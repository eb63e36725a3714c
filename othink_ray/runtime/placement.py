"""Placement of a run's processes: bundles of one placement group, their assignment to roles, and the environment."""

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

# The allocator and OpenMP read these once, when a process starts. Freed memory is kept for the next step, also that of
# threads, to which malloc would give arenas of their own and return them: 19,000 page faults a step. Blocks of 768 MiB
# and more are returned: small allocations in the hole of a freed block would leave no room for the next one, and the
# float32 copies of a bfloat16 output matrix (0.9 GiB in Qwen2-VL-2B) would be kept two or three times. The flat
# gradients of 135 million weights (514 MiB) are kept: on a virtual machine their pages cost more than a second a step,
# and would be 134,000 if new memory did not come in pages of 2 MiB.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(3 * 2**28),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # from glibc 2.35 on
}
# GOMP_SPINCOUNT: an idle thread spins for about 30 microseconds, then sleeps and frees its core. RAY_worker_niceness:
# Ray lowers the priority of its workers below all else on the machine; engines on CPUs lose a tenth of a step by it.
PROCESS_ENVIRONMENT = {
    **MALLOC,
    "GOMP_SPINCOUNT": "10000",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_worker_niceness": "0",
}

_LETTERS = {"learner": "L", "rollout": "R"}
_LOG_EVERY_S = 60.0
_PATIENCE_S = 3.0  # with a cluster that has room, before anything is logged


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """Role and resources of one process."""

    role: str
    cpus: float
    gpus: float


Bundle = tuple[ProcessSpec, ...]
"""Processes that Ray puts on one node; processes with a fraction of a GPU each share one GPU."""


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


def total_resources(bundles: Sequence[Bundle]) -> dict[str, float]:
    """Return the sum of the bundles' resources, by Ray's names."""
    processes = [process for bundle in bundles for process in bundle]
    gpus = sum(process.gpus for process in processes)
    return {"CPU": sum(process.cpus for process in processes)} | ({"GPU": gpus} if gpus else {})


def assign_bundles(bundles: Sequence[Hashable], nodes: Sequence[str]) -> list[int]:
    """Return for each bundle the index of a reserved bundle of equal size, so that neighbors share nodes.

    `nodes[i]` is the node where Ray put the i-th bundle. Ray keeps no order among equal bundles, but the ranks that
    communicate most should share a node.
    """
    bundles_on = Counter(nodes)
    free: dict[Hashable, list[int]] = defaultdict(list)
    for index in sorted(range(len(nodes)), key=lambda index: (-bundles_on[nodes[index]], nodes[index], index)):
        free[bundles[index]].append(index)
    return [free[bundle].pop(0) for bundle in bundles]


def describe(bundles: Sequence[Bundle], nodes: Sequence[str], driver: str) -> str:
    """Return a picture of the bundles by node.

    [L0] is learner rank 0, [R1 4 GPUs] an engine on four GPUs, [L0 R0] both on one GPU.
    """
    counts: Counter[str] = Counter()
    by_node: dict[str, list[str]] = {driver: []}
    for bundle, node in zip(bundles, nodes, strict=True):
        names = []
        for process in bundle:
            names.append(f"{_LETTERS[process.role]}{counts[process.role]}")
            counts[process.role] += 1
        gpus = sum(process.gpus for process in bundle)
        by_node.setdefault(node, []).append(f"[{' '.join(names)}{f' {gpus:g} GPUs' if gpus > 1 else ''}]")
    width = max(map(len, by_node))
    lines = [f"  {node:<{width}}  {' '.join(['[driver]'] * (node == driver) + row)}" for node, row in by_node.items()]
    return "\n".join(["placement (L: learner rank, R: rollout engine)", *lines])


def shortage(needed: Mapping[str, float], free: Mapping[str, float], there: Mapping[str, float]) -> str:
    """Return what a run needs and what the cluster has of it, in words."""
    parts = [
        f"{amount:g} {name}s (cluster has {there.get(name, 0):g}, {free.get(name, 0):g} free)"
        for name, amount in needed.items()
    ]
    return f"needs {' and '.join(parts)}"


def fits(bundles: Sequence[Bundle]) -> bool:
    """Return whether the cluster, as it is now, has the total resources of all bundles, in use or free."""
    there = ray.cluster_resources()
    return all(amount <= there.get(name, 0) for name, amount in total_resources(bundles).items())


class Placement:
    """A reserved placement group; `start` puts an actor into its bundle."""

    def __init__(
        self, bundles: Sequence[Bundle], cluster: ClusterConfig, log: Callable[[str], None], *, forever: bool = False
    ) -> None:
        """Reserve the bundles; wait `cluster.wait_s` for a cluster that is too small, or without limit (`forever`)."""
        self.bundles = list(bundles)
        reserved = [total_resources([bundle]) for bundle in bundles]
        self.group: PlacementGroup = placement_group(reserved, strategy=cluster.placement)
        try:
            self._wait(float("inf") if forever else cluster.wait_s, log)
            node_of = placement_group_table(self.group)["bundles_to_node_id"]
            nodes = [node_of[index] for index in range(len(bundles))]
            self.bundle_indices = assign_bundles(bundles, nodes)
            self.nodes = [nodes[index] for index in self.bundle_indices]
        except BaseException:
            remove_placement_group(self.group)
            raise

    def _wait(self, limit_s: float, log: Callable[[str], None]) -> None:
        until, patience = time.monotonic() + limit_s, _PATIENCE_S
        while not self.group.wait(timeout_seconds=min(patience, left := max(0.0, until - time.monotonic()))):
            missing = shortage(total_resources(self.bundles), ray.available_resources(), ray.cluster_resources())
            if left <= patience:
                raise ClusterError(
                    f"placement group not ready after {limit_s:.0f} s (cluster.wait_s): {missing}. Lower "
                    "rollout.num_actors or learner.world_size, choose a smaller cluster= file, or add nodes."
                )
            log(f"waiting for the cluster: {missing}")
            patience = _LOG_EVERY_S

    def describe(self) -> str:
        """Return a picture of the processes by node address, see `describe`."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        here = addresses[ray.get_runtime_context().get_node_id()]
        return describe(self.bundles, [addresses[node] for node in self.nodes], here)

    def has_lost_a_node(self) -> bool:
        """Return whether bundles were lost with a node; Ray reschedules them when there is room elsewhere."""
        return bool(placement_group_table(self.group)["state"] != "CREATED")

    def start(self, actor: type[TraceRecorder], role: str, index: int, *arguments: Any) -> Any:
        """Start the index-th process of a role in its bundle; return the actor handle."""
        number, process = [
            (number, process)
            for number, bundle in zip(self.bundle_indices, self.bundles, strict=True)
            for process in bundle
            if process.role == role
        ][index]
        strategy = PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=number)
        return _start(actor, arguments, num_cpus=process.cpus, num_gpus=process.gpus, scheduling_strategy=strategy)

    @staticmethod
    def start_unreserved(actor: type[TraceRecorder], *arguments: Any) -> Any:
        """Start a process whose work takes milliseconds, without reserving resources; return the actor handle."""
        return _start(actor, arguments, num_cpus=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the placement group; Ray kills the actors in it."""
        remove_placement_group(self.group)


def _start(actor: type[TraceRecorder], arguments: tuple[Any, ...], **options: Any) -> Any:
    remote: Any = ray.remote(concurrency_groups=dict(actor.concurrency_groups))(actor)
    return remote.options(runtime_env={"env_vars": PROCESS_ENVIRONMENT}, **options).remote(*arguments)

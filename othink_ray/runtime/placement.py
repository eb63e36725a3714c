"""The placement group of a run and the actors started in it, with their process environment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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

from othink_ray.config.schema import ClusterConfig
from othink_ray.runtime.bundles import Bundle, assign_bundles, describe, shortage, total_resources
from othink_ray.runtime.cluster import ClusterError
from othink_ray.runtime.futures import TracedActor

# The allocator and OpenMP read these once, when a process starts. Freed memory is kept for the next step, also that of
# threads; malloc would give threads their own arenas and return these: 19,000 page faults per step. Blocks of 768 MiB
# and more are returned: small allocations in the hole of a freed block would leave no room for the next one, and the
# float32 copies of a bfloat16 output matrix (0.9 GiB in Qwen2-VL-2B) would be kept two or three times. The flat
# gradients of 135 million weights (514 MiB) are kept: on a virtual machine their pages cost more than a second per
# step, and would be 134,000 if new memory did not come in pages of 2 MiB.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(3 * 2**28),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # from glibc 2.35 on
}
# GOMP_SPINCOUNT: an idle thread spins for about 30 microseconds, then sleeps and frees its core. RAY_worker_niceness:
# Ray lowers the priority of its workers below all else on the machine, which costs engines on CPUs a tenth of a step.
PROCESS_ENVIRONMENT = {
    **MALLOC,
    "GOMP_SPINCOUNT": "10000",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_worker_niceness": "0",
}

_LOG_EVERY_S = 60.0
_PATIENCE_S = 3.0  # with a cluster that has room, before anything is logged


def fits(bundles: Sequence[Bundle]) -> bool:
    """Return whether the cluster, as it is now, has the total resources of all bundles, in use or free."""
    total = ray.cluster_resources()
    return all(amount <= total.get(name, 0) for name, amount in total_resources(bundles).items())


class Placement:
    """A reserved placement group; `start` puts an actor into its bundle."""

    def __init__(
        self,
        bundles: Sequence[Bundle],
        cluster: ClusterConfig,
        log: Callable[[str], None],
        *,
        wait_without_limit: bool = False,
    ) -> None:
        """Reserve the bundles; if the cluster is too small, wait up to `cluster.wait_s` seconds or without limit."""
        self.bundles = list(bundles)
        reserved = [total_resources([bundle]) for bundle in bundles]
        self.group: PlacementGroup = placement_group(reserved, strategy=cluster.placement)
        try:
            self._wait(float("inf") if wait_without_limit else cluster.wait_s, log)
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
                    f"placement group not ready after {limit_s:.0f} s (cluster.wait_s): {missing}. If other jobs "
                    "use the rest, stop them or raise cluster.wait_s; else lower rollout.num_actors or "
                    "learner.world_size, select a cluster= option of fewer nodes, or add nodes."
                )
            log(f"waiting for the cluster: {missing}")
            patience = _LOG_EVERY_S

    def describe(self) -> str:
        """Return a picture of the processes by node address, headed "placement"."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        here = addresses[ray.get_runtime_context().get_node_id()]
        return "placement " + describe(self.bundles, [addresses[node] for node in self.nodes], here)

    def has_lost_a_node(self) -> bool:
        """Return whether bundles were lost with a node; Ray reschedules them when there is room elsewhere."""
        return bool(placement_group_table(self.group)["state"] != "CREATED")

    def start(self, actor: type[TracedActor], role: str, index: int, *arguments: Any) -> Any:
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
    def start_unreserved(actor: type[TracedActor], *arguments: Any) -> Any:
        """Start a process whose work takes milliseconds, without reserving resources; return the actor handle."""
        return _start(actor, arguments, num_cpus=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the placement group; Ray kills the actors in it."""
        remove_placement_group(self.group)


def _start(actor: type[TracedActor], arguments: tuple[Any, ...], **options: Any) -> Any:
    remote: Any = ray.remote(concurrency_groups=dict(actor.concurrency_groups))(actor)
    return remote.options(runtime_env={"env_vars": PROCESS_ENVIRONMENT}, **options).remote(*arguments)

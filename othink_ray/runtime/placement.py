"""Who sits where: one bundle a process, asked for in one piece, so that a run never waits half-started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from othink_ray.config.schema import LearnerConfig, RolloutConfig
from othink_ray.runtime.cluster import ClusterError

# Set before a process starts, since malloc and OpenMP read them only then. Freed memory is kept for the next step.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}
# A thread without work looks out for it for some 30 microseconds, and then sleeps and leaves its core to others.
PROCESS_ENVIRONMENT = {**MALLOC, "GOMP_SPINCOUNT": "10000", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What one process gets."""

    role: str
    cpus: float
    gpus: float


def learner_seats(learner: LearnerConfig) -> list[Seat]:
    return [Seat(role="learner", cpus=learner.cpus_per_rank, gpus=learner.gpus_per_rank)] * learner.world_size


def rollout_seats(rollout: RolloutConfig) -> list[Seat]:
    return [Seat(role="rollout", cpus=rollout.cpus_per_actor, gpus=rollout.gpus_per_actor)] * rollout.num_actors


def fits(seats: Sequence[Seat]) -> bool:
    """Whether the cluster, as it is now, has as much in all."""
    (cpus, gpus), there = _wanted(seats), ray.cluster_resources()
    return bool(cpus <= there.get("CPU", 0) and gpus <= there.get("GPU", 0))


def _wanted(seats: Sequence[Seat]) -> tuple[float, float]:
    return sum(seat.cpus for seat in seats), sum(seat.gpus for seat in seats)


class Placement:
    """A reserved set of seats; `start` puts an actor on one."""

    def __init__(
        self, wanted: list[Seat], strategy: str, timeout_s: float, wait: Callable[[str], None] | None = None
    ) -> None:
        """`wait`: as long as it takes, and tell."""
        self.seats = wanted
        bundles = [{"CPU": seat.cpus} | ({"GPU": seat.gpus} if seat.gpus else {}) for seat in wanted]
        self.group: PlacementGroup = placement_group(bundles, strategy=strategy)
        try:
            while not self.group.wait(timeout_seconds=timeout_s):
                if wait is None:
                    raise ClusterError(
                        f"the cluster could not seat the run within {timeout_s:.0f} s: {self._missing()}. Lower "
                        "rollout.num_actors or learner.world_size, choose a smaller cluster= file, or add nodes."
                    )
                wait(f"waiting for the cluster: {self._missing()}")
        except BaseException:
            remove_placement_group(self.group)
            raise

    def _missing(self) -> str:
        (cpus, gpus), there = _wanted(self.seats), ray.cluster_resources()
        return (
            f"it needs {cpus:g} CPUs and {gpus:g} GPUs, "
            f"the cluster has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}"
        )

    def has_lost_a_node(self) -> bool:
        """Ray moves the seats of a node that is gone, when there is room elsewhere."""
        return bool(placement_group_table(self.group)["state"] != "CREATED")

    def start(self, actor: type, role: str, index: int, *arguments: Any) -> Any:
        """The index-th process of a role, on its seat."""
        place = [number for number, seat in enumerate(self.seats) if seat.role == role][index]
        seat = self.seats[place]
        strategy = PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=place)
        return _start(actor, arguments, num_cpus=seat.cpus, num_gpus=seat.gpus, scheduling_strategy=strategy)

    @staticmethod
    def start_unseated(actor: type, *arguments: Any) -> Any:
        """A process whose work takes milliseconds: nothing is reserved for it."""
        return _start(actor, arguments, num_cpus=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the seats back; the processes on them end."""
        remove_placement_group(self.group)


def _start(actor: type, arguments: tuple[Any, ...], **options: Any) -> Any:
    return ray.remote(actor).options(runtime_env={"env_vars": PROCESS_ENVIRONMENT}, **options).remote(*arguments)

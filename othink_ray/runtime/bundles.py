"""Bundles of a run's placement group: which processes share a GPU, their assignment to nodes, and a picture of it.

Does not import Ray: `mode=check` uses it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from othink_ray.config.rules import colocated
from othink_ray.config.schema import LearnerConfig, RolloutConfig

_LETTERS = {"learner": "L", "rollout": "R"}


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
    if colocated(learner, rollout):
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
    return "\n".join(["(L: learner rank, R: rollout engine)", *lines])


def shortage(needed: Mapping[str, float], free: Mapping[str, float], total: Mapping[str, float]) -> str:
    """Return a text such as "needs 8 GPUs (cluster has 4, 0 free)"."""
    parts = [
        f"{amount:g} {name}s (cluster has {total.get(name, 0):g}, {free.get(name, 0):g} free)"
        for name, amount in needed.items()
    ]
    return f"needs {' and '.join(parts)}"

"""Who sits beside whom: what is asked of Ray in one piece, how equal pieces are dealt, and a picture of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from othink_ray.config.schema import LearnerConfig, RolloutConfig
from othink_ray.config.seat_rules import paired


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What one process gets."""

    role: str
    cpus: float
    gpus: float


Bundle = tuple[Seat, ...]
"""Seats on one node; those that take a part of a GPU each take it of the same one."""


def learner_bundles(learner: LearnerConfig) -> list[Bundle]:
    return [(Seat(role="learner", cpus=learner.cpus_per_rank, gpus=learner.gpus_per_rank),)] * learner.world_size


def rollout_bundles(rollout: RolloutConfig) -> list[Bundle]:
    return [(Seat(role="rollout", cpus=rollout.cpus_per_actor, gpus=rollout.gpus_per_actor),)] * rollout.num_actors


def team_bundles(learner: LearnerConfig, rollout: RolloutConfig) -> list[Bundle]:
    ranks, engines = learner_bundles(learner), rollout_bundles(rollout)
    if paired(learner, rollout):
        return [rank + engine for rank, engine in zip_longest(ranks, engines, fillvalue=())]
    return ranks + engines


def wanted(bundles: Sequence[Bundle]) -> dict[str, float]:
    """Ray's resources of all of them together."""
    seats = [seat for bundle in bundles for seat in bundle]
    gpus = sum(seat.gpus for seat in seats)
    return {"CPU": sum(seat.cpus for seat in seats)} | ({"GPU": gpus} if gpus else {})


def dealt(bundles: Sequence[Hashable], nodes: Sequence[str]) -> list[int]:
    """For each bundle the place of one of its size, of which `nodes` says where Ray put it: neighbours share nodes.

    Ray keeps no order among equal ones, but ranks that talk to each other most should talk inside a node.
    """
    crowd = Counter(nodes)
    free: dict[Hashable, list[int]] = defaultdict(list)
    for place in sorted(range(len(nodes)), key=lambda place: (-crowd[nodes[place]], nodes[place], place)):
        free[bundles[place]].append(place)
    return [free[bundle].pop(0) for bundle in bundles]


_LETTERS = {"learner": "L", "rollout": "R"}


def picture(bundles: Sequence[Bundle], nodes: Sequence[str], driver: str) -> str:
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

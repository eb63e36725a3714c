"""Actors that tell what they did, and how all of them are asked without harm to a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import ray
from ray.exceptions import RayError

from othink_ray.spans import Spans, take

_ASKED_S = 5.0


class Recorded:
    """What every actor of a run can be asked."""

    concurrency_groups: ClassVar[Mapping[str, int]] = {}
    """Threads for methods that run beside the others, by the name of their group."""

    def spans(self, go_on: bool) -> Spans:
        return take(go_on=go_on)


def spans_of(actors: Mapping[str, Any], *, go_on: bool) -> dict[str, Spans]:
    """By the same names; one that died or hangs is left out: who needs it next will find out."""
    calls = {name: actor.spans.remote(go_on) for name, actor in actors.items()}
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=_ASKED_S)
    found = {}
    for name, call in calls.items():
        try:
            found[name] = ray.get(call, timeout=0)
        except RayError:
            continue
    return found

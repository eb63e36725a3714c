"""Step times and what is said of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WARM_UP = 3  # steps that are left out on both sides: the peer still compiles in its second


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}

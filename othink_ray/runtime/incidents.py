"""What went wrong and was mended: told at once, counted for the records, and not for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from othink_ray.runtime.calls import WorkerFailed

KINDS = ("rollout_restarts", "learner_restarts", "reward_restarts", "masked_answers")


class Incidents:
    """Of one run. The first cause is kept: what comes after it may be its consequence."""

    def __init__(self, max_restarts: int, tell: Callable[[str], None]) -> None:
        self.max_restarts, self.tell = max_restarts, tell
        self.first_cause = ""
        self.restarts = 0
        self.counts: Counter[str] = Counter()

    def restart(self, kind: str, error: WorkerFailed | str) -> None:
        """Tell and count one; raise when there were too many."""
        cause = str(error).strip()
        self.first_cause = self.first_cause or cause
        if self.restarts >= self.max_restarts:
            raise WorkerFailed(
                f"{_first_line(cause)}; there were {self.restarts} restarts before, and faults.max_restarts = "
                f"{self.max_restarts}. The first cause was: {self.first_cause}"
            )
        self.restarts += 1
        self.note(kind, f"{_first_line(cause)}: restarting it ({self.restarts} of at most {self.max_restarts})")

    def note(self, kind: str, text: str, count: int = 1) -> None:
        self.counts[kind] += count
        self.tell(text)

    def take(self) -> dict[str, float]:
        """The counts since they were asked for last."""
        counts = {f"faults/{kind}": float(self.counts[kind]) for kind in KINDS}
        self.counts.clear()
        return counts


def _first_line(text: str) -> str:
    return text.partition("\n")[0]

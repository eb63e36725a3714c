"""Steps that go wrong in their numbers: told, written down, and not too many in a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from othink_ray.config.schema import FaultsConfig
from othink_ray.driver.loop import Step
from othink_ray.driver.metrics import jsonable, sample_record
from othink_ray.whole_file import write_whole


class RunawayError(RuntimeError):
    """Training has left the rails; says what was seen, and where it is written."""


class Guards:
    """Of one run."""

    def __init__(self, faults: FaultsConfig, run_dir: Path, tell: Callable[[str], None]) -> None:
        self.faults, self.folder, self.tell = faults, run_dir / "faults", tell
        self.in_a_row = 0

    def look(self, seen: Step) -> None:
        """Raises after `faults.patience` bad steps in a row."""
        wrong = list(self._wrong(seen))
        self.in_a_row = self.in_a_row + 1 if wrong else 0
        if not wrong:
            return
        told = f"step {seen.step + 1}: {'; '.join(wrong)}. Its questions and answers are in {self._dump(seen)}"
        if self.in_a_row >= self.faults.patience:
            raise RunawayError(
                f"{told}. That was bad step {self.in_a_row} in a row, as many as faults.patience allows. Go on from an "
                "earlier checkpoint with a lower learner.lr, a lower learner.max_grad_norm or a higher KL weight"
            )
        self.tell(f"{told} (bad step {self.in_a_row} in a row; at {self.faults.patience} the run stops)")

    def _wrong(self, seen: Step) -> Iterator[str]:
        stats, faults = seen.stats, self.faults
        if stats.skipped:
            of = f" of {', '.join(stats.bad_prompts[:3])}" if stats.bad_prompts else ""
            yield f"{stats.skipped} update(s) skipped, because loss or gradient{of} was not finite"
        if stats.kl_mean > faults.kl_limit:
            yield f"KL is {stats.kl_mean:.3g} nats per token, above faults.kl_limit = {faults.kl_limit:g}"
        if seen.audit.tokens and stats.logp_gap_mean > faults.gap_limit:  # a teacher's answers have no sampler
            yield (
                f"sampler and learner are {stats.logp_gap_mean:.3g} nats apart, above faults.gap_limit = "
                f"{faults.gap_limit:g}"
            )

    def _dump(self, seen: Step) -> Path:
        """Those at fault, where they are known; else all of the step."""
        groups = list(zip(seen.scored, seen.advantages, strict=True))
        at_fault = [pair for pair in groups if pair[0].group.prompt.id in seen.stats.bad_prompts]
        samples = [sample_record(seen.step, *pair) for pair in at_fault or groups]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{seen.step + 1}.json"
        record = {"step": seen.step, "beta": seen.beta, "stats": asdict(seen.stats), "samples": samples}
        write_whole(path, json.dumps(jsonable(record), indent=1) + "\n")
        return path

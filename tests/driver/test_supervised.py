"""SFT with engines for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from othink_ray.driver.sft import EvaluatedSFTWorkers
from othink_ray.types import Audit, Group, Prompt, ScoredGroup


class Recorded:
    """Demonstrations, learner and engines in one; records the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def generate(self, prompts: Sequence[Prompt], version: int) -> Iterator[Group]:
        return iter(())

    def update(self, packs: Sequence[Any], **settings: Any) -> Any:
        self.calls.append("update")

    def push(self, version: int) -> Audit:
        self.calls.append(f"push {version}")
        return Audit(version=version, gap_mean=0.0, gap_max=0.0, tokens=0)

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]:
        self.calls.append("answer")
        return []

    def sleep(self) -> None:
        self.calls.append("sleep")


def test_sft_engines_sleep_between_evaluations() -> None:
    fake = Recorded()
    workers = EvaluatedSFTWorkers(fake, fake, fake)
    for version in range(4):
        workers.push(version)
        if version in (0, 3):
            workers.answer_greedily([])
            workers.answer_greedily([])
        workers.update([], updates=1, beta=0.0, lr=1e-3, stale=False)
    evaluation = ["answer", "answer", "sleep", "update"]
    assert fake.calls == ["push 0", *evaluation, "update", "update", "push 3", *evaluation]

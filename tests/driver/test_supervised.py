"""Supervised training beside engines that are requested now and then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from othink_ray.driver.sft import ExaminedClass
from othink_ray.types import Audit, Group, Prompt, ScoredGroup


class Recorded:
    """Teacher, learner and engines in one, which only write down what they are called for."""

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


def test_engines_sleep_while_the_learner_works_and_get_the_weights_when_they_are_asked() -> None:
    seen = Recorded()
    taught = ExaminedClass(seen, seen, seen)
    for version in range(4):
        taught.push(version)
        if version in (0, 3):
            taught.answer_greedily([])
            taught.answer_greedily([])
        taught.update([], updates=1, beta=0.0, lr=1e-3, stale=False)
    evaluated = ["answer", "answer", "sleep", "update"]
    assert seen.calls == ["push 0", *evaluated, "update", "update", "push 3", *evaluated]

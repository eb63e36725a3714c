"""Right or wrong: by rules, and where these cannot tell by math-verify."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Self

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.grade import compare, true_text
from othink_ray.rewards.notation import plain
from othink_ray.rewards.parse import stated_text
from othink_ray.rewards.symbolic import Outcome, SymbolicProcess

_REMEMBERED = 1024  # answers of a group, and questions asked again, are often alike


class Grader:
    """The accuracy reward with all its layers; `counts` says which one decided how many answers.

    An answer that the symbolic layer cannot decide in its time and memory is wrong, not masked: it was not shown to be
    right, and a policy must not find that a bomb saves it from a zero.
    """

    def __init__(self, reward: RewardConfig) -> None:
        self.without_tag = reward.without_tag
        self.counts: Counter[str] = Counter()
        self.symbolic = SymbolicProcess(answer_cpu_s=reward.answer_cpu_s, memory_mb=reward.memory_mb)
        self._remembered: OrderedDict[tuple[str, str], Outcome] = OrderedDict()

    def accuracy(self, text: str, answer: str) -> float:
        """1.0 or 0.0, for any text."""
        stated = stated_text(text, self.without_tag)
        if stated is None:
            self.counts["untagged"] += 1
            return 0.0
        truth = true_text(answer)
        verdict = compare(stated, truth)
        if verdict is not None:
            self.counts["rules"] += 1
            return float(verdict)
        outcome = self._compare_symbols(plain(stated.strip()), plain(truth.strip()))
        self.counts["symbolic" if outcome in ("right", "wrong") else outcome] += 1
        return float(outcome == "right")

    def _compare_symbols(self, stated: str, truth: str) -> Outcome:
        asked = (stated, truth)
        if asked not in self._remembered:
            self._remembered[asked] = self.symbolic.equal(truth, stated)
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[asked]

    def close(self) -> None:
        self.symbolic.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

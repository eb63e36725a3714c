"""Rewards by name, built-in and custom, and the weighted list of them that a configuration selects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.base import Reward, WeightedReward
from othink_ray.rewards.grader import Grader
from othink_ray.rewards.parse import rate_format

# R_acc and R_format of Eq. 1, built with the grader of the process. The weight of each is `algo.reward.NAME_weight`.
REWARDS: dict[str, Callable[[Grader], Reward]] = {
    "accuracy": lambda grader: grader,
    "format": lambda grader: rate_format,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomReward:
    """Source of a custom reward, read on the driver so that reward actors on other nodes do not need the file."""

    name: str
    file: str
    source: str

    def load(self) -> Reward:
        """Execute the file and return its function (completion text, true answer) -> number as a `Reward`.

        Only the user's file is executed, never text that a model wrote.
        """
        names: dict[str, Any] = {"__name__": "custom_reward", "__file__": self.file}
        exec(compile(self.source, self.file, "exec"), names)
        function: Callable[[str, str], float] = names[self.name]
        return lambda prompt, completion: function(completion.text, prompt.answer)


def read_custom_reward(spec: str | None) -> CustomReward | None:
    """Read the file of a FILE.py:FUNCTION spec; return None without a spec."""
    if spec is None:
        return None
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    return CustomReward(name=name, file=str(path), source=path.read_text(encoding="utf-8"))


def weighted_rewards(config: RewardConfig, grader: Grader, custom: CustomReward | None = None) -> list[WeightedReward]:
    """Return the terms of an answer's reward: accuracy + format_weight * format (Eq. 1), and the custom reward."""
    terms = [
        WeightedReward(name=name, weight=getattr(config, f"{name}_weight"), reward=build(grader))
        for name, build in REWARDS.items()
    ]
    if custom is not None:
        terms.append(WeightedReward(name=custom.name, weight=config.custom_weight, reward=custom.load()))
    return terms

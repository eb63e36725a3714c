"""The KL weight of a whole run: fixed curves, and schedules that follow what training shows; loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from othink_ray.core.kl import schedule

MAX_ERROR = 0.2  # of the KL against its target, so that one odd step cannot swing beta

State = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one step showed; NaN where it showed nothing."""

    kl: float  # to the reference, nats per answer token (k3)
    accuracy: float  # share of right answers among all that were sampled and graded


@dataclass(frozen=True, slots=True, kw_only=True)
class BetaSchedule:
    """beta at every step; what a schedule with a state remembers is passed in, so that it can be checkpointed."""

    name: str  # a key of kl.SCHEDULES or of ADAPTIVE
    total: int
    beta_min: float
    beta_max: float
    explore_frac: float
    target: float
    adapt_rate: float

    def start(self) -> State:
        """The state before the first step; fixed curves have none."""
        return ADAPTIVE[self.name].start(self) if self.name in ADAPTIVE else {}

    def resume(self, saved: State) -> State:
        """A checkpoint's state; that of another schedule means nothing here, and this one starts afresh."""
        start = self.start()
        return dict(saved) if saved.keys() == start.keys() else start

    def beta(self, step: int, state: State) -> float:
        if self.name in ADAPTIVE:
            return ADAPTIVE[self.name].beta(self, state)
        return schedule(self.name, step, self.total, self.beta_min, self.beta_max, self.explore_frac)

    def after(self, state: State, measured: Measured) -> State:
        """The state for the next step."""
        return ADAPTIVE[self.name].after(self, state, measured) if self.name in ADAPTIVE else state


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """A schedule with a state, as three pure functions."""

    start: Callable[[BetaSchedule], State]
    beta: Callable[[BetaSchedule, State], float]
    after: Callable[[BetaSchedule, State, Measured], State]


def target_start(kl: BetaSchedule) -> State:
    """The middle, where Eq. 3 starts too."""
    return {"beta": (kl.beta_min + kl.beta_max) / 2}


def target_beta(kl: BetaSchedule, state: State) -> float:
    return min(max(state["beta"], kl.beta_min), kl.beta_max)


def target_after(kl: BetaSchedule, state: State, measured: Measured) -> State:
    """beta * (1 + adapt_rate * clip(KL / target - 1, -0.2, 0.2)), kept within beta_min .. beta_max.

    The controller of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2; adapt_rate is its K_beta), on the KL of a
    token where theirs is of a whole answer.
    """
    if math.isnan(measured.kl):
        return state
    error = min(max(measured.kl / kl.target - 1, -MAX_ERROR), MAX_ERROR)
    return {"beta": target_beta(kl, {"beta": target_beta(kl, state) * (1 + kl.adapt_rate * error)})}


def accuracy_start(kl: BetaSchedule) -> State:
    """Nothing is known to be right yet: free to explore."""
    return {"accuracy": 0.0}


def accuracy_beta(kl: BetaSchedule, state: State) -> float:
    """beta_min + (beta_max - beta_min) * running accuracy: who errs may explore, who is right is held."""
    return kl.beta_min + (kl.beta_max - kl.beta_min) * state["accuracy"]


def accuracy_after(kl: BetaSchedule, state: State, measured: Measured) -> State:
    """The running accuracy moves towards the step's by the share adapt_rate."""
    if math.isnan(measured.accuracy):
        return state
    return {"accuracy": state["accuracy"] + kl.adapt_rate * (measured.accuracy - state["accuracy"])}


ADAPTIVE: dict[str, Adaptive] = {
    "target": Adaptive(start=target_start, beta=target_beta, after=target_after),
    "accuracy": Adaptive(start=accuracy_start, beta=accuracy_beta, after=accuracy_after),
}

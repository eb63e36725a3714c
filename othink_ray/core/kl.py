"""KL weight beta(s) (Eq. 3): schedules and controllers; KL estimators (Eq. 5). Does not import torch at run time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_LOG_RATIO = 80.0  # e^80 still fits in float32 and bfloat16; an infinity times a zero weight would be NaN
MAX_ERROR = 0.2  # clip of the relative KL error, so that one outlier step cannot move beta far

# (step, total, beta_min, beta_max, explore_frac) -> beta
Schedule = Callable[[float, float, float, float, float], float]

State = Mapping[str, float]  # of an adaptive schedule; plain numbers, so that it fits in a JSON checkpoint


def schedule(name: str, step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """Return the KL weight at `step` of `total` under the named schedule; past `total` it stays at its final value."""
    if name not in SCHEDULES:
        raise ValueError(f"algo.kl.schedule = {name!r} is not a schedule: use one of {', '.join(SCHEDULES)}")
    if not (math.isfinite(total) and total >= 1):
        raise ValueError(f"train.steps = {total} must be a finite number of steps, 1 or more")
    if not (math.isfinite(step) and step >= 0):
        raise ValueError(f"step = {step} must be a finite number, 0 or more")
    if not 0 <= explore_frac <= 1:
        raise ValueError(f"algo.kl.explore_frac = {explore_frac} must be a fraction of all steps (w / t), 0 to 1")
    for key, beta in (("beta_min", beta_min), ("beta_max", beta_max)):
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"algo.kl.{key} = {beta} must be a finite KL weight, 0 or more")
    return SCHEDULES[name](step, total, beta_min, beta_max, explore_frac)


def paper(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """Return Eq. 3: fall from the midpoint to beta_min while exploring (s <= w), then rise to beta_max.

    With w = 0 there is no falling phase and the curve starts at beta_min; with w = t there is no rising phase.
    """
    explore_steps = explore_frac * total
    if step > total:
        return beta_max
    if step <= explore_steps and explore_steps > 0:
        middle = (beta_min + beta_max) / 2
        return middle - (middle - beta_min) * step / explore_steps
    return beta_min + (beta_max - beta_min) * (step - explore_steps) / (total - explore_steps)


def linear(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """Ramp linearly from beta_min to beta_max, as the paper's text (not its formula) describes."""
    return beta_min + (beta_max - beta_min) * min(step / total, 1.0)


def cosine(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """Ramp from beta_min to beta_max along half a cosine wave, flat at both ends."""
    return beta_min + (beta_max - beta_min) * (1 - math.cos(math.pi * min(step / total, 1.0))) / 2


def exponential(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """Ramp geometrically from beta_min to beta_max, by the same factor at every step."""
    for key, beta in (("beta_min", beta_min), ("beta_max", beta_max)):
        if beta <= 0:
            raise ValueError(
                f"algo.kl.{key} = {beta} must be greater than 0 with algo.kl.schedule = 'exponential', "
                "a geometric ramp: raise it, or use 'linear'"
            )
    return math.exp(math.log(beta_min) + (math.log(beta_max) - math.log(beta_min)) * min(step / total, 1.0))


def constant(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """Return beta_min at every step, as plain GRPO does."""
    return beta_min


SCHEDULES: dict[str, Schedule] = {
    "paper": paper,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "constant": constant,
}


def kl_k1(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return log(pi/ref) per token, any shape: unbiased, often negative.

    Its gradient is that of log pi alone, which averages to 0 over samples from the policy: as a loss term it adds noise
    and does not regularize.
    """
    return policy_logprobs - ref_logprobs


def kl_k2(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return log(pi/ref)^2 / 2 per token, any shape: biased, never negative.

    Averaged over samples from the policy, its gradient log(pi/ref) * grad log pi is that of the token's KL(pi || ref):
    the same as subtracting k1 from the reward.
    """
    return (policy_logprobs - ref_logprobs).square() / 2


def kl_k3(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return ref/pi - log(ref/pi) - 1 per token (Eq. 5), any shape: unbiased, never negative beyond rounding.

    Averaged over samples from the policy, its gradient (1 - ref/pi) * grad log pi is that of KL(ref || pi): close to
    k2's near the reference, at most 1 where pi far exceeds ref, and huge where ref far exceeds pi. A log ratio above
    MAX_LOG_RATIO is clamped to it (without gradient), so finite logprobs give a finite KL.
    """
    log_ratio = (ref_logprobs - policy_logprobs).clamp(max=MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Statistics of one step that adaptive schedules use; NaN where the step had no data."""

    kl: float  # to the reference, nats per answer token (k3)
    accuracy: float  # fraction of correct answers among all sampled and graded


@dataclass(frozen=True, slots=True, kw_only=True)
class BetaSchedule:
    """KL weight at every step; the state of an adaptive schedule is passed in, so that it can be checkpointed."""

    name: str  # a key of SCHEDULES or ADAPTIVE
    total: int
    beta_min: float
    beta_max: float
    explore_frac: float
    target: float
    adapt_rate: float

    def start(self) -> State:
        """Return the state before the first step; empty for fixed schedules."""
        return ADAPTIVE[self.name].start(self) if self.name in ADAPTIVE else {}

    def resume(self, saved: State) -> State:
        """Return the state saved in a checkpoint, or the initial state if another schedule saved it."""
        start = self.start()
        return dict(saved) if saved.keys() == start.keys() else start

    def beta(self, step: int, state: State) -> float:
        if self.name in ADAPTIVE:
            return ADAPTIVE[self.name].beta(self, state)
        return schedule(self.name, step, self.total, self.beta_min, self.beta_max, self.explore_frac)

    def after(self, state: State, measured: Measured) -> State:
        """Return the state for the next step."""
        return ADAPTIVE[self.name].after(self, state, measured) if self.name in ADAPTIVE else state


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """A stateful schedule, as three pure functions."""

    start: Callable[[BetaSchedule], State]
    beta: Callable[[BetaSchedule, State], float]
    after: Callable[[BetaSchedule, State, Measured], State]


def target_start(kl: BetaSchedule) -> State:
    """Start at the midpoint, as Eq. 3 does."""
    return {"beta": (kl.beta_min + kl.beta_max) / 2}


def target_beta(kl: BetaSchedule, state: State) -> float:
    return min(max(state["beta"], kl.beta_min), kl.beta_max)


def target_after(kl: BetaSchedule, state: State, measured: Measured) -> State:
    """Return beta * (1 + adapt_rate * clip(KL / target - 1, -0.2, 0.2)), clamped to beta_min .. beta_max.

    This is the controller of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2; adapt_rate is their K_beta), applied
    to the KL per token instead of per answer.
    """
    if math.isnan(measured.kl):
        return state
    error = min(max(measured.kl / kl.target - 1, -MAX_ERROR), MAX_ERROR)
    return {"beta": target_beta(kl, {"beta": target_beta(kl, state) * (1 + kl.adapt_rate * error)})}


def accuracy_start(kl: BetaSchedule) -> State:
    """Start at accuracy 0, which gives beta_min: free to explore."""
    return {"accuracy": 0.0}


def accuracy_beta(kl: BetaSchedule, state: State) -> float:
    """Return beta_min + (beta_max - beta_min) * running accuracy: explore while wrong, stay close once correct."""
    return kl.beta_min + (kl.beta_max - kl.beta_min) * state["accuracy"]


def accuracy_after(kl: BetaSchedule, state: State, measured: Measured) -> State:
    """Update the running accuracy: an exponential moving average with rate adapt_rate."""
    if math.isnan(measured.accuracy):
        return state
    return {"accuracy": state["accuracy"] + kl.adapt_rate * (measured.accuracy - state["accuracy"])}


ADAPTIVE: dict[str, Adaptive] = {
    "target": Adaptive(start=target_start, beta=target_beta, after=target_after),
    "accuracy": Adaptive(start=accuracy_start, beta=accuracy_beta, after=accuracy_after),
}

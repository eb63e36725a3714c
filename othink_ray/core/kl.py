"""The KL weight beta(s) of GRPO-D and its relatives (Eq. 3), and the KL estimators (Eq. 5); loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
from collections.abc import Mapping
from dataclasses import dataclass

MAX_LOG_RATIO = 80.0  # e^80 still fits in float32 and bfloat16; an infinity would turn into NaN under a zero weight

# (step, total, beta_min, beta_max, explore_frac) -> beta
Schedule = Callable[[float, float, float, float, float], float]


def schedule(name: str, step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """The KL weight at `step` of `total` under the named schedule; past `total` it keeps its end value."""
    if name not in SCHEDULES:
        raise ValueError(f"algo.kl.schedule = {name!r} is not a schedule: use one of {', '.join(SCHEDULES)}")
    if not (math.isfinite(total) and total >= 1):
        raise ValueError(f"train.steps = {total}: a schedule needs at least one step; set it to 1 or more")
    if not (math.isfinite(step) and step >= 0):
        raise ValueError(f"step = {step}: steps count from 0; pass a step of 0 or more")
    if not 0 <= explore_frac <= 1:
        raise ValueError(f"algo.kl.explore_frac = {explore_frac} is not a share of all steps (w / t): use 0 to 1")
    for key, beta in (("beta_min", beta_min), ("beta_max", beta_max)):
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"algo.kl.{key} = {beta} must be a finite number of 0 or more: it is a KL weight")
    return SCHEDULES[name](step, total, beta_min, beta_max, explore_frac)


def paper(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """Eq. 3: falls from the middle to beta_min while exploring (s <= w), then rises to beta_max.

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
    """A straight ramp from beta_min to beta_max: what the paper's text, not its formula, describes."""
    return beta_min + (beta_max - beta_min) * min(step / total, 1.0)


def cosine(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """Half a cosine wave from beta_min to beta_max: flat at both ends."""
    return beta_min + (beta_max - beta_min) * (1 - math.cos(math.pi * min(step / total, 1.0))) / 2


def exponential(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """A geometric ramp from beta_min to beta_max: the same factor at every step."""
    for key, beta in (("beta_min", beta_min), ("beta_max", beta_max)):
        if beta <= 0:
            raise ValueError(
                f"algo.kl.{key} = {beta} must be above 0 with algo.kl.schedule = 'exponential': "
                "a geometric ramp cannot touch 0; raise it, or use 'linear'"
            )
    return math.exp(math.log(beta_min) + (math.log(beta_max) - math.log(beta_min)) * min(step / total, 1.0))


def constant(step: float, total: float, beta_min: float, beta_max: float, explore_frac: float) -> float:
    """beta_min at every step: plain GRPO."""
    return beta_min


SCHEDULES: dict[str, Schedule] = {
    "paper": paper,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "constant": constant,
}


def kl_k1(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log(pi/ref) per token, any shape: unbiased, often negative.

    Its gradient is that of log pi alone, which is 0 on average over the policy's own samples: as a loss it adds noise
    and holds nothing back.
    """
    return policy_logprobs - ref_logprobs


def kl_k2(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log(pi/ref)^2 / 2 per token, any shape: biased, never negative.

    Its gradient log(pi/ref) * grad log pi is, over the policy's own samples, that of the token's KL(pi || ref): the
    same as k1 taken off the reward.
    """
    return (policy_logprobs - ref_logprobs).square() / 2


def kl_k3(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Eq. 5 per token, any shape: ref/pi - log(ref/pi) - 1: unbiased, never negative beyond rounding.

    Its gradient (1 - ref/pi) * grad log pi is, over the policy's own samples, that of KL(ref || pi): near the
    reference the same pull as k2's; where pi far exceeds ref at most 1, where ref far exceeds pi huge. A log ratio
    above MAX_LOG_RATIO counts as MAX_LOG_RATIO (and has no gradient), so finite logprobs give a finite KL.
    """
    log_ratio = (ref_logprobs - policy_logprobs).clamp(max=MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


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

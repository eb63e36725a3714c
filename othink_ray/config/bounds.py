"""Bounds of single keys: what a value must be, why, and what to set instead; and the names that keys choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODES = ("train", "sft", "eval", "study", "check")
EXPERIMENTS = ("alpha", "beta", "same_task", "cross_task", "curves")
SCHEDULES = ("paper", "linear", "cosine", "exponential", "constant")
ADAPTIVE_SCHEDULES = ("target", "accuracy")
ADVANTAGES = ("group_std", "group_mean", "leave_one_out", "batch_std")
LOSSES = ("grpo", "gspo")
ATTENTIONS = ("auto", "dense", "grouped", "blocks", "fused", "flex")
LR_SCHEDULES = ("constant", "linear", "cosine")
LOSS_WEIGHTS = ("answer_mean", "token_mean", "constant_length")
TIS_MODES = ("none", "token", "sequence", "icepop", "mis_token", "mis_sequence")
ESTIMATORS = ("k1", "k2", "k3")
HEAD_DIMS = (32, 64, 128)  # head sizes that vLLM's CPU attention supports
FROZEN: dict[str, tuple[str, ...]] = {"none": (), "vision": ("vision",), "projector": ("vision", "projector")}
WITHOUT_TAG = ("strict", "whole_text", "last_number")
OBJECT_STORE_MIN_MB = 80  # Ray rejects less than 75 MiB
GRADER_MIN_MB = 256  # the grading process itself takes 70 MiB

GENERATED = ("scenes", "geometry_scenes", "both_scenes")  # sources that generate their questions
SOURCES = (*GENERATED, "hub", "parquet", "jsonl", "disk", "easy_vqa")
EASY_VQA_SUBSETS = ("open", "shape", "colour", "yes_no")  # open: shapes and colors
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")


@dataclass(frozen=True, slots=True)
class Bound:
    """Rule on the value of a key: what it must be, why, and the remedy, in which `{key}` is filled in."""

    text: str  # completes "must be"
    holds: Callable[[Any], bool]
    remedy: str
    why: str = ""
    choices: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        return f"must be {self.text}" + (f": {self.why}" if self.why else "")


def one_of(*names: str) -> Bound:
    """Require one of these names."""
    return Bound(f"one of {', '.join(names)}", names.__contains__, f"Set {{key}}={names[0]}, for example.", "", names)


def at_least(low: float, why: str = "", *, unit: str = "", use: str = "") -> Bound:
    """Require a number of `low` or more; `use` is the value that the remedy suggests."""
    text = f"at least {low:g}{f' ({unit})' if unit else ''}"
    return Bound(text, lambda value: value >= low, f"Set {{key}}={use or f'{low:g} or more'}.", why)


def positive() -> Bound:
    """Require a number greater than 0."""
    return Bound(
        "greater than 0", lambda value: value > 0, "Use a positive number, or remove {key} to use the default."
    )


def between(low: float, high: float, why: str = "", *, unit: str = "", open_at: str = "", use: str) -> Bound:
    """Require a number between two limits; `open_at` names the limits that are excluded: low, high or both."""
    above = open_at in ("low", "both")
    below = open_at in ("high", "both")
    text = f"between {low:g} and {high:g}"
    if open_at:
        text = f"{'greater than' if above else 'at least'} {low:g} and {'less than' if below else 'at most'} {high:g}"

    def holds(value: float) -> bool:
        return (value > low if above else value >= low) and (value < high if below else value <= high)

    return Bound(text + (f", {unit}" if unit else ""), holds, f"Set {{key}}={use}.", why)


def not_empty() -> Bound:
    """Require a string of at least one character."""
    return Bound("a non-empty string", bool, "Set {key} to a value, or remove it from the command.")


ZERO_STAGE = Bound(
    "a ZeRO stage: 1 (optimizer states), 2 (+ gradients) or 3 (+ parameters)",
    (1, 2, 3).__contains__,
    "Set {key}=2, or 3 if the parameters do not fit on one device.",
)
HEAD_DIM = Bound(
    f"one of {', '.join(map(str, HEAD_DIMS))}",
    HEAD_DIMS.__contains__,
    "Set {key}=32.",
    "vLLM's CPU attention supports no other head sizes",
)

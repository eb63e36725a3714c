"""Retired keys and options: what replaced them, for error messages and for the config.yaml of older runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED_KEYS = {
    "algo.reward.own": "algo.reward.custom",
    "algo.reward.own_weight": "algo.reward.custom_weight",
    "algo.correction": "algo.tis",
    "algo.correction_cap": "algo.tis_cap",
    "algo.correction_low": "algo.tis_floor",
    "learner.narrow_last_layer": "learner.prune_last_layer",
    "train.prepare_ahead": "train.prefetch_update",
    "train.read_ahead": "train.prefetch_prompts",
}
RENAMED_OPTIONS = {("data", "own"): "custom"}  # (group, old option) -> new option
REMOVED_KEYS = {"study.small_seeds": "with study.size=small, a study runs one seed per method and value"}
RETIRED_KEYS = (*RENAMED_KEYS, *REMOVED_KEYS)


def retirement(key: str, value: str) -> tuple[str, str] | None:
    """Return rule and remedy of setting a retired key to a value; None if the key is not retired."""
    if key in RENAMED_KEYS:
        return f"was renamed to {RENAMED_KEYS[key]}", f"Write {RENAMED_KEYS[key]}={value}."
    if key in REMOVED_KEYS:
        return f"was removed: {REMOVED_KEYS[key]}", "Remove it."
    return None


def modernized(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an older run by dotted key, with today's names of keys.

    The name of an option stays: it is part of each prompt's id, from which the seeds of its answers are derived.
    """
    return {RENAMED_KEYS.get(key, key): value for key, value in settings.items() if key not in REMOVED_KEYS}

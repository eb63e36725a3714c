"""The answer tokens of rows, flat or of any shape: which count, and sums over the answers that they belong to."""

from __future__ import annotations

import torch


def blank_inactive(values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """0 where a token is inactive: chosen before any exp, since 0 * inf is NaN and so is its gradient."""
    return torch.where(active, values, torch.zeros_like(values))


def sums_by_answer(values: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """The sum over each answer's tokens, by its number in `answers`; 0 where there is no such answer.

    As many places as tokens are enough for any number of answers, and need no look at the data.
    """
    flat = values.flatten()
    return torch.zeros_like(flat).index_add(0, answers.flatten(), flat)

"""Update statistics from known sums, with a second rank that has the same sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from othink_ray.core.losses import LossTerms, RatioTerms
from othink_ray.engines import update_stats
from othink_ray.engines.update_stats import UpdateTotals
from othink_ray.types import Pack, UpdateStats

RATIOS = ("used", "truncated", "cut", "masked", "sequence_raw", "sequence_truncated", "sequence_cut", "answers")
HOW: dict[str, Any] = {"updates": 2, "grad_norm": 0.5, "lr": 0.25, "vision_encodes": 7, "skipped": 1}


@pytest.fixture(autouse=True)
def two_equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(tensor: Tensor, op: str = "sum") -> None:
        if op == "sum":
            tensor *= 2

    fake_dist: Any = SimpleNamespace(
        all_reduce=all_reduce,
        ReduceOp=SimpleNamespace(MAX="max"),
    )
    monkeypatch.setattr(update_stats, "dist", fake_dist)


def added(values: Sequence[float], *, referenced: bool = True) -> UpdateTotals:
    """Add micro-batches of three tokens, the last of weight 0; policy minus sampler logprobs are log 2 and 0."""
    sums = UpdateTotals(torch.device("cpu"))
    for value in values:
        batch: Any = SimpleNamespace(
            loss_weights=torch.tensor([0.5, 0.5, 0.0]), sampler_logprobs=torch.tensor([-1.0, -2.0, -9.0])
        )
        loss = torch.tensor(value, requires_grad=True)
        sums.note([named("a"), named("b")], loss)
        sums.add(
            batch,
            loss,
            LossTerms(kl_sum=torch.tensor(0.3), clipped=torch.tensor(1)),
            RatioTerms(**{name: torch.tensor(index + 1.0).double() for index, name in enumerate(RATIOS)}),
            logprobs=torch.tensor([-1.0 + math.log(2), -2.0, 5.0], requires_grad=True),
            entropy=torch.tensor([1.0, 3.0, 100.0]),
            referenced=referenced,
        )
        kept = [sums.sums, sums.maxima, *(value for _, value in sums.losses)]
        assert not any(tensor.requires_grad for tensor in kept)  # no graph outlives its micro-batch
    return sums


def named(prompt: str) -> Pack:
    pack: Any = SimpleNamespace(prompt_id=prompt)
    return pack


def test_sums_over_ranks_and_micro_batches_become_means() -> None:
    found = added([0.75, 1.25]).stats(**HOW)
    expected = UpdateStats(
        loss=(0.75 + 1.25) * 2 / 2,
        kl_mean=0.3 / 2,
        ratio_raw_mean=(2 + 1) / 2,
        ratio_raw_max=2.0,
        ratio_clip_frac=1 / 2,
        ratio_used_mean=1 / 2,
        ratio_truncated_mean=2 / 2,
        ratio_truncated_frac=3 / 2,
        ratio_masked_frac=4 / 2,
        ratio_sequence_raw_mean=5 / 8,
        ratio_sequence_truncated_mean=6 / 8,
        ratio_sequence_truncated_frac=7 / 8,
        entropy=(1 + 3) / 2,
        logp_gap_mean=math.log(2) / 2,
        logp_gap_max=math.log(2),
        grad_norm=0.5,
        lr=0.25,
        tokens=8,
        vision_encodes=14,
        reference_passes=4,
        skipped=1,
    )
    for name in UpdateStats.__dataclass_fields__:
        assert type(getattr(found, name)) is type(getattr(expected, name)), name
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name


def test_without_a_reference_the_kl_is_nan() -> None:
    assert math.isnan(added([0.5], referenced=False).stats(**HOW).kl_mean)


def test_prompts_of_a_non_finite_loss_are_named() -> None:
    found = added([0.5, math.nan]).stats(**HOW)
    assert math.isnan(found.loss)
    assert found.bad_prompts == ("a", "b")

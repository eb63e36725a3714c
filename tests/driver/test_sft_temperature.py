"""SFT learns the answer frequencies of the data at temperature 1, whatever rollout.temperature is."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from othink_ray.config.load import load
from othink_ray.core.packing import pack
from othink_ray.engines.base import RendezvousInfo, rendezvous_store
from othink_ray.types import UpdateSettings
from tests.conftest import OVERRIDES
from tests.engines.samples import ask, batch_of, distributions, group_of, picture, scored

STEPS = 80
SHARES = (6, 2, 2)  # frequencies among ten answers of one token


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    losses: list[float]
    grad_norms: list[float]
    shares: list[float]  # probabilities of the answers at temperature 1


def learn(folder: Path, port: int, overrides_of_runs: Sequence[Sequence[str]]) -> list[Learned]:
    """Train a learner of each configuration on the same ten demonstrations of one prompt."""
    from othink_ray.driver.build import learner_engine
    from othink_ray.engines.policy import Policy
    from othink_ray.families import open_family

    rendezvous = RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=port)
    found = []
    for overrides in overrides_of_runs:
        config = load([*OVERRIDES, "learner.weight_decay=0", *overrides])
        family = open_family(config.model, str(folder))
        group = group_of(family, ask("only", picture(56, 56, 0)), [1] * sum(SHARES), seed=0)
        tokens = [group.completions[0].token_ids + k for k in range(len(SHARES))]
        answers = [token for token, times in zip(tokens, SHARES, strict=True) for _ in range(times)]
        completions = tuple(
            replace(completion, token_ids=ids) for completion, ids in zip(group.completions, answers, strict=True)
        )
        sample = pack(scored(replace(group, completions=completions), [1.0] * len(answers)), np.ones(len(answers)), 1)

        settings = UpdateSettings(beta=0.0, lr=2e-3, loss="sft", tis="none")
        learner = learner_engine(config, str(folder), rendezvous, with_reference=False)
        steps = [learner.update([[[sample]]], settings) for _ in range(STEPS)]
        at_1 = Policy(learner.engine.module.network, family, temperature=1.0, logit_rows=64)
        first = distributions(at_1, batch_of([sample], family))[0].detach().exp()
        found.append(
            Learned(
                losses=[stats.loss for stats in steps],
                grad_norms=[stats.grad_norm for stats in steps],
                shares=[float(first[int(token)]) for [token] in tokens],
            )
        )
    return found


@pytest.fixture(scope="module")
def learned(model_folder: Path) -> list[Learned]:
    """Train in a separate process, because DeepSpeed keeps global state."""
    info = rendezvous_store()
    overrides_of_runs = [
        (f"mode={mode}", f"rollout.temperature={at}") for mode, at in (("sft", 0.5), ("sft", 1.0), ("train", 0.5))
    ]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(learn, (model_folder, info.port, overrides_of_runs))


def test_sft_losses_and_gradients_are_those_of_temperature_1(learned: list[Learned]) -> None:
    cool, plain, sampled = learned
    assert cool == plain
    assert sampled.losses[0] != pytest.approx(plain.losses[0], rel=1e-3)
    assert sampled.grad_norms[0] != pytest.approx(plain.grad_norms[0], rel=1e-3)


def test_sft_learns_answer_frequencies_of_60_and_20_percent(learned: list[Learned]) -> None:
    cool, _, sampled = learned
    assert cool.shares == pytest.approx([0.6, 0.2, 0.2], abs=0.01)
    # Trained at 0.5, logits count twice: an answer three times as frequent has a logit log(3) / 2 higher at 1.
    first, *others = sampled.shares
    assert [first / other for other in others] == pytest.approx([3**0.5] * 2, rel=0.02)

"""Real DeepSpeed ranks against a slow reference of the paper: GRPO-D in loops over padded rows, with torch's AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from othink_ray.config.schema import Config
from othink_ray.core.packing import pack
from othink_ray.engines.policy import Policy
from othink_ray.families import open_family
from othink_ray.families.base import Family
from othink_ray.types import Group, Probe
from tests.engines.learner_process import Outcome, Scenario, Shares, run_ranks
from tests.engines.reference_training import TEMPERATURE, slow_training
from tests.engines.samples import ask, batch_of, distributions, fresh_policy, picture, scored
from tests.engines.scenarios import BETA, REWARDS, packs_of, planned, training
from tests.engines.tolerances import assert_same_stats, distance, moved

ACTIVE_MODES = ("token", "sequence", "icepop", "mis_sequence")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learner")


@pytest.fixture(scope="module")
def probes(small_family: Family, batches: list[list[Group]]) -> list[Probe]:
    rng = np.random.default_rng(0)
    chosen = []
    for group in batches[0]:
        single = replace(group, completions=group.completions[:1])
        candidates = rng.integers(0, 300, size=(len(single.completions[0].token_ids), 4))
        chosen.append(Probe(group=single, candidates=candidates, logprobs=np.zeros(candidates.shape, np.float32)))
    return chosen


@pytest.fixture(scope="module")
def alone(
    small: Config, small_folder: Path, batches: list[list[Group]], scratch: Path, probes: list[Probe]
) -> dict[str, Outcome]:
    """Outcomes with one rank."""
    plain = training(small, batches, 1)
    one_update = [planned(batches[0], ranks=1, updates=1, micro_tokens=100)]
    unclipped = replace(plain.learner, max_grad_norm=1e6)
    scenarios = {
        "untouched": replace(plain, steps=(), probes=probes, with_reference=False),
        "stage 1": replace(plain, export=scratch / "export_1", probes=probes, observe=True),
        "stage 2, a sample at a time": training(small, batches, 1, zero_stage=2, micro_tokens=1),
        "stage 3, checkpointing": training(small, batches, 1, zero_stage=3, gradient_checkpointing=True),
        "all at once": training(small, batches, 1, micro_tokens=10**6),
        "dense, by BLAS": training(small, batches, 1, attention="dense", logit_rows=7, onednn=False),
        "frozen tower": replace(
            training(small, batches, 1, freeze="projector"), export=scratch / "export_frozen", observe=True
        ),
        "frozen tower, projector learns": replace(training(small, batches, 1, freeze="vision"), observe=True),
        "frozen tower, encoded each time": training(small, batches, 1, freeze="projector", share_features=False),
        "gradient": Scenario(learner=unclipped, steps=one_update, beta=BETA, temperature=TEMPERATURE),
        **{name: replace(plain, tis=name) for name in ACTIVE_MODES},
        "mis_sequence, a sample at a time": replace(
            training(small, batches, 1, zero_stage=2, micro_tokens=1), tis="mis_sequence"
        ),
        "prefetch": replace(plain, prefetch=True),
        "prefetch, frozen tower": replace(training(small, batches, 1, freeze="projector"), prefetch=True),
        "prefetch, stage 3": replace(training(small, batches, 1, zero_stage=3), prefetch=True),
        "prefetch, beta 0": replace(plain, prefetch=True, beta=0.0),
        "beta 0": replace(plain, beta=0.0),
        "beta 0, no reference": replace(plain, beta=0.0, with_reference=False),
        "gspo": replace(plain, loss="gspo"),
        "gspo, a sample at a time": replace(training(small, batches, 1, zero_stage=2, micro_tokens=1), loss="gspo"),
        "supervised": replace(plain, loss="sft", beta=0.0, with_reference=False),
        "poisoned": replace(plain, steps=[poisoned(plain.steps[0])]),
        "first half": replace(plain, steps=plain.steps[:1], save=scratch / "half"),
        "second half": replace(plain, steps=plain.steps[1:], load=scratch / "half"),
        "grouped, wide": training(small, batches, 1, attention="grouped", prune_last_layer=False),
    }
    [outcomes] = run_ranks(small.model, small_folder, 1, scenarios, scratch / "alone")
    return outcomes


@pytest.fixture(scope="module")
def pair(
    small: Config, small_folder: Path, batches: list[list[Group]], scratch: Path, probes: list[Probe]
) -> list[dict[str, Outcome]]:
    """Outcomes with two ranks, by rank."""
    plain, stage_3 = training(small, batches, 2), training(small, batches, 2, zero_stage=3)
    lopsided = [uneven(groups) for groups in batches]
    scenarios = {
        "stage 1, uneven": replace(plain, steps=lopsided),
        "stage 2": training(small, batches, 2, zero_stage=2, micro_tokens=1),
        "stage 3, frozen tower": replace(training(small, batches, 2, zero_stage=3, freeze="projector"), observe=True),
        "gspo": replace(stage_3, loss="gspo"),
        "mis_sequence": replace(stage_3, tis="mis_sequence"),
        "stage 3, poisoned": replace(stage_3, steps=[poisoned(stage_3.steps[0])]),
        "untouched": replace(stage_3, steps=(), with_reference=False),
        "stage 3, first half, uneven": replace(stage_3, steps=lopsided[:1], save=scratch / "half_3"),
        "stage 3": replace(
            stage_3, steps=stage_3.steps[1:], load=scratch / "half_3", export=scratch / "export_3", probes=probes
        ),
    }
    return run_ranks(small.model, small_folder, 2, scenarios, scratch / "pair")


def poisoned(shares: Shares) -> Shares:
    """Set the advantages of the first sample of the first update to NaN; the second update stays valid."""
    [[[first, *others], *micro_batches], *updates], *ranks = shares
    bad = replace(first, advantages=np.full_like(first.advantages, np.nan))
    return [[[[bad, *others], *micro_batches], *updates], *ranks]


def uneven(groups: Sequence[Group]) -> Shares:
    """Give all images to rank 0, and to rank 1 only text and empty micro-batches."""
    a, b, text, d = packs_of(groups, updates=2)
    return [[[[a], [b]], [[d], []]], [[[], []], [[], [text]]]]


# ---- against the paper


def test_loss_and_gradient_of_a_step_match_the_paper(
    small: Config, small_family: Family, batches: list[list[Group]], alone: dict[str, Outcome]
) -> None:
    slow = slow_training(small.learner, small_family, batches[:1], REWARDS, updates=1, beta=BETA)
    found = alone["gradient"]
    assert found.stats[0].loss == pytest.approx(slow.losses[0], rel=1e-5, abs=1e-6)
    assert found.stats[0].grad_norm == pytest.approx(slow.grad_norms[0], rel=1e-5)
    gradient = {name: value / (1 - small.learner.adam_beta1) for name, value in found.first_moments.items()}
    assert distance(gradient, slow.first_gradient)[0] < 1e-5


def test_updates_with_kl_and_clipping_match_the_paper(
    small: Config, small_family: Family, batches: list[list[Group]], alone: dict[str, Outcome]
) -> None:
    slow = slow_training(small.learner, small_family, batches, REWARDS, updates=2, beta=BETA)
    found = alone["stage 1"]
    assert [stats.loss for stats in found.stats] == pytest.approx(slow.losses, rel=1e-5, abs=1e-6)
    assert [stats.grad_norm for stats in found.stats] == pytest.approx(slow.grad_norms, rel=1e-4)
    assert max(slow.grad_norms) > small.learner.max_grad_norm
    assert distance(found.weights, slow.weights)[0] < 2e-5


@pytest.mark.parametrize(
    "name", ["stage 2, a sample at a time", "stage 3, checkpointing", "all at once", "dense, by BLAS", "grouped, wide"]
)
def test_stages_and_micro_batches_learn_the_same(alone: dict[str, Outcome], name: str) -> None:
    found, expected = alone[name], alone["stage 1"]
    assert_same_stats(found.stats, expected.stats)
    assert distance(moved(found, alone["untouched"]), moved(expected, alone["untouched"]))[0] < 1e-4


@pytest.mark.parametrize("name", ["stage 1, uneven", "stage 2", "stage 3"])
def test_two_ranks_learn_what_one_rank_learns(
    alone: dict[str, Outcome], pair: list[dict[str, Outcome]], name: str
) -> None:
    expected = alone["stage 1"]
    for outcomes in pair:
        earlier = outcomes["stage 3, first half, uneven"].stats if name == "stage 3" else []
        assert_same_stats([*earlier, *outcomes[name].stats], expected.stats)
        assert distance(moved(outcomes[name], alone["untouched"]), moved(expected, alone["untouched"]))[0] < 1e-4


@pytest.mark.parametrize("name", ACTIVE_MODES)
def test_corrected_updates_match_the_slow_reference(
    small: Config, small_family: Family, batches: list[list[Group]], alone: dict[str, Outcome], name: str
) -> None:
    slow = slow_training(small.learner, small_family, batches, REWARDS, updates=2, beta=BETA, tis=name)
    found, start = alone[name], alone["untouched"]
    assert [stats.loss for stats in found.stats] == pytest.approx(slow.losses, rel=1e-5, abs=1e-6)
    assert distance(found.weights, slow.weights)[0] < 2e-5
    assert distance(moved(found, start), moved(alone["stage 1"], start))[0] > 1e-3
    assert all(stats.ratio_used_mean < 1 and 0 < stats.ratio_truncated_frac < 1 for stats in found.stats)
    assert all((stats.ratio_masked_frac > 0) == (name in ("icepop", "mis_sequence")) for stats in found.stats)
    assert all(stats.ratio_used_mean == 1 for stats in alone["stage 1"].stats)


def test_ranks_and_micro_batches_do_not_change_a_corrected_run(
    alone: dict[str, Outcome], pair: list[dict[str, Outcome]]
) -> None:
    expected, start = alone["mis_sequence"], alone["untouched"]
    for found in (alone["mis_sequence, a sample at a time"], *(outcomes["mis_sequence"] for outcomes in pair)):
        assert_same_stats(found.stats, expected.stats)
        assert distance(moved(found, start), moved(expected, start))[0] < 1e-4


def test_ranks_and_micro_batches_do_not_change_gspo(alone: dict[str, Outcome], pair: list[dict[str, Outcome]]) -> None:
    expected, start = alone["gspo"], alone["untouched"]
    assert distance(moved(expected, start), moved(alone["stage 1"], start))[0] > 1e-3
    for found in (alone["gspo, a sample at a time"], *(outcomes["gspo"] for outcomes in pair)):
        assert_same_stats(found.stats, expected.stats)
        assert distance(moved(found, start), moved(expected, start))[0] < 1e-4


# ---- what is measured


def test_stats_describe_the_update(small: Config, batches: list[list[Group]], alone: dict[str, Outcome]) -> None:
    first, second = alone["stage 1"].stats
    answered = sum(len(c.token_ids) for group in batches[0] for c in group.completions)
    assert (first.tokens, second.tokens) == (answered, answered)
    assert first.lr == small.learner.lr
    assert first.kl_mean >= 0
    assert second.kl_mean > 1e-4
    assert 0 < second.entropy < math.log(400)
    assert second.ratio_raw_max > second.ratio_raw_mean > 0


def test_the_gap_to_the_sampler_is_measured_before_any_update(
    small_family: Family, batches: list[list[Group]], alone: dict[str, Outcome]
) -> None:
    packs = packs_of(batches[0], updates=1)
    batch = batch_of(packs, small_family)
    with torch.no_grad():
        logprobs, entropy = fresh_policy(small_family, TEMPERATURE)(batch)
    gap = (logprobs - batch.sampler_logprobs).double()
    stats = alone["gradient"].stats[0]
    assert stats.logp_gap_mean == pytest.approx(float(gap.abs().mean()), rel=1e-5)
    assert stats.logp_gap_max == pytest.approx(float(gap.abs().max()), rel=1e-5)
    assert stats.ratio_raw_mean == pytest.approx(float(gap.exp().mean()), rel=1e-5)
    assert stats.ratio_raw_max == pytest.approx(float(gap.exp().max()), rel=1e-5)
    assert stats.entropy == pytest.approx(float(entropy.mean()), rel=1e-5)


def test_an_image_is_encoded_once_for_all_answers_of_its_prompt(alone: dict[str, Outcome]) -> None:
    passes = 3  # the old policy, the reference, the policy
    assert alone["all at once"].stats[0].vision_encodes == 3 * passes


def test_a_frozen_tower_encodes_once_and_learns_the_same(
    alone: dict[str, Outcome], pair: list[dict[str, Outcome]]
) -> None:
    shared, apart = alone["frozen tower"], alone["frozen tower, encoded each time"]
    assert 0 < shared.stats[0].vision_encodes == apart.stats[0].vision_encodes / 3
    start = alone["untouched"]
    assert shared.stats[0].loss == pytest.approx(apart.stats[0].loss, rel=1e-6)
    assert distance(moved(shared, start), moved(apart, start))[0] < 1e-5
    assert distance(moved(alone["stage 1"], start), moved(shared, start))[0] > 1e-3
    for outcomes in pair:
        assert_same_stats(outcomes["stage 3, frozen tower"].stats, shared.stats)
        assert distance(moved(outcomes["stage 3, frozen tower"], start), moved(shared, start))[0] < 1e-4


@pytest.mark.parametrize(
    ("prefetched", "plain"),
    [(f"prefetch{kind}", kind[2:] or "stage 1") for kind in ("", ", frozen tower", ", beta 0")]
    + [("prefetch, stage 3", "stage 3, checkpointing")],
)
def test_prefetch_does_not_change_an_update(alone: dict[str, Outcome], prefetched: str, plain: str) -> None:
    found, expected = alone[prefetched], alone[plain]
    assert found.prefetched == [0, 1]
    assert_same_stats(found.stats, expected.stats)
    for ours, other in zip(found.stats, expected.stats, strict=True):
        assert ours.reference_passes == other.reference_passes
        assert ours.vision_encodes == other.vision_encodes
    if plain != "stage 3, checkpointing":
        assert distance(found.weights, expected.weights)[0] == 0
    assert distance(moved(found, alone["untouched"]), moved(expected, alone["untouched"]))[0] < 1e-4


def test_the_reference_runs_only_for_a_positive_beta(alone: dict[str, Outcome]) -> None:
    with_kl, without = alone["stage 1"], alone["beta 0"]
    assert all(stats.reference_passes > 0 for stats in with_kl.stats)
    assert [stats.reference_passes for stats in without.stats] == [0, 0]
    assert all(math.isnan(stats.kl_mean) for stats in without.stats)
    assert distance(without.weights, alone["beta 0, no reference"].weights)[0] == 0
    assert distance(moved(without, alone["untouched"]), moved(with_kl, alone["untouched"]))[0] > 1e-3


def test_supervised_updates_make_answers_likelier(alone: dict[str, Outcome]) -> None:
    first, second = alone["supervised"].stats
    assert 0 < second.loss < first.loss


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("stage 1", ()),
        ("frozen tower, projector learns", ("vision",)),
        ("frozen tower", ("vision", "projector")),
        ("stage 3, frozen tower", ("vision", "projector")),
    ],
)
def test_frozen_weights_keep_every_bit_and_others_are_trained(
    alone: dict[str, Outcome], pair: list[dict[str, Outcome]], name: str, kept: tuple[str, ...]
) -> None:
    for outcome in [alone[name]] if name in alone else [outcomes[name] for outcomes in pair]:
        before, after = (snapshot.digests for snapshot in outcome.snapshots)
        assert {part_of(tensor) for tensor in before} == {"text", "vision", "projector"}
        unchanged = {tensor for tensor in before if before[tensor] == after[tensor]}
        assert unchanged == {tensor for tensor in before if part_of(tensor) in kept}
        assert set(outcome.weights) == set(outcome.first_moments) == set(before) - unchanged
        assert outcome.frozen == {tensor: after[tensor] for tensor in unchanged}


def part_of(tensor: str) -> str:
    return "projector" if ".merger." in tensor else "vision" if ".visual." in tensor else "text"


def test_features_are_not_shared_if_the_projector_is_trained(alone: dict[str, Outcome]) -> None:
    encodes = [alone[name].stats[0].vision_encodes for name in ("frozen tower, projector learns", "frozen tower")]
    assert encodes[0] == 3 * encodes[1] > 0


# ---- weights out


def test_a_tied_head_and_embedding_are_pushed_once(alone: dict[str, Outcome]) -> None:
    weights = alone["stage 1"].weights
    assert "model.language_model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights


def test_frozen_weights_are_exported_but_not_pushed(alone: dict[str, Outcome], small: Config, scratch: Path) -> None:
    sent, start = alone["frozen tower"].weights, alone["untouched"].weights
    assert set(start) - set(sent) == {name for name in start if ".visual." in name}
    exported = loaded(small, scratch / "export_frozen")
    assert set(exported) == set(start)
    assert all(np.array_equal(weight, (start | sent)[name]) for name, weight in exported.items())


def loaded(small: Config, folder: Path) -> dict[str, NDArray[np.float32]]:
    network = open_family(replace(small.model, path=str(folder)), str(folder)).load_network(torch.float32)
    return {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}


def test_all_ranks_yield_the_same_gathered_weights(pair: list[dict[str, Outcome]]) -> None:
    for name in pair[0]:
        for weight, other in zip(pair[0][name].weights.values(), pair[1][name].weights.values(), strict=True):
            assert np.array_equal(weight, other)


@pytest.mark.parametrize("world", ["alone", "pair"])
def test_transformers_loads_an_export_with_trained_weights(
    alone: dict[str, Outcome], pair: list[dict[str, Outcome]], small: Config, scratch: Path, world: str
) -> None:
    trained, exported = {
        "alone": (alone["stage 1"], scratch / "export_1"),
        "pair": (pair[0]["stage 3"], scratch / "export_3"),
    }[world]
    opened = open_family(replace(small.model, path=str(exported)), str(exported))
    network = opened.load_network(torch.float32)
    weights = {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}
    assert set(weights) == set(trained.weights)
    assert all(np.array_equal(weight, trained.weights[name]) for name, weight in weights.items())
    assert network.get_parameter("lm_head.weight") is network.get_parameter("model.language_model.embed_tokens.weight")
    prompt = ask("q", picture(84, 84, 0))
    assert opened.image_token_counts(prompt.images) == [9]


def test_candidate_logprobs_are_those_of_the_pushed_weights(
    alone: dict[str, Outcome], pair: list[dict[str, Outcome]], small_family: Family, probes: list[Probe]
) -> None:
    for outcome in (alone["untouched"], alone["stage 1"], pair[0]["stage 3"], pair[1]["stage 3"]):
        policy: Policy = fresh_policy(small_family, TEMPERATURE)
        tied = {name: torch.from_numpy(weight) for name, weight in outcome.weights.items()}
        assert policy.network.load_state_dict(tied, strict=False).missing_keys == ["lm_head.weight"]
        for probe, found in zip(probes, outcome.candidate_logprobs, strict=True):
            packed = pack(scored(probe.group, [0.0]), np.zeros(1), 1)
            with torch.no_grad():
                whole = distributions(policy, batch_of([packed], small_family))
            expected = whole[: len(probe.candidates)].gather(1, torch.from_numpy(probe.candidates)).numpy()
            assert found.shape == probe.candidates.shape
            assert found == pytest.approx(expected, abs=1e-4)


# ---- losses that are not finite


def test_an_update_with_nan_loss_is_skipped_and_reported(
    alone: dict[str, Outcome], pair: list[dict[str, Outcome]]
) -> None:
    """The next update starts from the unchanged weights on all ranks, whichever rank had the bad sample."""
    two = [(outcomes["stage 3, poisoned"], outcomes["untouched"]) for outcomes in pair]
    for ranks in ([(alone["poisoned"], alone["untouched"])], two):
        named = {prompt for outcome, _ in ranks for prompt in outcome.stats[0].bad_prompts}  # each rank has a part
        assert named and named <= set("abcd")
        for outcome, start in ranks:
            [stats] = outcome.stats
            assert stats.skipped == 1 and math.isnan(stats.loss)
            assert 0 < stats.grad_norm < math.inf, "the norm of the valid update"
            assert all(np.isfinite(weight).all() for weight in outcome.weights.values())
            assert distance(outcome.weights, start.weights)[0] > 1e-4


# ---- save and load


def test_a_resumed_learner_equals_an_uninterrupted_one(alone: dict[str, Outcome]) -> None:
    """The same for sharded ranks is part of "stage 3" with two ranks, which resumes after its first step."""
    half, rest, whole = alone["first half"], alone["second half"], alone["stage 1"]
    assert rest.stats == whole.stats[1:]
    assert distance(rest.weights, whole.weights)[0] == 0
    assert distance(half.weights, whole.weights)[0] > 1e-4

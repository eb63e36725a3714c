"""LoRA on real DeepSpeed ranks, against the gradient of the full matrices and across stages and ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from othink_ray.config.schema import Config, LearnerConfig, LoraConfig
from othink_ray.engines.learner_checkpoint import read_exported
from othink_ray.engines.lora import AdapterError
from othink_ray.engines.policy import choose_trained
from othink_ray.families.base import Family
from othink_ray.types import Group, Probe
from tests.engines.learner_process import Outcome, Scenario, run_ranks
from tests.engines.reference_training import TEMPERATURE
from tests.engines.samples import batch_of, distributions, fresh_policy, row_of
from tests.engines.scenarios import BETA, planned, training
from tests.engines.tolerances import assert_same_stats, distance, moved

pytestmark = pytest.mark.slow

TEXT = LoraConfig(rank=4, alpha=12, targets=("text",))
EVERYWHERE = replace(TEXT, targets=("text", "vision", "projector"))
Arrays = dict[str, NDArray[np.float32]]
Outcomes = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def outcomes(small: Config, small_folder: Path, batches: list[list[Group]], scratch: Path) -> Outcomes:
    """Outcomes of each scenario, by rank: on one rank, then on two, then on one from the two ranks' checkpoint."""

    def run(ranks: int, name: str, **scenarios: Scenario) -> Outcomes:
        found = run_ranks(small.model, small_folder, ranks, scenarios, scratch / name)
        return {key: [rank[key] for rank in found] for key in scenarios}

    def adapted(ranks: int, **changes: object) -> Scenario:
        return training(small, batches, ranks, **({"lora": TEXT} | changes))

    one_update = [planned(batches[0], ranks=1, updates=1, micro_tokens=100)]
    first = Scenario(
        learner=replace(small.learner, max_grad_norm=1e6), steps=one_update, beta=BETA, temperature=TEMPERATURE
    )
    one, two, three = adapted(1), adapted(2), adapted(2, zero_stage=3)
    probes = [
        Probe(
            group=replace(group, completions=group.completions[:1]),
            candidates=np.arange(100, 104)[None].repeat(len(group.completions[0].token_ids), 0),
            logprobs=np.zeros((len(group.completions[0].token_ids), 4), np.float32),
        )
        for group in batches[0]
    ]
    return (
        run(
            1,
            "first",
            whole_matrices=first,
            first_step=replace(first, learner=replace(first.learner, lora=EVERYWHERE)),
            untouched=replace(one, steps=(), probes=probes),
            stage_1=replace(one, observe=True, export=scratch / "export", probes=probes),
            stage_2=adapted(1, zero_stage=2, micro_tokens=1),
            stage_3=replace(adapted(1, zero_stage=3, gradient_checkpointing=True), observe=True),
            dense=adapted(1, attention="dense", onednn=False, share_features=False),
            everywhere=adapted(1, lora=EVERYWHERE),
            supervised=replace(one, loss="sft", beta=0.0, with_reference=False),
            half=replace(one, steps=one.steps[:1], save=scratch / "of_one"),
            rest=replace(one, steps=one.steps[1:], load=scratch / "of_one"),
        )
        | run(
            2,
            "second",
            two_ranks=two,
            two_of_stage_3=replace(three, observe=True, export=scratch / "export_3"),
            one_to_stage_3=replace(three, steps=three.steps[1:], load=scratch / "of_one"),
            half_of_stage_3=replace(three, steps=three.steps[:1], save=scratch / "of_three"),
        )
        | run(1, "third", stage_3_to_one=replace(one, steps=one.steps[1:], load=scratch / "of_three"))
    )


@pytest.fixture(scope="module")
def coarse(small: Config, small_folder: Path, batches: list[list[Group]], scratch: Path) -> Outcomes:
    """Outcomes of a bfloat16 model at a small learning rate."""
    model = replace(small.model, dtype="bfloat16")

    def run(name: str, ranks: int, **changes: object) -> list[Outcome]:
        changes = {"lora": TEXT, "lr": 1e-5, "adam_eps": 1e-8} | changes
        scenario = replace(training(small, batches, ranks, **changes), export=scratch / f"export_{name}")
        return [
            one[name] for one in run_ranks(model, small_folder, ranks, {name: scenario}, scratch / f"coarse_{name}")
        ]

    return {"one_rank": run("one_rank", 1), "two_of_stage_3": run("two_of_stage_3", 2, zero_stage=3)}


def factors_of(outcome: Outcome, path: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return outcome.factors[f"{path}.lora_B.default.weight"], outcome.factors[f"{path}.lora_A.default.weight"]


# ---- the start


def test_new_adapters_add_nothing_so_the_first_kl_is_zero(outcomes: Outcomes) -> None:
    [outcome], [plain] = outcomes["first_step"], outcomes["whole_matrices"]
    assert outcome.stats[0].kl_mean == 0.0 == plain.stats[0].kl_mean
    assert outcome.stats[0].loss == plain.stats[0].loss
    assert outcome.stats[0].reference_passes > 0
    ups = [factor for name, factor in outcome.factors.items() if "lora_B" in name]
    downs = [factor for name, factor in outcome.factors.items() if "lora_A" in name]
    assert len(ups) == len(downs) > 0
    assert not any(up.any() for up in ups) and all(down.all() for down in downs)


def test_adapter_gradients_follow_from_the_full_gradient(outcomes: Outcomes, small: Config) -> None:
    """dL/dB = scale * dL/dW A^T, and dL/dA = scale * B^T dL/dW, which is 0 while B is 0."""
    [adapted], [plain] = outcomes["first_step"], outcomes["whole_matrices"]
    paths = [name.removesuffix(".lora_B.default.weight") for name in adapted.factors if "lora_B" in name]
    assert {"visual.blocks" in path for path in paths} == {True, False}
    scale = EVERYWHERE.alpha / EVERYWHERE.rank
    whole = np.sqrt(sum(float((moment**2).sum()) for moment in adapted.first_moments.values()))
    for path in paths:
        _, down = factors_of(adapted, path)
        expected = scale * plain.first_moments[f"{path}.weight"] @ down.T
        found = adapted.first_moments[f"{path}.lora_B.default.weight"]
        assert np.linalg.norm(found - expected) < 1e-5 * max(np.linalg.norm(expected), 1e-3 * whole), path
        assert not adapted.first_moments[f"{path}.lora_A.default.weight"].any()


# ---- what is trained


@pytest.mark.parametrize("name", ["stage_1", "stage_3", "two_of_stage_3"])
def test_only_adapters_change_and_all_of_them(outcomes: Outcomes, name: str) -> None:
    for outcome in outcomes[name]:
        before, after = (snapshot.digests for snapshot in outcome.snapshots)
        assert before.keys() == after.keys()
        assert {tensor for tensor in before if before[tensor] != after[tensor]} == set(outcome.factors)
        assert set(outcome.first_moments) == set(outcome.factors)


@pytest.mark.parametrize("name", ["stage_1", "stage_3", "two_of_stage_3"])
def test_the_reference_stays_bit_identical(outcomes: Outcomes, name: str) -> None:
    for outcome in outcomes[name]:
        before, after = (snapshot.reference_logprobs for snapshot in outcome.snapshots)
        assert np.isfinite(before).all() and np.array_equal(before, after)
        assert outcome.stats[-1].kl_mean > 1e-5


@pytest.mark.parametrize("name", ["stage_2", "stage_3", "dense", "two_ranks", "two_of_stage_3"])
def test_adapters_learn_alike_for_any_stage_rank_and_attention(outcomes: Outcomes, name: str) -> None:
    [expected], [start] = outcomes["stage_1"], outcomes["untouched"]
    for outcome in outcomes[name]:
        assert_same_stats(outcome.stats, expected.stats)
        assert distance(moved(outcome, start), moved(expected, start))[0] < 1e-4


def test_features_are_shared_only_below_no_adapter(outcomes: Outcomes) -> None:
    [text], [unshared], [everywhere] = outcomes["stage_1"], outcomes["dense"], outcomes["everywhere"]
    assert 0 < text.stats[0].vision_encodes == unshared.stats[0].vision_encodes / 3
    assert everywhere.stats[0].vision_encodes == unshared.stats[0].vision_encodes


def test_supervised_updates_make_answers_likelier(outcomes: Outcomes) -> None:
    first, second = outcomes["supervised"][0].stats
    assert 0 < second.loss < first.loss


# ---- weights out


def merged(network: nn.Module, sent: Arrays) -> dict[str, Tensor]:
    """Return all weights of a plain network in float32, with B A of the pushed factors added."""
    weights = {name: weight.float() for name, weight in network.state_dict().items()}
    for name in sent:
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            up, down = (torch.from_numpy(sent[f"{path}.lora_{factor}.weight"]) for factor in "BA")
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + up @ down
    return weights


def test_both_factors_of_every_adapter_are_pushed(outcomes: Outcomes) -> None:
    [start], [trained] = outcomes["untouched"], outcomes["stage_1"]
    first = {name.replace(".default", ""): factor for name, factor in start.factors.items()}
    assert start.weights.keys() == trained.weights.keys() == first.keys()
    assert all(np.array_equal(weight, first[name]) for name, weight in start.weights.items())
    assert all(not np.array_equal(weight, first[name]) for name, weight in trained.weights.items())


def test_pushed_factors_on_a_plain_network_match_the_learner(
    outcomes: Outcomes, small_family: Family, batches: list[list[Group]]
) -> None:
    [trained], [start] = outcomes["stage_1"], outcomes["untouched"]
    policy = fresh_policy(small_family, TEMPERATURE)
    policy.network.load_state_dict(merged(policy.network, trained.weights))
    for group, found, before in zip(batches[0], trained.candidate_logprobs, start.candidate_logprobs, strict=True):
        row = row_of(replace(group, completions=group.completions[:1]))
        with torch.no_grad():
            expected = distributions(policy, batch_of([row], small_family))[: len(found), 100:104].numpy()
        assert np.abs(found - expected).max() < 1e-5 < 1e-3 < np.abs(found - before).max()


@pytest.mark.parametrize(("name", "folder"), [("stage_1", "export"), ("two_of_stage_3", "export_3")])
def test_an_export_is_a_plain_model_and_its_adapter(
    outcomes: Outcomes, small_folder: Path, scratch: Path, name: str, folder: str
) -> None:
    export, sent = scratch / folder, outcomes[name][0].weights
    files = [load_file(one / "model.safetensors").keys() for one in (export, small_folder)]
    assert files[0] == files[1]
    exported, base = (AutoModelForImageTextToText.from_pretrained(one) for one in (export, small_folder))
    expected = merged(base, sent)
    by_peft: Any = PeftModel.from_pretrained(base, export / "adapter").merge_and_unload()
    for tensor, weight in exported.state_dict().items():
        assert torch.allclose(weight, expected[tensor], rtol=0, atol=1e-7), tensor
        assert torch.allclose(weight, by_peft.state_dict()[tensor], rtol=0, atol=1e-6), tensor


# ---- bfloat16, which is coarser than the updates of a small learning rate


def share(part: Tensor, whole: Tensor) -> float:
    """Return the projection of `part` on `whole`, relative to `whole`."""
    return float((part * whole).sum() / (whole * whole).sum())


@pytest.mark.parametrize("name", ["one_rank", "two_of_stage_3"])
def test_in_bfloat16_whole_updates_are_pushed_and_exported(
    coarse: Outcomes, small_folder: Path, scratch: Path, name: str
) -> None:
    base, exported = (
        AutoModelForImageTextToText.from_pretrained(one, dtype=dtype).state_dict()
        for one, dtype in ((small_folder, torch.bfloat16), (scratch / f"export_{name}", "auto"))
    )
    assert {weight.dtype for weight in exported.values()} == {torch.float32}
    sent = {key: torch.from_numpy(weight) for key, weight in coarse[name][0].weights.items()}
    arrived, rounded = [], []
    for key in base:
        start, weight, path = base[key].float(), exported[key], key.removesuffix(".weight")
        if f"{path}.lora_A.weight" not in sent:
            assert torch.equal(weight, start), key
            continue
        update = sent[f"{path}.lora_B.weight"] @ sent[f"{path}.lora_A.weight"]
        assert update.any()
        arrived.append(share(weight - start, update))
        rounded.append(share(weight.bfloat16().float() - start, update))
    assert len(arrived) == 2 * 7
    assert max(abs(found - 1) for found in arrived) < 2e-3
    assert np.mean(rounded) < 0.5  # the share that would survive rounding to the base's dtype


def test_a_bfloat16_export_opens_as_base_and_served_adapter(
    coarse: Outcomes, small_folder: Path, scratch: Path
) -> None:
    found = read_exported(str(scratch / "export_one_rank"), "bfloat16")
    assert found is not None and found.base == str(small_folder) and found.adapters.rank == TEXT.rank
    [outcome] = coarse["one_rank"]
    assert {name: factor.dtype for name, factor in found.factors} == dict.fromkeys(outcome.weights, torch.bfloat16)
    assert all(np.array_equal(factor.float().numpy(), outcome.weights[name]) for name, factor in found.factors)
    names = {f"{layer}.lora_{factor}.weight" for layer in found.adapters.layers for factor in "AB"}
    assert names == outcome.weights.keys()
    assert read_exported(str(scratch / "export_one_rank"), "float32") is None
    assert read_exported(str(small_folder), "bfloat16") is None


def test_in_bfloat16_the_push_has_the_learners_values(coarse: Outcomes) -> None:
    """The values are bfloat16, and B includes the scale of 3."""
    for name in ("one_rank", "two_of_stage_3"):
        [outcome, *_] = coarse[name]
        for tensor, weight in outcome.weights.items():
            factor = torch.from_numpy(outcome.trained_factors[tensor.replace(".weight", ".default.weight")])
            expected = (factor * 3.0 if ".lora_B." in tensor else factor).bfloat16().float()
            assert np.array_equal(weight, expected.numpy()), tensor


# ---- save and load


def test_a_checkpoint_holds_only_the_adapters(outcomes: Outcomes, scratch: Path) -> None:
    stored = load_file(scratch / "of_one" / "learner_0.safetensors")
    assert {key.rpartition("/")[0] for key in stored} == set(outcomes["untouched"][0].factors)


def test_a_resumed_learner_equals_an_uninterrupted_one(outcomes: Outcomes) -> None:
    [rest], [whole] = outcomes["rest"], outcomes["stage_1"]
    assert rest.stats == whole.stats[1:]
    assert distance(rest.weights, whole.weights)[0] == 0


@pytest.mark.parametrize("name", ["one_to_stage_3", "stage_3_to_one"])
def test_a_checkpoint_resumes_on_other_ranks_and_stages(outcomes: Outcomes, name: str) -> None:
    [start], [whole] = outcomes["untouched"], outcomes["stage_1"]
    for outcome in outcomes[name]:
        assert distance(moved(outcome, start), moved(whole, start))[0] < 1e-3


# ---- what may be adapted


def adapted_paths(family: Family, learner: LearnerConfig, *targets: str, freeze: str = "none") -> set[str]:
    """Return the paths of the adapted layers, from a network without weights."""
    network = family.meta_network()
    choose_trained(family, network, replace(learner, freeze=freeze, lora=replace(TEXT, targets=targets)))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    return {name.partition(".lora_")[0].removeprefix("model.") for name in trained}


def test_targets_are_parts_or_layer_names(small_family: Family, small: Config) -> None:
    def paths(*targets: str, freeze: str = "none") -> set[str]:
        return adapted_paths(small_family, small.learner, *targets, freeze=freeze)

    layers = {f"language_model.layers.{layer}" for layer in (0, 1)}
    assert paths("q_proj") == {f"{layer}.self_attn.q_proj" for layer in layers}
    assert {path.partition(".")[0] for path in paths("text")} == {"language_model"}
    assert len(paths("text")) == 2 * 7
    assert paths("vision") == {f"visual.blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert paths("projector") == {"visual.merger.mlp.0", "visual.merger.mlp.2"}
    assert paths("qkv", "v_proj", freeze="none") == {"visual.blocks.0.attn.qkv"} | {
        f"{layer}.self_attn.v_proj" for layer in layers
    }


@pytest.mark.parametrize(
    ("targets", "freeze", "words"),
    [
        (("text", "q_porj"), "none", r"= \[text, q_porj\] must .* has no q_porj\. Did you mean q_proj\? It has: "),
        (("lm_head",), "none", r"the model has no lm_head\. "),
        (("qkv",), "vision", r"the model has no qkv outside of the parts that learner\.freeze freezes \(vision\)\. "),
    ],
)
def test_an_unknown_target_is_refused_with_the_known_ones(
    small_family: Family, small: Config, targets: tuple[str, ...], freeze: str, words: str
) -> None:
    with pytest.raises(AdapterError, match=words):
        adapted_paths(small_family, small.learner, *targets, freeze=freeze)

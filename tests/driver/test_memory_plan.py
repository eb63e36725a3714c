"""The memory plan of each cluster file, computed from the real shapes of public models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from othink_ray.config.load import load
from othink_ray.config.schema import Config
from othink_ray.driver import memory_check
from othink_ray.driver.memory_check import (
    MeasuredNetwork,
    Memory,
    measure,
    memory_problems,
    micro_batch,
    plan_memory,
    remedy,
    table,
    with_settings,
)
from othink_ray.driver.memory_plan import GIB
from othink_ray.driver.preflight import idle_gpus
from othink_ray.families import open_family
from othink_ray.families.base import Family
from tests.driver.real_shapes import write_public

MeasureModel = Callable[[str], tuple[Family, MeasuredNetwork]]  # by size: "2b" or "7b"
WEIGHTS = 2_208_985_600  # of Qwen2-VL-2B
CLUSTERS = ("one_gpu", "one_node_colocated", "one_node", "two_nodes", "many_nodes")


def config_of(size: str, cluster: str, *more: str) -> Config:
    return load([f"model=qwen2_vl_{size}", f"cluster={cluster}", *more])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> MeasureModel:
    """Return a function from model size to family and measurement, at the 16 images of the largest micro-batch."""

    @cache
    def measure_model(size: str) -> tuple[Family, MeasuredNetwork]:
        config = config_of(size, "one_gpu", "train.prompts_per_step=16" if size == "2b" else "train.prompts_per_step=8")
        folder = write_public(tmp_path_factory.mktemp(size), size)
        family = open_family(config.model, str(folder))
        return family, measure(config, family)

    return measure_model


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_qwen2_vl_2b_fits_each_cluster(measured: MeasureModel, cluster: str) -> None:
    memory = plan_memory(config_of("2b", cluster), measured("2b")[1])
    assert memory.device_bytes == 79 * GIB
    assert memory.excess() is None
    assert "tight" not in table(memory)
    assert memory.plan.engine.sequences >= 64


def test_one_gpu_counts_every_byte_of_a_weight(measured: MeasureModel) -> None:
    """2 weights, 2 reference, 4 float32 weights, 8 moments; 4 gradients during the update."""
    learner = plan_memory(config_of("2b", "one_gpu"), measured("2b")[1]).plan.learner
    assert sum(learner.resident.values()) == 16 * WEIGHTS
    assert learner.updating["gradients"] == 4 * WEIGHTS
    assert learner.updating["activations"] > 2 * GIB


def test_engine_and_learner_on_one_gpu_are_added_up(measured: MeasureModel) -> None:
    config = config_of("2b", "one_gpu")
    plan = plan_memory(config, measured("2b")[1]).plan
    load_, generate, update = plan.devices["a shared GPU"]
    assert generate.total > 0.4 * 79 * GIB + 16 * WEIGHTS
    assert update.total > 20 * WEIGHTS
    awake = plan_memory(with_settings(config, {"rollout.sleep": False}), measured("2b")[1]).plan.devices
    assert [phase.total for phase in awake["a shared GPU"]] == pytest.approx(
        [
            load_.total + 0.4 * 79 * GIB,
            generate.total,
            update.total + 0.4 * 79 * GIB,
        ]
    )


@pytest.mark.parametrize(("ranks", "advised"), [(1, False), (2, True)])
def test_gradient_sharding_is_advised_only_for_several_ranks(ranks: int, advised: bool) -> None:
    """A single rank holds all gradients at ZeRO stage 1 and 2."""
    config = config_of("2b", "one_node", "learner.zero_stage=1", f"learner.world_size={ranks}")
    assert ({"learner.zero_stage": 2} in memory_check._candidates(config)) == advised


def oversized() -> Config:
    return config_of("2b", "one_gpu", "learner.zero_stage=3", "rollout.gpu_memory_utilization=0.5")


def test_zero_3_with_half_of_one_gpu_for_vllm_does_not_fit(
    measured: MeasureModel,
) -> None:
    family, found = measured("2b")
    [problem] = memory_problems(oversized(), family, found)
    assert problem.subject == "memory of a shared GPU"
    assert "and has 79.0; in GiB, a shared GPU in phase generate: engine 39.5" in problem.rule
    assert "rollout.gpu_memory_utilization=0." in problem.remedy


def fits_with(config: Config, family: Family, found: MeasuredNetwork) -> tuple[Memory, dict[str, object]]:
    settings = remedy(config, family, found)
    assert settings
    return plan_memory(with_settings(config, settings), found), settings


def test_a_7b_model_fits_eight_shared_gpus_with_the_remedy(
    measured: MeasureModel,
) -> None:
    family, found = measured("7b")
    config = config_of("7b", "one_node_colocated")
    assert plan_memory(config, found).excess() == "a shared GPU"
    memory, settings = fits_with(config, family, found)
    assert memory.excess() is None
    assert not memory.tight()
    assert set(settings) <= {"rollout.gpu_memory_utilization", "learner.zero_stage"}


def test_the_remedy_for_a_7b_model_on_one_gpu_is_lora(
    measured: MeasureModel,
) -> None:
    family, found = measured("7b")
    settings = remedy(config_of("7b", "one_gpu"), family, found)
    assert settings is not None
    assert settings["learner.lora.rank"] == 16


def test_a_share_too_small_for_vllm_is_a_problem(measured: MeasureModel) -> None:
    family, found = measured("2b")
    [problem] = memory_problems(config_of("2b", "one_node", "rollout.gpu_memory_utilization=0.05"), family, found)
    assert problem.subject == "rollout.gpu_memory_utilization = 0.05"
    assert problem.remedy == "Set rollout.gpu_memory_utilization=0.85."


def test_a_gpu_of_16_gb_is_reported_as_too_small(measured: MeasureModel) -> None:
    memory = plan_memory(config_of("2b", "two_nodes", "cluster.gpu_memory_gb=16"), measured("2b")[1])
    assert memory.excess() == "a learner's GPU"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_no_cluster_file_leaves_a_gpu_idle(cluster: str) -> None:
    assert idle_gpus(config_of("2b", cluster)) == []


def test_idle_gpus_are_reported_with_the_setting_to_change() -> None:
    overrides = ["train.overlap=false", "train.prompts_per_step=64", "learner.zero_stage=3"]
    waiting, few, gathering = idle_gpus(config_of("2b", "many_nodes", *overrides))
    assert "the engines' 32 GPUs are idle during updates" in waiting
    assert "train.overlap=true" in waiting
    assert "samples 16 answers per step, and can batch 256" in few
    assert "learner.zero_stage=2" in gathering


def test_engines_without_a_prompt_are_counted() -> None:
    findings = idle_gpus(config_of("2b", "many_nodes", "train.prompts_per_step=8", "learner.world_size=8"))
    assert any("24 engines get no prompt" in finding for finding in findings)


# ---- CPUs


SHORT = ("algo.group_size=2", "rollout.max_tokens=16", "train.prompts_per_step=2", "rollout.max_num_seqs=4")


def on_cpus(*more: str) -> Config:
    return load(["model=qwen2_vl_2b", "model.max_pixels=50176", *more])


def test_a_cpu_engine_with_adapters_holds_one_copy(measured: MeasureModel) -> None:
    """One copy of all weights but the output matrix, which is also the embedding."""
    found = measured("2b")[1]
    plain, adapted = (
        plan_memory(on_cpus(f"learner.lora.rank={rank}"), found).plan.engine.needs["engine weights"] for rank in (0, 16)
    )
    assert plain == 2 * 2 * WEIGHTS
    assert adapted == 2 * (WEIGHTS + 151_936 * 1536)


def test_on_cpus_driver_and_ray_are_added(measured: MeasureModel) -> None:
    memory = plan_memory(on_cpus("learner.world_size=2"), measured("2b")[1])
    peaks = {name: memory.plan.peak(name).total for name in memory.plan.devices}
    assert peaks["driver and Ray"] > GIB
    [peak] = memory.peaks().values()
    assert peak == 2 * peaks["a learner rank"] + peaks["a rollout actor"] + peaks["driver and Ray"]


def test_logits_are_counted_for_answer_tokens_only(measured: MeasureModel) -> None:
    family = measured("2b")[0]
    assert micro_batch(on_cpus(*SHORT), family)[2] == 2 * 2 * 16
    tokens, images, answer_tokens = micro_batch(on_cpus("rollout.max_tokens=200", "train.prompts_per_step=64"), family)
    assert answer_tokens == tokens - sum(family.image_token_counts(images))


def test_a_cpu_engine_batches_only_what_its_sequences_hold(
    measured: MeasureModel,
) -> None:
    family = measured("2b")[0]
    few, many = (measure(on_cpus(*SHORT, f"rollout.max_num_seqs={count}"), family).sampling for count in (4, 64))
    assert 3 * few < many


def test_a_compiled_cpu_engine_profiles_a_full_batch(measured: MeasureModel) -> None:
    family = measured("2b")[0]
    eager, compiled = (
        measure(on_cpus(*SHORT, f"rollout.enforce_eager={eager}"), family).sampling for eager in ("true", "false")
    )
    assert 3 * eager < compiled

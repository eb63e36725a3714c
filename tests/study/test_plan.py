"""The planned runs: all that the paper's experiments need, each run once, each a valid configuration."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from othink_ray.config.bounds import EXPERIMENTS
from othink_ray.config.load import load
from othink_ray.config.validate import Machine, problems
from othink_ray.study.plan import GR, VC, StudyRun, base_overrides, for_runs, merged, planned

STUDY = load([]).study
config_of = functools.cache(load)  # several tests load the overrides of the same run
MACHINE = Machine(cpus=2, gpus=0)


def test_the_study_plans_every_run_of_the_five_experiments() -> None:
    runs = planned(STUDY, [])
    compared = {(run.task, run.method, run.seed) for run in runs if "same_task" in run.experiments}
    assert compared == {
        (task, method, seed) for task in (VC, GR) for method in ("grpo", "sft", "grpo_d") for seed in range(3)
    }
    assert {run.alpha for run in runs if "alpha" in run.experiments} == {0, 0.25, 0.5, 0.75, 1}
    assert {run.beta for run in runs if "beta" in run.experiments} == {0, 0.01, 0.02, 0.03, 0.04, 0.05}
    assert {run.method for run in runs if "curves" in run.experiments} == {"sft", "grpo"}
    assert {name for run in runs for name in run.experiments} == set(EXPERIMENTS)


def test_a_run_shared_by_experiments_is_planned_once() -> None:
    runs = planned(STUDY, [])
    assert len({run.name for run in runs}) == len({frozenset(run.overrides) for run in runs}) == len(runs)
    [shared] = [
        run for run in runs if (run.task, run.method, run.seed, run.beta) == (GR, "grpo", 0, 0.01) and run.alpha == 1
    ]
    assert set(shared.experiments) == set(EXPERIMENTS)


@pytest.mark.parametrize("study", [pytest.param("paper", marks=pytest.mark.slow), "alpha", "beta"])
@pytest.mark.parametrize("size", ["full", "small"])
def test_every_run_is_a_valid_configuration(study: str, size: str) -> None:
    config = load([f"study={study}", f"study.size={size}"]).study
    first_seed = [run.overrides for run in planned(config, []) if run.seed == 0]
    for overrides in (base_overrides(config, []), *first_seed):
        assert problems(config_of(overrides), MACHINE) == []


@pytest.mark.parametrize("run", planned(STUDY, []), ids=lambda run: run.name)
def test_the_configuration_of_a_run_matches_its_name(run: StudyRun) -> None:
    config = config_of(run.overrides)
    assert config.data.name == {VC: "counting", GR: "geometry"}[run.task]
    assert config.eval.also == ({VC: "geometry", GR: "counting"}[run.task],)
    assert config.train.seed == run.seed
    if run.method == "sft":
        assert config.mode == "sft"
        return
    assert config.algo.reward.format_weight == run.alpha
    bounds = (config.algo.kl.beta_min, config.algo.kl.beta_max)
    if run.method == "grpo":
        assert config.algo.kl.schedule == "constant"
        assert bounds == (run.beta, run.beta)
    else:
        assert config.algo.kl.schedule == "paper"
        assert bounds == {VC: (0.04, 0.1), GR: (0.0, 0.02)}[run.task]


@pytest.mark.slow
def test_extra_overrides_reach_all_runs_and_keep_them_distinct() -> None:
    typed = ["mode=study", "study.size=small", "run.dir=x", "train.steps=7", "train.seed=9", "rollout=hf"]
    extra = for_runs(typed)
    assert extra == ["train.steps=7", "train.seed=9", "rollout=hf"]
    runs = [run for run in planned(STUDY, extra) if run.method == "grpo_d"]
    configs = [load(run.overrides) for run in runs]
    assert {config.train.steps for config in configs} == {7}
    assert {config.rollout.engine for config in configs} == {"hf"}
    assert [run.seed for run in runs] == [config.train.seed for config in configs]
    assert {run.seed for run in runs} == {0, 1, 2}
    assert load(base_overrides(STUDY, extra)).rollout.engine == "hf"
    assert load(base_overrides(STUDY, extra)).train.steps == load(STUDY.base).train.steps


FULL_SIZE = ["model=qwen2_vl_2b", "cluster=one_node"]


def full_size_runs() -> list[StudyRun]:
    return planned(load(["study=r1_v"]).study, FULL_SIZE)


@pytest.mark.parametrize("run", full_size_runs(), ids=lambda run: run.name)
def test_full_size_runs_train_at_the_rates_of_the_r1_v_recipe(run: StudyRun) -> None:
    config = config_of(run.overrides)
    assert (config.model.name, config.model.dtype) == ("qwen2_vl_2b", "bfloat16")
    assert config.data.name == {VC: "clevr", GR: "geoqa"}[run.task]
    assert config.learner.lr == (2e-5 if run.method == "sft" else 1e-6)
    assert config.train.prompts_per_step * config.algo.group_size == 128
    assert config.data.train.size == {VC: 100, GR: None}[run.task]
    assert config.train.steps == {VC: 100, GR: 500}[run.task]
    one_node = load(["cluster=one_node"])
    assert (config.rollout.threads, config.learner.threads) == (one_node.rollout.threads, one_node.learner.threads)


@pytest.mark.parametrize("size", ["full", "small"])
def test_full_size_runs_lack_only_the_users_test_files(size: str) -> None:
    study = load(["study=r1_v", f"study.size={size}"]).study
    for run in planned(study, FULL_SIZE):
        if run.seed == 0:
            found = problems(config_of(run.overrides), Machine(cpus=256, gpus=8))
            assert [
                problem
                for problem in found
                if "does not exist (relative paths" not in problem.rule and "image_root" not in problem.subject
            ] == []


@pytest.mark.slow
def test_the_tiny_models_study_is_refused_on_a_real_model() -> None:
    for run in planned(STUDY, FULL_SIZE):
        subjects = [problem.subject for problem in problems(config_of(run.overrides), Machine(cpus=256, gpus=8))]
        assert any(subject.startswith("learner.lr = ") for subject in subjects), run.name


def test_the_last_override_of_a_key_wins() -> None:
    assert merged(["a=1", "b=2"], ["a=3"]) == ("b=2", "a=3")


def test_more_seeds_add_runs() -> None:
    assert len(planned(replace(STUDY, seeds=4), [])) == len(planned(STUDY, [])) + 6

"""Composing conf/ with overrides, and strict conversion to Config."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.conf import RuntimeConf

from othink_ray.config.load import (
    ConfigError,
    conf_dir,
    groups,
    load,
    origins,
    read,
    register_defaults,
    sweep_jobs,
    to_yaml,
)
from othink_ray.config.schema import FilesConfig, SmolConfig


def report(overrides: list[str], folder: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(overrides, folder)
    return " ".join(str(caught.value).split())


@pytest.fixture
def custom_conf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(conf_dir(), tmp_path / "conf"))


def test_defaults_are_the_values_of_the_paper() -> None:
    config = load([])
    assert (config.algo.kl.schedule, config.algo.kl.beta_min, config.algo.kl.beta_max) == ("paper", 0.04, 0.1)
    assert (config.algo.kl.explore_frac, config.algo.group_size, config.algo.reward.format_weight) == (0.3, 8, 1.0)


def test_overrides_win_over_groups_and_groups_over_defaults() -> None:
    config = load(["algo=grpo", "algo.group_size=4"])
    assert (config.algo.name, config.algo.kl.schedule, config.algo.group_size) == ("grpo", "constant", 4)


def test_each_model_gets_the_adam_settings_of_its_size() -> None:
    """The eps of the tiny model would damp a real model's steps: its gradients are not much larger than 1e-6."""
    models, clusters = (groups(conf_dir())[group] for group in ("model", "cluster"))
    register_defaults()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir().resolve())):
        for model, cluster in itertools.product(models, clusters):
            composed = compose("config", overrides=[f"model={model}", f"cluster={cluster}"])
            adam = tuple(composed.learner[name] for name in ("adam_beta1", "adam_beta2", "adam_eps"))
            tiny = composed.model.tiny is not None and composed.model.smol is None
            expected = (0.9, 0.99, 1e-6) if tiny else (0.9, 0.999, 1e-8)
            assert tuple(map(float, adam)) == expected, (model, cluster)


def test_a_cluster_selects_gpu_engines_but_overrides_win() -> None:
    config = load(["cluster=one_node", "rollout.max_tokens=5"])
    assert (config.rollout.gpus_per_actor, config.learner.zero_stage, config.rollout.max_tokens) == (1, 2, 5)
    assert load(["cluster=one_node", "rollout=hf"]).rollout.engine == "hf"


def test_the_constant_beta_of_grpo_is_one_key() -> None:
    assert load(["algo=grpo", "algo.kl.beta_min=0.01"]).algo.kl.beta_max == 0.01


def test_an_integer_is_converted_where_a_float_is_expected() -> None:
    config = load(["rollout.temperature=1", "learner.lr='1e-6'", "learner.weight_decay=1e-2"])
    assert isinstance(config.rollout.temperature, float)
    assert config.learner.lr == 1e-6
    assert config.learner.weight_decay == 0.01


def test_home_is_expanded_in_paths() -> None:
    config = load(['run.dir="~/runs"', 'model.path="~/model"'])
    assert config.run.dir == str(Path.home() / "runs")
    assert config.model.path == str(Path.home() / "model")
    assert not config.run.cache_dir.startswith("~")


def test_all_problems_are_in_one_report() -> None:
    overrides = [
        "algo.gruop_size=4",
        "train.steps=many",
        "model=large",
        "train",
        "learner.lr=nan",
        "rollout.threads=1.5",
    ]
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    assert len(caught.value.problems) == len(overrides)
    assert str(caught.value).startswith("6 problems in the configuration:\n\nalgo.gruop_size = 4 (command line)\n")


def test_bad_overrides_are_dropped_and_the_rest_is_loaded() -> None:
    config, problems = read(["algo.gruop_size=4", "train.steps=many", "algo.group_size=6"])
    assert config is not None
    assert (config.algo.group_size, config.train.steps) == (6, 200)
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("beta_min=0.1", "Did you mean algo.kl.beta_min?"),
        ("algoo.group_size=3", "Did you mean algo.group_size?"),
        ("xyzzy=1", "unknown key Top-level keys: mode, run, train"),
        ("train={steps: 3, stpes: 4}", "train.stpes = 4 (command line) unknown key Did you mean train.steps?"),
        ("train.steps.more=3", "train.steps is a single value"),
        ("train.steps=2e2", "train.steps = 200.0 (command line) must be an integer Write 200."),
        ("train.steps=true", "train.steps = true (command line) must be an integer"),
        ("rollout.enforce_eager=1", "must be true or false"),
        ("wandb.project=2024", "must be a string Quote it: 'wandb.project=\"2024\"'"),
        ("run.dir=null", "must be a string Give it a value, or remove the override to use the default."),
        ("cluster.num_cpus=two", "must be an integer or null"),
        ("model.tiny=small", "model.tiny = small (command line) is a section"),
        ("learner.lr=[1, 2]", "learner.lr = [1, 2] (command line) must be a finite number"),
        ("~train.seed", "deletes a key"),
        ("+train.seed=4", "Write it without the plus: train.seed=4"),
        ("algo.name='${nowhere}'", "algo.name (command line) cannot be resolved"),
        ("=3", "is not of the form group=name or a.b=value"),
    ],
)
def test_a_report_names_the_problem_and_the_remedy(override: str, words: str) -> None:
    text = report([override])
    assert words in text
    assert text.startswith("1 problem in")


def test_null_is_accepted_only_where_the_schema_allows_it() -> None:
    assert load(["model.path=null", "cluster.num_cpus=null"]).cluster.num_cpus is None
    assert "eval.every = null" in report(["eval.every=null"])


def test_an_unknown_key_in_a_conf_file_is_traced_to_it(custom_conf: Path) -> None:
    (custom_conf / "algo" / "mine.yaml").write_text("defaults: [grpo, _self_]\nclip_epz: 0.3\n")
    text = report(["algo=mine"], custom_conf)
    assert "algo.clip_epz = 0.3 (conf/algo/mine.yaml) unknown key Did you mean algo.clip_eps?" in text


def test_a_misspelled_key_in_a_conf_file_is_one_problem(custom_conf: Path) -> None:
    file = custom_conf / "algo" / "gspo.yaml"
    file.write_text(file.read_text().replace("clip_eps:", "clip_epz:"))
    assert report(["algo=gspo"], custom_conf).startswith("1 problem in")


def test_a_section_in_a_conf_file_gets_the_other_defaults(custom_conf: Path) -> None:
    text = "defaults: [counting, _self_]\nname: mine\ntest:\n  source: jsonl\n  files:\n    path: some.jsonl\n"
    (custom_conf / "data" / "mine.yaml").write_text(text)
    files = load(["data=mine"], custom_conf).data.test.files
    assert files == FilesConfig(path="some.jsonl")
    assert files.columns.question == "problem"


def test_only_the_smol_option_sets_its_section() -> None:
    assert load([]).model.smol is None
    smol = load(["model=smol", "model.smol.warm_steps=3"]).model.smol
    assert smol == SmolConfig(warm_steps=3)


def test_a_default_that_breaks_a_rule_is_named_as_default() -> None:
    source = SimpleNamespace(path=str(conf_dir()), schema="file")
    runtime = SimpleNamespace(config_sources=[source], choices={"rollout": "vllm_gpu", "cluster": "one_gpu"})
    origin = origins(cast("RuntimeConf", runtime), ["train={steps: 3}"])
    assert origin("rollout.balance") == "default"
    assert origin("rollout.sleep") == "conf/cluster/one_gpu.yaml"
    assert origin("train.steps") == "command line"


def test_a_wrong_type_is_traced_to_the_conf_file_that_sets_it(custom_conf: Path) -> None:
    vllm, one_gpu = custom_conf / "rollout" / "vllm.yaml", custom_conf / "cluster" / "one_gpu.yaml"
    vllm.write_text(vllm.read_text() + "threads: few\n")
    one_gpu.write_text(one_gpu.read_text().replace("num_actors: 1", "num_actors: few"))
    text = report(["cluster=one_gpu"], custom_conf)
    assert "rollout.num_actors = few (conf/cluster/one_gpu.yaml)" in text
    assert "rollout.threads" not in text  # vllm_gpu overrides it
    assert "rollout.threads = few (conf/rollout/vllm.yaml)" in report([], custom_conf)


def test_a_conf_file_that_is_not_yaml_is_reported_by_name(custom_conf: Path) -> None:
    (custom_conf / "algo" / "grpo_d.yaml").write_text("name: grpo_d\nkl: [1, 2\n")
    text = report([], custom_conf)
    assert "cannot be composed" in text
    assert "grpo_d.yaml" in text


def test_an_unquoted_off_in_a_conf_file_is_not_a_string(custom_conf: Path) -> None:
    file = custom_conf / "config.yaml"
    file.write_text(file.read_text() + "wandb:\n  mode: off\n")
    assert "wandb.mode = false (conf/config.yaml) must be a string" in report([], custom_conf)


def test_the_yaml_of_a_configuration_round_trips() -> None:
    config = load(["learner.lr=1e-6", "wandb.project='on'"])
    assert yaml.safe_load(to_yaml(config)) == json.loads(json.dumps(dataclasses.asdict(config)))


def test_conf_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load([]).model.name == "tiny"


def test_a_sweep_is_the_product_of_its_values() -> None:
    jobs = sweep_jobs(["algo=grpo,grpo_d", "train.seed=range(0,2)", "train.steps=5"])
    assert len(jobs) == 4
    assert jobs[0] == ["algo=grpo", "train.seed=0", "train.steps=5"]
    assert len({tuple(job) for job in jobs}) == 4


def test_the_data_set_gives_the_warm_steps_unless_overridden() -> None:
    def steps(*overrides: str) -> int:
        tiny = load(overrides).model.tiny
        assert tiny is not None
        return tiny.warm_steps

    assert steps() == load([]).data.warm_steps
    assert steps("data=geometry") == load(["data=geometry"]).data.warm_steps != steps()
    assert steps("data.warm_steps=7") == steps("model.tiny.warm_steps=7") == 7

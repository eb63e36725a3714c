"""Rules on the configuration: each broken rule is reported alone, with key, value, rule and remedy."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from othink_ray.config import bounds
from othink_ray.config.bounds import SCHEDULES
from othink_ray.config.load import conf_dir, groups, load
from othink_ray.config.validate import Machine, detect_machine, machine_for, plan, problems
from othink_ray.core import advantages, kl, losses, lr_schedule, packing

NEEDS_FILES = ("data=clevr", "data=geoqa", "data=custom")  # options whose files the user provides
LARGE = Machine(cpus=1024, gpus=64)
SMALL = Machine(cpus=2, gpus=0)
SEPARATE_SHARES = ("rollout.gpus_per_actor=0.6", "learner.gpus_per_rank=0.6")  # too large to share one GPU


def messages(overrides: list[str], machine: Machine | None = LARGE) -> list[str]:
    return [" ".join(str(problem).split()) for problem in problems(load(overrides), machine)]


def test_the_default_run_is_valid_on_two_cores() -> None:
    assert messages([], SMALL) == []


@pytest.mark.parametrize(
    "option",
    [
        f"{group}={option}"
        for group, options in groups(conf_dir()).items()
        for option in options
        if f"{group}={option}" not in NEEDS_FILES
    ],
)
def test_every_shipped_option_is_valid_on_a_large_machine(option: str) -> None:
    assert messages([option]) == []


@pytest.mark.parametrize("option", NEEDS_FILES)
def test_a_data_set_of_files_is_valid_once_they_exist(option: str, tmp_path: Path) -> None:
    missing = messages([option])
    assert any("data.test.files.path" in message for message in missing)
    for part in ("train", "test"):
        (tmp_path / part).touch()
    paths = [f"data.test.files.path={tmp_path}/test"]
    if option == "data=custom":
        paths.append(f"data.train.files.path={tmp_path}/train")
    else:
        paths.append(f"data.test.files.image_root={tmp_path}")
    assert messages([option, *paths]) == []


def test_evaluating_an_existing_model_needs_no_training_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "test.jsonl").write_text("{}")
    overrides = ["mode=eval", "data=custom", f"data.test.files.path={tmp_path}/test.jsonl"]
    assert messages([*overrides, f"model.path={tmp_path}"]) == messages([*overrides, f"eval.models=[{tmp_path}]"]) == []
    [message] = messages(overrides)
    assert message.startswith("data.train.files.path")


CUSTOM = ["data=custom", "data.train.files.path=.", "data.test.files.path=."]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.train.files.path=nowhere/*.parquet"],
            "data.train.files.path = nowhere/*.parquet must be a file, a folder",
        ),
        (["data.test.files.image_root=nowhere"], "data.test.files.image_root = nowhere must be a folder"),
        (["data.train.source=disk", "data.train.files.path=pyproject.toml"], "a folder that save_to_disk wrote"),
        (["data.train.files.split=train"], "must be null: the source parquet does not read it"),
        (["data.train.files.subset=main"], "must be null: the source parquet does not read it"),
        (["data.test.files.stream_buffer=8"], "must be null: the source jsonl does not read it"),
        (["data.test.source=parquet", "data.test.files.stream_buffer=8"], "held-out questions are a fixed set"),
        (["data.train.files.stream_buffer=0"], "data.train.files.stream_buffer = 0 must be at least 1"),
        (["data.train.source=hub"], "data.train.files.split = null must be a split of the data set on the hub"),
        (["data.train.source=scenes", "data.train.size=8", "data.train.files=null"], "data.scenes, which is null"),
        (["data.train.source=geometry_scenes", "data.train.size=8"], "reads no files, but data.train.files is set"),
        (["data.train.size=0"], "data.train.size = 0 must be at least 1"),
        (["data.test.files.columns.image=''"], "data.test.files.columns.image = '' must be a non-empty string"),
    ],
)
def test_a_broken_rule_on_files_is_reported(overrides: list[str], words: str) -> None:
    found = messages([*CUSTOM, *overrides])
    assert [message for message in found if words in message], found
    assert len(found) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "cluster"),
    list(itertools.product(groups(conf_dir())["model"], groups(conf_dir())["cluster"])),
)
def test_every_model_is_valid_on_every_cluster(model: str, cluster: str) -> None:
    assert messages([f"model={model}", f"cluster={cluster}"]) == []


def test_one_node_needs_exactly_eight_gpus() -> None:
    assert messages(["cluster=one_node"], Machine(cpus=64, gpus=8)) == []
    assert "need 8 GPUs in total, but there are 7" in messages(["cluster=one_node"], Machine(cpus=64, gpus=7))[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mode=trian"], "mode = trian must be one of train, sft, eval, study, check Did you mean mode=train?"),
        (["algo.group_size=1"], "algo.group_size = 1 must be at least 2: the advantage compares an answer"),
        (["train.steps=0"], "train.steps = 0 must be at least 1 Set train.steps=1 or more."),
        (["algo.kl.beta_min=-1"], "algo.kl.beta_min = -1 must be at least 0"),
        (
            ["algo.kl.beta_max=0.01"],
            "algo.kl.beta_max = 0.01 must be at least algo.kl.beta_min = 0.04 Raise algo.kl.beta_max",
        ),
        (["algo.kl.schedule=constant"], "the schedule constant has one value"),
        (["algo.kl.schedule=exponential", "algo.kl.beta_min=0"], "the schedule exponential is multiplicative"),
        (["algo.kl.explore_frac=1.5"], "algo.kl.explore_frac = 1.5 must be between 0 and 1"),
        (["algo.clip_eps=1"], "algo.clip_eps = 1 must be greater than 0 and less than 1"),
        (["algo.clip_eps_high=0"], "algo.clip_eps_high = 0 must be greater than 0"),
        (["algo.advantage=mean"], "must be one of group_std, group_mean, leave_one_out, batch_std"),
        (["algo.loss=gsop"], "algo.loss = gsop must be one of grpo, gspo Did you mean algo.loss=gspo?"),
        (["algo.loss=sft"], "algo.loss = sft must be one of grpo, gspo"),
        (["algo.loss_weights=tokens_mean"], "Did you mean algo.loss_weights=token_mean?"),
        (["algo.sampling_rounds=0"], "algo.sampling_rounds = 0 must be at least 1"),
        (["algo.tis=tokens"], "must be one of auto, none, token, sequence, icepop, mis_token"),
        (["algo.tis_floor=1.5"], "algo.tis_floor = 1.5 must be between 0 and 1"),
        (
            ["algo.tis_cap=0.5"],
            "algo.tis_cap = 0.5 must be at least 1: a ratio of 1 (policy equals sampler)",
        ),
        (["algo.kl.estimator=k4"], "algo.kl.estimator = k4 must be one of k1, k2, k3"),
        (["algo.kl.schedule=acuracy"], "Did you mean algo.kl.schedule=accuracy?"),
        (["algo.kl.target=0"], "algo.kl.target = 0 must be greater than 0"),
        (["algo.kl.adapt_rate=1.5"], "algo.kl.adapt_rate = 1.5 must be greater than 0 and at most 1"),
        (["algo.kl.schedule=target", "algo.kl.beta_min=0"], "the schedule target is multiplicative"),
        (["algo=gspo", "train.prompts_per_step=6"], "must be a multiple of algo.updates_per_step = 4"),
        (["algo.reward.format_weight=-0.5"], "algo.reward.format_weight = -0.5 must be at least 0"),
        (["algo.reward.without_tag=last"], "must be one of strict, whole_text, last_number"),
        (["algo.reward.answer_cpu_s=0"], "algo.reward.answer_cpu_s = 0 must be greater than 0"),
        (["algo.reward.memory_mb=10"], "algo.reward.memory_mb = 10 must be at least 256 (MiB)"),
        (
            ["algo.reward.timeout_s=20"],
            "must be at least 2 x algo.group_size x algo.reward.answer_cpu_s = 32: a group in which every answer",
        ),
        (["algo.updates_per_step=3"], "must be a multiple of algo.updates_per_step = 3"),
        (["learner.world_size=3"], "gives 16 prompts to an update, which must be a multiple of learner.world_size = 3"),
        (
            ["learner.zero_stage=0"],
            "learner.zero_stage = 0 must be a ZeRO stage: 1 (optimizer states), 2 (+ gradients) or 3",
        ),
        (["learner.lr=0"], "learner.lr = 0 must be greater than 0"),
        (["learner.adam_beta2=1"], "learner.adam_beta2 = 1 must be at least 0 and less than 1"),
        (["rollout.engine=vlm"], "Did you mean rollout.engine=vllm?"),
        (["rollout.temperature=0"], "rollout.temperature = 0 must be greater than 0"),
        (["rollout.max_tokens=256"], "rollout.max_tokens = 256 must be less than rollout.max_model_len = 256"),
        (["rollout.gpus_per_actor=2"], "must be at most 1: one process uses one GPU"),
        (["weights.transport=nccl"], "weights.transport = nccl needs GPUs on both sides"),
        (["cluster=one_gpu", "weights.transport=nccl"], "but rollout and learner share one Set weights.transport=ipc"),
        (["cluster=one_node", "weights.transport=ipc"], "needs rollout and learner on the same GPU"),
        (["cluster=one_node", "rollout.engine=hf"], "weights.transport = nccl needs rollout.engine = vllm"),
        (
            ["cluster=one_gpu", "weights.transport=auto", "rollout.num_actors=2"],
            "rollout.num_actors = 2 weights.transport=ipc needs one engine per learner rank",
        ),
        (
            ["cluster=one_gpu", "weights.transport=auto", *SEPARATE_SHARES],
            "rollout.sleep = true needs vLLM and the learner",
        ),
        (
            ["cluster=one_node_colocated", "rollout.gpus_per_actor=0.25", "learner.gpus_per_rank=0.25"],
            "learner.gpus_per_rank = 0.25 lets two ranks share a GPU",
        ),
        (["cluster=one_node", "learner.gpus_per_rank=0.5"], "learner.gpus_per_rank = 0.5 lets two ranks"),
        (
            ["cluster=one_node_colocated", "rollout.num_actors=4"],
            "rollout.num_actors = 4 weights.transport=ipc needs one engine per learner rank",
        ),
        (
            ["cluster=one_node", "rollout.tensor_parallel=2"],
            "gpus_per_actor = 1 must equal rollout.tensor_parallel = 2",
        ),
        (["rollout=hf", "rollout.tensor_parallel=2"], "only rollout.engine=vllm supports tensor parallelism"),
        (["rollout.tensor_parallel=0"], "rollout.tensor_parallel = 0 must be at least 1"),
        (["rollout.kv_cache_gb=0"], "rollout.kv_cache_gb = 0 must be at least 1"),
        (["cluster=one_node", "rollout.sleep=true"], "rollout.sleep = true needs vLLM and the learner on the same GPU"),
        (["cluster=one_gpu", "train.overlap=true"], "rollout.sleep = true must be false with train.overlap = true"),
        (["cluster.wait_s=-1"], "cluster.wait_s = -1 must be at least 0"),
        (["weights.audit_tolerance=0"], "weights.audit_tolerance = 0 must be greater than 0"),
        (["eval.questions=257"], "eval.questions = 257 must be at most data.test.size = 256"),
        (["data.scenes.max_items=10"], "data.scenes.max_items = 10 must be at most 9"),
        (["data.scenes.max_items=0"], "data.scenes.max_items = 0 must be at least 1"),
        (["data.test.size=null"], "data.test.size = null must be a number"),
        (
            ["data.test.source=parquet"],
            "data.test.files = null must be a section: data.test.source = parquet reads files",
        ),
        (["data.train.source=scnes"], "Did you mean data.train.source=scenes?"),
        (["data=geometry", "data.train.source=scenes"], "data.train.source = scenes needs the section data.scenes"),
        (["data.task=poetry"], "data.task = poetry must be one of counting, geometry"),
        (["data.on_bad_row=ignore"], "must be one of drop, stop"),
        (["model.dtype=float16"], "must be one of float32, bfloat16"),
        (["model.tiny=null"], "model.path = null builds the tiny model, but model.tiny"),
        (["model.path=/nowhere/model"], "/nowhere/model is none of these"),
        (["model.path=tests/no-such-run"], "tests/no-such-run is none of these"),
        (["mode=eval", "eval.models=[./nothing]"], "./nothing is none of these"),
        (["eval.also=[geometri]"], "there is no geometri in the group data Did you mean geometry?"),
        (["eval.also=[counting]"], "names counting, which is evaluated already"),
        (["eval.also=[geometry,geometry]"], "names geometry, which is evaluated already"),
        (["eval.also=[custom]"], "eval.also, custom: data.test.files.path"),
        (["mode=study", "study.experiments=[alfa]"], "study.experiments = alfa unknown experiment Did you mean alpha?"),
        (["mode=study", "study.betas=[]"], "study.betas = [] must list at least one number, and none below 0"),
        (
            ["mode=study", "study.alphas=[-1]"],
            "study.alphas = [-1.0] must list at least one number, and none below 0",
        ),
        (["mode=study", 'study.geometry.grpo=["algo=grpo"]'], "must set algo.kl.beta_min once"),
        (["mode=study", "study.geometry.data=counting"], "must differ from study.counting.data"),
        (["learner.warmup_frac=1.0"], "must be at least 0 and less than 1, as a fraction of all steps"),
        (["learner.lr_schedule=linar"], "Did you mean learner.lr_schedule=linear?"),
        (
            ["model.tiny.text_width=100"],
            "must be a multiple of model.tiny.head_dim = 32 Set model.tiny.text_width=128.",
        ),
        (["model.tiny.head_dim=16"], "must be one of 32, 64, 128"),
        (["model.tiny.kv_heads=3"], "must divide the 4 heads"),
        (["model.tiny.vision_width=100"], "must be a multiple of 32"),
        (["model.min_pixels=500000"], "must be at most model.max_pixels = 401408"),
        (["cluster.placement=NEAR"], "must be one of PACK, SPREAD"),
        (["cluster.object_store_mb=10"], "must be at least 80"),
        (["cluster=two_nodes", "cluster.num_gpus=4"], "must be null with cluster.address = auto"),
        (["wandb.mode=on"], "must be one of off, offline, online"),
        (["run.resume=nowhere/step_3"], "run.resume = nowhere/step_3 must be auto, never or an existing folder"),
        (["learner.freeze=visoin"], "Did you mean learner.freeze=vision?"),
        (["learner.lora.rank=-1"], "learner.lora.rank = -1 must be at least 0"),
        (["learner.lora.alpha=0"], "learner.lora.alpha = 0 must be greater than 0"),
        (["learner.lora.rank=4", "learner.lora.targets=[]"], "is empty, so nothing would be trained"),
        (
            ["learner.lora.rank=4", "learner.lora.targets=[text,vision]", "learner.freeze=projector"],
            "puts adapters on vision, which learner.freeze = projector freezes",
        ),
        (["learner.lora.rank=600"], "must be at most 512, the largest that vLLM serves Set learner.lora.rank=512"),
        (
            ["cluster=one_node", "learner.lora.rank=4", "model.dtype=float32"],
            "model.dtype = float32 must be bfloat16 with learner.lora.rank > 0",
        ),
    ],
)
def test_a_broken_rule_is_reported_alone(overrides: list[str], words: str) -> None:
    found = messages(overrides)
    assert len(found) == 1, found
    assert words in found[0]


REAL = "model.path=Qwen/Qwen2-VL-2B-Instruct"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model=qwen2_vl_2b", "learner.lr=2e-4"],
            "learner.lr = 0.0002 must be at most 3e-05 with model.path",
        ),
        (["model=smol", "learner.lr=2e-4"], "learner.lr = 0.0002 must be at most 3e-05 with model = smol"),
        ([REAL, "learner.lr=1e-6"], "model = tiny is for the tiny model"),
        ([REAL, "learner.lr=1e-6", "cluster=one_node"], "model = tiny is for the tiny model"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "sft", "check"])
def test_settings_of_the_tiny_model_are_rejected_for_others(overrides: list[str], words: str, mode: str) -> None:
    found = messages([*overrides, f"mode={mode}"])
    assert len(found) == 1, found
    assert words.replace("3e-05", "5e-05" if mode == "sft" else "3e-05") in found[0]


def test_several_broken_rules_are_all_reported() -> None:
    assert len(messages(["algo.group_size=1", "train.prompts_per_step=0", "learner.lr=-1", "wandb.mode=on"])) == 4


@pytest.mark.parametrize("name", bounds.TIS_MODES)
def test_overlap_is_valid_with_any_correction_and_is_in_the_plan(name: str) -> None:
    overrides = ["train.overlap=true", f"algo.tis={name}"]
    assert messages(overrides) == []
    assert "generated while the learner updates on the previous one" in plan(load(overrides), LARGE)
    assert "generated while" not in plan(load([]), LARGE)


def test_only_a_study_may_exceed_its_own_held_out_set() -> None:
    more = ["study.counting.data=clevr", "eval.questions=754"]
    assert messages(["mode=study", *more]) == []
    assert len(messages(["mode=train", *more])) == 1


def test_lora_is_in_the_plan() -> None:
    assert "LoRA of rank 8 on text" in plan(load(["learner.lora.rank=8"]), LARGE)
    assert "LoRA" not in plan(load([]), LARGE)


def test_the_suggested_batch_size_is_valid() -> None:
    overrides = ["algo.updates_per_step=2", "learner.world_size=3"]
    assert "Set train.prompts_per_step=18." in messages(overrides)[0]
    assert messages([*overrides, "train.prompts_per_step=18"]) == []


def test_an_existing_folder_can_be_resumed(tmp_path: Path) -> None:
    assert messages([f"run.resume={tmp_path}"]) == []


def test_missing_cpus_are_reported_unless_num_cpus_overrides() -> None:
    assert "need 3 CPUs in total, but there are 2" in messages(["rollout.num_actors=5"], SMALL)[0]
    assert messages(["rollout.num_actors=5", "cluster.num_cpus=3"], SMALL) == []


def test_a_remote_cluster_is_not_checked_against_this_machine() -> None:
    config = load(["cluster=two_nodes"])
    assert machine_for(config) is None
    assert problems(config, None) == []
    assert "the Ray cluster at auto" in plan(config, None)


def test_hidden_gpus_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert detect_machine().gpus == 0


def test_only_visible_gpus_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: NVIDIA H200 (UUID: GPU-$i)"; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert detect_machine().gpus == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert detect_machine().gpus == 2


def test_schedule_choices_match_the_core() -> None:
    assert set(SCHEDULES) == set(kl.SCHEDULES)
    assert tuple(lr_schedule.LR_SCHEDULES) == bounds.LR_SCHEDULES
    assert set(bounds.ADAPTIVE_SCHEDULES) == set(kl.ADAPTIVE)


def test_algorithm_choices_match_the_core() -> None:
    assert tuple(advantages.ADVANTAGES) == bounds.ADVANTAGES
    assert set(bounds.LOSSES) == set(losses.LOSSES) - {"sft"}  # sft is a mode, not an algorithm
    assert tuple(packing.LOSS_WEIGHTS) == bounds.LOSS_WEIGHTS
    assert tuple(kl.ESTIMATORS) == bounds.ESTIMATORS
    assert tuple(losses.TIS_MODES) == bounds.TIS_MODES


@pytest.mark.parametrize("schedule", ["target", "accuracy"])
@pytest.mark.parametrize("algo", ["grpo_d", "rloo"])
def test_an_adaptive_schedule_works_with_any_algorithm(algo: str, schedule: str) -> None:
    assert messages([f"algo={algo}", f"algo.kl.schedule={schedule}", "algo.kl.beta_max=0.2"]) == []

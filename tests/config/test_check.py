"""Rules between settings."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from othink_ray.config import bounds
from othink_ray.config.bounds import SCHEDULES
from othink_ray.config.load import conf_dir, groups, load
from othink_ray.config.validate import Machine, detect_machine, machine_for, plan, problems
from othink_ray.core import advantages, kl, losses, lr_schedule, packing

NEEDS_FILES = ("data=clevr", "data=geoqa", "data=own")  # theirs are the user's to put there
LARGE = Machine(cpus=1024, gpus=64)
SMALL = Machine(cpus=2, gpus=0)
PARTS_OF_TWO = ("rollout.gpus_per_actor=0.6", "learner.gpus_per_rank=0.6")  # of a GPU each, so never of the same


def said(overrides: list[str], machine: Machine | None = LARGE) -> list[str]:
    return [" ".join(str(problem).split()) for problem in problems(load(overrides), machine)]


def test_default_run_is_sound_on_two_cores() -> None:
    assert said([], SMALL) == []


@pytest.mark.parametrize(
    "option",
    [
        f"{group}={option}"
        for group, options in groups(conf_dir()).items()
        for option in options
        if f"{group}={option}" not in NEEDS_FILES
    ],
)
def test_every_shipped_option_is_sound_on_a_large_machine(option: str) -> None:
    assert said([option]) == []


@pytest.mark.parametrize("option", NEEDS_FILES)
def test_a_data_set_of_files_is_sound_once_they_are_there(option: str, tmp_path: Path) -> None:
    missing = said([option])
    assert any("data.test.files.path" in problem for problem in missing)
    for part in ("train", "test"):
        (tmp_path / part).touch()
    here = [f"data.test.files.path={tmp_path}/test"]
    if option == "data=own":
        here.append(f"data.train.files.path={tmp_path}/train")
    else:
        here.append(f"data.test.files.image_root={tmp_path}")
    assert said([option, *here]) == []


def test_an_evaluation_of_a_model_that_is_there_needs_no_training_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "test.jsonl").write_text("{}")
    asked = ["mode=eval", "data=own", f"data.test.files.path={tmp_path}/test.jsonl"]
    assert said([*asked, f"model.path={tmp_path}"]) == said([*asked, f"eval.models=[{tmp_path}]"]) == []
    [problem] = said(asked)
    assert problem.startswith("data.train.files.path")


OWN = ["data=own", "data.train.files.path=.", "data.test.files.path=."]


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
        (["data.test.source=parquet", "data.test.files.stream_buffer=8"], "held-out questions are always the same"),
        (["data.train.files.stream_buffer=0"], "data.train.files.stream_buffer = 0 must be at least 1"),
        (["data.train.source=hub"], "data.train.files.split = null must be a split of the data set on the hub"),
        (["data.train.source=scenes", "data.train.size=8", "data.train.files=null"], "data.scenes, which is null"),
        (["data.train.source=geometry_scenes", "data.train.size=8"], "reads no files, but data.train.files is set"),
        (["data.train.size=0"], "data.train.size = 0 must be at least 1"),
        (["data.test.files.columns.image=''"], "data.test.files.columns.image = must not be empty"),
    ],
)
def test_a_broken_rule_on_files_is_the_only_problem(overrides: list[str], words: str) -> None:
    found = said([*OWN, *overrides])
    assert [problem for problem in found if words in problem], found
    assert len(found) <= 2


@pytest.mark.parametrize(
    ("model", "cluster"),
    list(itertools.product(groups(conf_dir())["model"], groups(conf_dir())["cluster"])),
)
def test_models_and_clusters_combine(model: str, cluster: str) -> None:
    assert said([f"model={model}", f"cluster={cluster}"]) == []


def test_one_node_fits_exactly_on_eight_gpus() -> None:
    assert said(["cluster=one_node"], Machine(cpus=64, gpus=8)) == []
    assert "need 8 GPUs together, but there are 7" in said(["cluster=one_node"], Machine(cpus=64, gpus=7))[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mode=trian"], "mode = trian must be one of train, sft, eval, study, check Did you mean mode=train?"),
        (["algo.group_size=1"], "algo.group_size = 1 must be at least 2: the advantage compares an answer"),
        (["train.steps=0"], "train.steps = 0 must be at least 1 Set train.steps=1 or more."),
        (["algo.kl.beta_min=-1"], "algo.kl.beta_min = -1 must be at least 0"),
        (["algo.kl.beta_max=0.01"], "algo.kl.beta_max = 0.01 must be at least algo.kl.beta_min = 0.04 Swap them"),
        (["algo.kl.schedule=constant"], "the schedule constant has one value"),
        (["algo.kl.schedule=exponential", "algo.kl.beta_min=0"], "the schedule exponential multiplies"),
        (["algo.kl.explore_frac=1.5"], "algo.kl.explore_frac = 1.5 must be between 0 and 1"),
        (["algo.clip_eps=1"], "algo.clip_eps = 1 must be more than 0 and less than 1"),
        (["algo.clip_eps_high=0"], "algo.clip_eps_high = 0 must be more than 0"),
        (["algo.advantage=mean"], "must be one of group_std, group_mean, leave_one_out, batch_std"),
        (["algo.loss=gsop"], "algo.loss = gsop must be one of grpo, gspo Did you mean algo.loss=gspo?"),
        (["algo.loss=sft"], "algo.loss = sft must be one of grpo, gspo"),
        (["algo.loss_weights=tokens_mean"], "Did you mean algo.loss_weights=token_mean?"),
        (["algo.sampling_rounds=0"], "algo.sampling_rounds = 0 must be at least 1"),
        (["algo.correction=tokens"], "must be one of auto, none, token, sequence, icepop, mis_token"),
        (["algo.correction_low=1.5"], "algo.correction_low = 1.5 must be at least 0 and at most 1"),
        (["algo.correction_cap=0.5"], "algo.correction_cap = 0.5 must be at least 1: an answer that is as likely"),
        (["algo.kl.estimator=k4"], "algo.kl.estimator = k4 must be one of k1, k2, k3"),
        (["algo.kl.schedule=acuracy"], "Did you mean algo.kl.schedule=accuracy?"),
        (["algo.kl.target=0"], "algo.kl.target = 0 must be more than 0"),
        (["algo.kl.adapt_rate=1.5"], "algo.kl.adapt_rate = 1.5 must be more than 0 and at most 1"),
        (["algo.kl.schedule=target", "algo.kl.beta_min=0"], "the schedule target multiplies"),
        (["algo=gspo", "train.prompts_per_step=6"], "must be a multiple of algo.updates_per_step = 4"),
        (["algo.reward.format_weight=-0.5"], "algo.reward.format_weight = -0.5 must be at least 0"),
        (["algo.reward.without_tag=last"], "must be one of strict, whole_text, last_number"),
        (["algo.reward.answer_cpu_s=0"], "algo.reward.answer_cpu_s = 0 must be more than 0"),
        (["algo.reward.memory_mb=10"], "algo.reward.memory_mb = 10 must be at least 256 (MiB)"),
        (
            ["algo.reward.timeout_s=20"],
            "must be at least 2 x algo.group_size x algo.reward.answer_cpu_s = 32: a group in which every answer",
        ),
        (["algo.updates_per_step=3"], "must be a multiple of algo.updates_per_step = 3"),
        (["learner.world_size=3"], "gives 16 prompts to an update, which must be a multiple of learner.world_size = 3"),
        (["learner.zero_stage=0"], "learner.zero_stage = 0 must be 1, 2 or 3"),
        (["learner.lr=0"], "learner.lr = 0 must be more than 0"),
        (["learner.adam_beta2=1"], "learner.adam_beta2 = 1 must be at least 0 and less than 1"),
        (["rollout.engine=vlm"], "Did you mean rollout.engine=vllm?"),
        (["rollout.temperature=0"], "rollout.temperature = 0 must be more than 0"),
        (["rollout.max_tokens=256"], "rollout.max_tokens = 256 must be less than rollout.max_model_len = 256"),
        (["rollout.gpus_per_actor=2"], "one process works on one device"),
        (["weights.transport=nccl"], "weights.transport = nccl needs GPUs on both sides"),
        (["cluster=one_gpu", "weights.transport=nccl"], "but rollout and learner share one Set weights.transport=ipc"),
        (["cluster=one_node", "weights.transport=ipc"], "needs rollout and learner on the same GPU"),
        (["cluster=one_node", "rollout.engine=hf"], "weights.transport = nccl needs rollout.engine = vllm"),
        (
            ["cluster=one_gpu", "weights.transport=auto", "rollout.num_actors=2"],
            "rollout.num_actors = 2 weights.transport=ipc needs an engine for each learner rank",
        ),
        (
            ["cluster=one_gpu", "weights.transport=auto", *PARTS_OF_TWO],
            "rollout.sleep = True needs vLLM and the learner",
        ),
        (
            ["cluster=one_node_colocated", "rollout.gpus_per_actor=0.25", "learner.gpus_per_rank=0.25"],
            "learner.gpus_per_rank = 0.25 lets two ranks have the same GPU",
        ),
        (["cluster=one_node", "learner.gpus_per_rank=0.5"], "learner.gpus_per_rank = 0.5 lets two ranks"),
        (
            ["cluster=one_node_colocated", "rollout.num_actors=4"],
            "rollout.num_actors = 4 weights.transport=ipc needs an engine for each learner rank",
        ),
        (
            ["cluster=one_node", "rollout.tensor_parallel=2"],
            "gpus_per_actor = 1 must be rollout.tensor_parallel = 2",
        ),
        (["rollout=hf", "rollout.tensor_parallel=2"], "only rollout.engine=vllm splits a network"),
        (["rollout.tensor_parallel=0"], "rollout.tensor_parallel = 0 must be at least 1"),
        (["rollout.kv_cache_gb=0"], "rollout.kv_cache_gb = 0 must be at least 1"),
        (["cluster=one_node", "rollout.sleep=true"], "rollout.sleep = True needs vLLM and the learner on the same GPU"),
        (["cluster=one_gpu", "train.overlap=true"], "rollout.sleep = True must be false where train.overlap = true"),
        (["cluster.wait_s=-1"], "cluster.wait_s = -1 must be at least 0"),
        (["weights.audit_tolerance=0"], "weights.audit_tolerance = 0 must be more than 0"),
        (["eval.questions=257"], "eval.questions = 257 must be at most data.test.size = 256"),
        (["data.scenes.max_items=10"], "data.scenes.max_items = 10 must be at most 9"),
        (["data.scenes.max_items=0"], "data.scenes.max_items = 0 must be at least 1"),
        (["data.test.size=null"], "data.test.size = null must be a number"),
        (["data.test.source=parquet"], "data.test.files = null is null, but data.test.source = parquet reads files"),
        (["data.train.source=scnes"], "Did you mean data.train.source=scenes?"),
        (["data=geometry", "data.train.source=scenes"], "data.train.source = scenes needs the section data.scenes"),
        (["data.task=poetry"], "data.task = poetry must be one of counting, geometry"),
        (["data.on_bad_row=ignore"], "must be one of drop, stop"),
        (["model.dtype=float16"], "must be one of float32, bfloat16"),
        (["model.tiny=null"], "model.path = null is null, so the embedded model must be made"),
        (["model.path=/nowhere/model"], "/nowhere/model is none of these"),
        (["model.path=tests/no-such-run"], "tests/no-such-run is none of these"),
        (["mode=eval", "eval.models=[./nothing]"], "./nothing is none of these"),
        (["eval.also=[geometri]"], "there is no geometri in the group data Did you mean geometry?"),
        (["eval.also=[counting]"], "names counting, which is asked already"),
        (["eval.also=[geometry,geometry]"], "names geometry, which is asked already"),
        (["eval.also=[own]"], "eval.also, own: data.test.files.path"),
        (["mode=study", "study.experiments=[alfa]"], "there is no such experiment Did you mean alpha?"),
        (["mode=study", "study.betas=[]"], "study.betas = [] must be numbers of 0 or more, at least one"),
        (["mode=study", "study.alphas=[-1]"], "study.alphas = [-1.0] must be numbers of 0 or more"),
        (["mode=study", 'study.geometry.grpo=["algo=grpo"]'], "must set algo.kl.beta_min once"),
        (["mode=study", "study.geometry.data=counting"], "must not be that of study.counting"),
        (["learner.warmup_frac=1.0"], "must be at least 0 and less than 1, as a share of all steps"),
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
        (["cluster=two_nodes", "cluster.num_gpus=4"], "must be null where cluster.address = auto"),
        (["wandb.mode=on"], "must be one of off, offline, online"),
        (["run.resume=nowhere/step_3"], "run.resume = nowhere/step_3 must be auto, never or a folder that exists"),
        (["learner.freeze=visoin"], "Did you mean learner.freeze=vision?"),
        (["learner.lora.rank=-1"], "learner.lora.rank = -1 must be at least 0"),
        (["learner.lora.alpha=0"], "learner.lora.alpha = 0 must be more than 0"),
        (["learner.lora.rank=4", "learner.lora.targets=[]"], "is empty, so nothing would be trained"),
        (
            ["learner.lora.rank=4", "learner.lora.targets=[text,vision]", "learner.freeze=projector"],
            "asks for adapters in the part vision, which learner.freeze = projector keeps as it is",
        ),
        (["learner.lora.rank=600"], "must be at most 512, which is what vLLM serves Set learner.lora.rank=512"),
        (
            ["cluster=one_node", "learner.lora.rank=4", "model.dtype=float32"],
            "model.dtype = float32 must be bfloat16 with learner.lora.rank > 0",
        ),
    ],
)
def test_broken_rule_is_the_only_problem_and_names_key_value_and_remedy(overrides: list[str], words: str) -> None:
    found = said(overrides)
    assert len(found) == 1, found
    assert words in found[0]


REAL = "model.path=Qwen/Qwen2-VL-2B-Instruct"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model=qwen2_vl_2b", "learner.lr=2e-4"],
            "learner.lr = 0.0002 must be at most 3e-05 where model.path",
        ),
        (["model=smol", "learner.lr=2e-4"], "learner.lr = 0.0002 must be at most 3e-05 where model = smol"),
        ([REAL, "learner.lr=1e-6"], "model = tiny is for the embedded model"),
        ([REAL, "learner.lr=1e-6", "cluster=one_node"], "model = tiny is for the embedded model"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "sft", "check"])
def test_a_real_model_is_not_trained_at_the_settings_of_the_embedded_one(
    overrides: list[str], words: str, mode: str
) -> None:
    found = said([*overrides, f"mode={mode}"])
    assert len(found) == 1, found
    assert words.replace("3e-05", "5e-05" if mode == "sft" else "3e-05") in found[0]


def test_several_broken_rules_are_all_named() -> None:
    assert len(said(["algo.group_size=1", "train.prompts_per_step=0", "learner.lr=-1", "wandb.mode=on"])) == 4


@pytest.mark.parametrize("name", bounds.CORRECTIONS)
def test_an_overlapped_run_is_sound_with_any_correction_and_said_to_be_one(name: str) -> None:
    overrides = ["train.overlap=true", f"algo.correction={name}"]
    assert said(overrides) == []
    assert "generated while the one before is learned" in plan(load(overrides), LARGE)
    assert "generated while" not in plan(load([]), LARGE)


def test_only_a_study_may_ask_for_more_questions_than_its_own_section_data_has() -> None:
    more = ["study.counting.data=clevr", "eval.questions=754"]
    assert said(["mode=study", *more]) == []
    assert len(said(["mode=train", *more])) == 1


def test_adapters_are_told_in_the_plan() -> None:
    assert "LoRA of rank 8 on text" in plan(load(["learner.lora.rank=8"]), LARGE)
    assert "LoRA" not in plan(load([]), LARGE)


def test_suggested_batch_is_sound() -> None:
    overrides = ["algo.updates_per_step=2", "learner.world_size=3"]
    assert "Set train.prompts_per_step=18." in said(overrides)[0]
    assert said([*overrides, "train.prompts_per_step=18"]) == []


def test_existing_folder_can_be_resumed(tmp_path: Path) -> None:
    assert said([f"run.resume={tmp_path}"]) == []


def test_missing_cpus_are_named_unless_ray_is_told_of_more() -> None:
    assert "need 3 CPUs together, but there are 2" in said(["rollout.num_actors=5"], SMALL)[0]
    assert said(["rollout.num_actors=5", "cluster.num_cpus=3"], SMALL) == []


def test_a_cluster_elsewhere_is_not_measured_against_this_machine() -> None:
    config = load(["cluster=two_nodes"])
    assert machine_for(config) is None
    assert problems(config, None) == []
    assert "the Ray cluster at auto" in plan(config, None)


def test_no_visible_gpu_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert detect_machine().gpus == 0


def test_gpus_are_counted_and_the_visible_ones_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: NVIDIA H200 (UUID: GPU-$i)"; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert detect_machine().gpus == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert detect_machine().gpus == 2


def test_schedules_known_here_are_those_of_the_core() -> None:
    assert set(SCHEDULES) == set(kl.SCHEDULES)
    assert tuple(lr_schedule.LR_SCHEDULES) == bounds.LR_SCHEDULES
    assert set(bounds.ADAPTIVE_SCHEDULES) == set(kl.ADAPTIVE)


def test_parts_of_an_algorithm_known_here_are_those_of_the_core() -> None:
    assert tuple(advantages.ADVANTAGES) == bounds.ADVANTAGES
    assert set(bounds.LOSSES) == set(losses.LOSSES) - {"sft"}  # sft is a mode, not an algorithm
    assert tuple(packing.LOSS_WEIGHTS) == bounds.LOSS_WEIGHTS
    assert tuple(kl.ESTIMATORS) == bounds.ESTIMATORS
    assert tuple(losses.CORRECTIONS) == bounds.CORRECTIONS


@pytest.mark.parametrize("schedule", ["target", "accuracy"])
@pytest.mark.parametrize("algo", ["grpo_d", "rloo"])
def test_a_stateful_schedule_goes_with_any_algorithm(algo: str, schedule: str) -> None:
    assert said([f"algo={algo}", f"algo.kl.schedule={schedule}", "algo.kl.beta_max=0.2"]) == []

"""Rules between the settings of the data: where questions come from, and what that place needs."""

from __future__ import annotations

import ast
import glob
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from othink_ray.config.bounds import EASY_VQA_SUBSETS, EXPERIMENTS, GENERATED, SOURCES
from othink_ray.config.errors import Problem, broken, value_of
from othink_ray.config.schema import Config, FilesConfig, LearnerConfig, RolloutConfig

Split = Literal["train", "test"]
# Which keys of a files section a source reads; the others must be null, so that no setting is silently idle.
READS = {
    "hub": ("subset", "split", "stream_buffer"),
    "parquet": ("stream_buffer",),
    "jsonl": (),
    "disk": ("split",),
    "easy_vqa": ("subset", "split"),
}
FETCHED = ("hub", "easy_vqa")  # sources whose files come from elsewhere when they are read
ONLY_SOME_READ = ("subset", "split", "stream_buffer")


def data_rules(config: Config) -> Iterator[Problem]:
    """What is wrong with the sources of the two parts, and with what they are asked for."""
    for split in parts_asked(config):
        yield from _part(config, split)
    scenes, size = config.data.scenes, config.data.test.size
    asked_here = config.data.test.source in GENERATED and config.mode != "study"  # a study asks in its runs
    if asked_here and size is not None and (config.eval.questions or 0) > size:
        rule = f"must be at most data.test.size = {size}: there are no more held-out questions"
        yield broken(config, "eval.questions", rule, "Lower eval.questions or raise data.test.size.")
    if scenes is not None and scenes.max_items > scenes.image_cells**2:
        cells = scenes.image_cells
        rule = f"must be at most {cells**2}: an image of {cells} x {cells} cells holds one item a cell"
        remedy = "Raise data.scenes.image_cells or lower data.scenes.max_items."
        yield broken(config, "data.scenes.max_items", rule, remedy)
    if config.data.test.files is not None and config.data.test.files.stream_buffer is not None:
        rule = "must be null: held-out questions are always the same, the first ones"
        yield broken(config, "data.test.files.stream_buffer", rule, "Set data.test.files.stream_buffer=null.")


def test_rules(config: Config) -> Iterator[Problem]:
    """What is wrong with a data set that is only asked, never trained on."""
    yield from _part(config, "test")
    files = config.data.test.files
    if files is not None and not files.path:
        rule = "is empty: a data set of files is asked along where its conf file says where they are"
        yield broken(config, "data.test.files.path", rule, f"Write it in conf/data/{config.data.name}.yaml.")


def _part(config: Config, split: Split) -> Iterator[Problem]:
    part = config.data.part(split)
    if part.source in GENERATED:
        yield from _generated(config, f"data.{split}")
    elif part.source in SOURCES:
        yield from _files(config, f"data.{split}", part.source, part.files)


def parts_asked(config: Config) -> tuple[Split, ...]:
    """An evaluation needs no training questions, unless it has to teach the embedded model first."""
    ready = config.model.path is not None or config.eval.models
    return ("test",) if config.mode == "eval" and ready else ("train", "test")


def _generated(config: Config, part: str) -> Iterator[Problem]:
    source = value_of(config, f"{part}.source")
    if value_of(config, f"{part}.files") is not None:
        rule = f"reads no files, but {part}.files is set"
        yield broken(config, f"{part}.source", rule, f"Set {part}.files=null, or choose a source of files.")
    if value_of(config, f"{part}.size") is None:
        rule = f"must be a number: the source {source} makes as many questions as it is asked for"
        yield broken(config, f"{part}.size", rule, f"Set {part}.size=256, for example.")
    if source in ("scenes", "both_scenes") and config.data.scenes is None:
        rule = "needs the section data.scenes, which is null"
        yield broken(config, f"{part}.source", rule, "Use data=counting as the start.")


def _files(config: Config, part: str, source: str, files: FilesConfig | None) -> Iterator[Problem]:
    if files is None:
        rule = f"is null, but {part}.source = {source} reads files"
        yield broken(config, f"{part}.files", rule, "Use data=own as the start: it has the keys to fill in.")
        return
    for key in ONLY_SOME_READ:
        if getattr(files, key) is not None and key not in READS[source]:
            rule = f"must be null: the source {source} does not read it"
            yield broken(config, f"{part}.files.{key}", rule, f"Set {part}.files.{key}=null.")
    if source == "easy_vqa" and files.subset not in (None, *EASY_VQA_SUBSETS):
        rule = f"must be {', '.join(EASY_VQA_SUBSETS)} or null (all questions)"
        yield broken(config, f"{part}.files.subset", rule, f"Set {part}.files.subset=open.")
    if source == "hub" and files.split is None:
        rule = "must be a split of the data set on the hub"
        yield broken(config, f"{part}.files.split", rule, f"Set {part}.files.split=train, for example.")
    if source not in FETCHED and files.path and not _exists(source, files.path):
        kind = "a folder that save_to_disk wrote" if source == "disk" else "a file, a folder or a pattern of files"
        rule = f"must be {kind}; there is none here ({Path.cwd()})"
        yield broken(config, f"{part}.files.path", rule, f"Put it there, or set {part}.files.path.")
    if files.image_root and not Path(files.image_root).is_dir():
        rule = f"must be a folder: image paths start from it; there is none here ({Path.cwd()})"
        remedy = f"Set it to null where image paths start from the folder of {part}.files.path."
        yield broken(config, f"{part}.files.image_root", rule, remedy)


def _exists(source: str, path: str) -> bool:
    if source == "disk":
        return Path(path).is_dir()
    return Path(path).exists() or bool(glob.glob(path, recursive=True))


_TAKEN = ("accuracy", "format")


def _grading(config: Config) -> Iterator[Problem]:
    reward, answers = config.algo.reward, config.algo.group_size
    least = 2 * answers * reward.answer_cpu_s
    if 0 < reward.timeout_s < least:
        rule = (
            f"must be at least 2 x algo.group_size x algo.reward.answer_cpu_s = {least:g}: a group in which every "
            "answer outstays its time, and restarts the grading process, must end before its actor is killed"
        )
        yield broken(config, "algo.reward.timeout_s", rule, f"Set algo.reward.timeout_s={least:g}.")


def _own(config: Config) -> Iterator[Problem]:
    """It is read, not run: that happens where it can be killed."""
    own, key = config.algo.reward.own, "algo.reward.own"
    if own is None:
        return
    file, _, name = own.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        rule = "must be FILE.py:FUNCTION, and there is no such file here"
        yield broken(config, key, rule, "Set algo.reward.own=my_rewards.py:brevity, for example.")
        return
    try:
        functions = {
            one.name: one.args
            for one in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(one, ast.FunctionDef)
        }
    except (SyntaxError, UnicodeDecodeError) as error:
        yield broken(config, key, f"must be Python: {error}", f"Mend {file}.")
        return
    if name not in functions:
        near = get_close_matches(name, functions, n=1)
        hint = f"Did you mean {file}:{near[0]}? " if near else ""
        yield broken(
            config, key, f"{file} defines no function {name}", f"{hint}It has: {', '.join(functions) or 'none'}."
        )
    elif name in _TAKEN:
        rule = f"{name} is the name of a reward that is there already"
        yield broken(config, key, rule, "Give the function another name.")
    elif len(functions[name].args) - len(functions[name].defaults) != 2:
        rule = f"{name} must take two arguments: a completion's text and the true answer"
        yield broken(config, key, rule, f"Write def {name}(text: str, answer: str) -> float.")


REWARD_RULES = (_grading, _own)


def paired(learner: LearnerConfig, rollout: RolloutConfig) -> bool:
    """Whether each rank shares its GPU with an engine."""
    parts = learner.gpus_per_rank, rollout.gpus_per_actor
    return min(parts) > 0 and sum(parts) <= 1


def transport_of(config: Config) -> str:
    """`auto`: CUDA IPC where engine and learner share a GPU, NCCL between GPUs, shared memory without any.

    Adapters are small, and vLLM's own transfer between GPUs knows whole weights only: shared memory.
    """
    learner, rollout = config.learner, config.rollout
    if learner.lora.rank:
        return "shared_memory"
    if config.weights.transport != "auto":
        return config.weights.transport
    if rollout.engine != "vllm" or min(rollout.gpus_per_actor, learner.gpus_per_rank) <= 0:
        return "shared_memory"
    return "ipc" if paired(learner, rollout) else "nccl"


def _transport(config: Config) -> Iterator[Problem]:
    transport, learner, rollout = transport_of(config), config.learner, config.rollout
    shares = (rollout.gpus_per_actor, learner.gpus_per_rank)
    if transport not in ("nccl", "ipc"):
        return
    if rollout.engine != "vllm":
        rule = f"needs rollout.engine = vllm, whose own transfer it is (now {rollout.engine})"
        yield broken(config, "weights.transport", rule, "Set weights.transport=auto.")
    elif min(shares) <= 0:
        rule = "needs GPUs on both sides: rollout.gpus_per_actor and learner.gpus_per_rank are {:g} and {:g}"
        remedy = "Set weights.transport=auto, or use rollout=vllm_gpu learner=deepspeed_gpu."
        yield broken(config, "weights.transport", rule.format(*shares), remedy)
    elif transport == "nccl" and paired(learner, rollout):
        rule = "needs a GPU of its own for each process, but rollout and learner share one"
        yield broken(config, "weights.transport", rule, "Set weights.transport=ipc.")
    elif transport == "ipc" and not paired(learner, rollout):
        rule = "needs rollout and learner on the same GPU, but their shares are {:g} and {:g}, more than one GPU"
        remedy = "Set weights.transport=nccl, or use cluster=one_gpu."
        yield broken(config, "weights.transport", rule.format(*shares), remedy)
    elif transport == "ipc" and rollout.num_actors != learner.world_size:
        rule = f"needs an engine for each learner rank: learner.world_size is {learner.world_size}"
        remedy = f"Set rollout.num_actors={learner.world_size}."
        yield broken(config, "rollout.num_actors", f"weights.transport=ipc {rule}", remedy)


def _ranks(config: Config) -> Iterator[Problem]:
    """Ray fills a GPU with all parts that fit, and two ranks on one GPU cannot speak NCCL with each other."""
    learner, rollout = config.learner, config.rollout
    part = learner.gpus_per_rank + (rollout.gpus_per_actor if paired(learner, rollout) else 0)
    if learner.world_size > 1 and 0 < part <= 0.5:
        rule = "lets two ranks have the same GPU, and NCCL refuses that"
        remedy = "Set it to 1, or to 0.5 with rollout.gpus_per_actor=0.5 where each rank shares its GPU with an engine."
        yield broken(config, "learner.gpus_per_rank", rule, remedy)


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    rollout = config.rollout
    processes, gpus = rollout.tensor_parallel, rollout.gpus_per_actor
    if processes > 1 and rollout.engine != "vllm":
        yield broken(
            config, "rollout.tensor_parallel", "must be 1: only rollout.engine=vllm splits a network", "Set it to 1."
        )
    elif gpus > 0 and processes > 1 and gpus != processes:
        rule = f"must be rollout.tensor_parallel = {processes}: each of its processes has a GPU of its own"
        yield broken(config, "rollout.gpus_per_actor", rule, f"Set rollout.gpus_per_actor={processes}.")
    elif gpus > 1 and processes == 1:
        rule = "must be at most 1: one process works on one device"
        remedy = f"Take more engines, rollout.num_actors, or larger ones: rollout.tensor_parallel={gpus:g}."
        yield broken(config, "rollout.gpus_per_actor", rule, remedy)


def _sleep(config: Config) -> Iterator[Problem]:
    rollout, learner = config.rollout, config.learner
    if not rollout.sleep:
        return
    if rollout.engine != "vllm" or not paired(learner, rollout):
        rule = "needs vLLM and the learner on the same GPU"
        yield broken(config, "rollout.sleep", rule, "Set rollout.sleep=false, or use cluster=one_gpu.")
    elif config.train.overlap:
        rule = "must be false where train.overlap = true: both sides work at the same time"
        yield broken(config, "rollout.sleep", rule, "Set train.overlap=false, or rollout.sleep=false.")


SEAT_RULES = (_transport, _ranks, _tensor_parallel, _sleep)


def study_rules(config: Config) -> Iterator[Problem]:
    """What is wrong with that from which the list of runs is made."""
    study = config.study
    if config.mode != "study":
        return
    for name in study.experiments:
        if name not in EXPERIMENTS:
            near = get_close_matches(name, EXPERIMENTS, n=1)
            remedy = f"{f'Did you mean {near[0]}? ' if near else ''}Options: {', '.join(EXPERIMENTS)}."
            yield Problem(subject=f"study.experiments = {name}", rule="there is no such experiment", remedy=remedy)
    for key, values in (("alpha", study.alphas), ("beta", study.betas)):
        if key in study.experiments and (not values or min(values) < 0):
            subject = f"study.{key}s = {list(values)}"
            rule = "must be numbers of 0 or more, at least one: a run is made for each"
            yield Problem(subject=subject, rule=rule, remedy=f"Set 'study.{key}s=[0,0.5,1]', for example.")
    for task_name, task in (("counting", study.counting), ("geometry", study.geometry)):
        if sum(one.startswith("algo.kl.beta_min=") for one in task.grpo) != 1:
            subject = f"study.{task_name}.grpo = [{', '.join(task.grpo)}]"
            rule = "must set algo.kl.beta_min once: the constant KL weight that GRPO-D is compared with"
            remedy = f'Set \'study.{task_name}.grpo=["algo=grpo","algo.kl.beta_min=0.04"]\'.'
            yield Problem(subject=subject, rule=rule, remedy=remedy)
    if study.counting.data == study.geometry.data:
        rule = "must not be that of study.counting: what one task does to the other needs two tasks"
        yield broken(config, "study.geometry.data", rule, "Set study.geometry.data=geometry.")

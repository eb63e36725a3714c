"""Rules between keys: data sources, rewards, weight transport and GPU shares, and studies."""

from __future__ import annotations

import ast
import glob
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from othink_ray.config.bounds import EASY_VQA_SUBSETS, EXPERIMENTS, GENERATED, SOURCES
from othink_ray.config.errors import Problem, broken, value_of
from othink_ray.config.schema import Config, FilesConfig, LearnerConfig, RewardConfig, RolloutConfig

Split = Literal["train", "test"]
# Keys of a files section that a source reads; the others must be null, so that no setting is silently ignored.
READS = {
    "hub": ("subset", "split", "stream_buffer"),
    "parquet": ("stream_buffer",),
    "jsonl": (),
    "disk": ("split",),
    "easy_vqa": ("subset", "split"),
}
FETCHED = ("hub", "easy_vqa")  # sources that are downloaded when they are read
SOURCE_KEYS = ("subset", "split", "stream_buffer")


# ---- data


def data_rules(config: Config) -> Iterator[Problem]:
    """Yield the problems of the data sources that the mode needs, and of the sizes requested from them."""
    for split in splits_needed(config):
        yield from _split(config, split)
    scenes, size = config.data.scenes, config.data.test.size
    fixed_size = config.data.test.source in GENERATED and config.mode != "study"  # the runs of a study set their data
    if fixed_size and size is not None and (config.eval.questions or 0) > size:
        rule = f"must be at most data.test.size = {size}: the held-out set has no more questions"
        yield broken(config, "eval.questions", rule, "Lower eval.questions or raise data.test.size.")
    if scenes is not None and scenes.max_items > scenes.image_cells**2:
        cells = scenes.image_cells
        rule = f"must be at most {cells**2}: an image of {cells} x {cells} cells holds one item per cell"
        remedy = "Raise data.scenes.image_cells or lower data.scenes.max_items."
        yield broken(config, "data.scenes.max_items", rule, remedy)
    if config.data.test.files is not None and config.data.test.files.stream_buffer is not None:
        rule = "must be null: held-out questions are a fixed set, not a shuffled stream"
        yield broken(config, "data.test.files.stream_buffer", rule, "Set data.test.files.stream_buffer=null.")


def eval_data_rules(config: Config) -> Iterator[Problem]:
    """Yield the problems of a data set that is only evaluated, never trained on."""
    yield from _split(config, "test")
    files = config.data.test.files
    if files is not None and not files.path:
        rule = "is empty: a data set in eval.also must name its files in its own conf file"
        yield broken(config, "data.test.files.path", rule, f"Set it in conf/data/{config.data.name}.yaml.")


def _split(config: Config, split: Split) -> Iterator[Problem]:
    part = config.data.part(split)
    if part.source in GENERATED:
        yield from _generated(config, f"data.{split}")
    elif part.source in SOURCES:
        yield from _files(config, f"data.{split}", part.source, part.files)


def splits_needed(config: Config) -> tuple[Split, ...]:
    """Return the splits that the mode reads: an evaluation needs train only if it has to build the tiny model."""
    ready = config.model.path is not None or config.eval.models
    return ("test",) if config.mode == "eval" and ready else ("train", "test")


def _generated(config: Config, part: str) -> Iterator[Problem]:
    source = value_of(config, f"{part}.source")
    if value_of(config, f"{part}.files") is not None:
        rule = f"reads no files, but {part}.files is set"
        yield broken(config, f"{part}.source", rule, f"Set {part}.files=null, or choose a source of files.")
    if value_of(config, f"{part}.size") is None:
        rule = f"must be a number: the source {source} generates that many questions"
        yield broken(config, f"{part}.size", rule, f"Set {part}.size=256, for example.")
    if source in ("scenes", "both_scenes") and config.data.scenes is None:
        rule = "needs the section data.scenes, which is null"
        yield broken(config, f"{part}.source", rule, "Start from data=counting.")


def _files(config: Config, part: str, source: str, files: FilesConfig | None) -> Iterator[Problem]:
    if files is None:
        rule = f"must be a section: {part}.source = {source} reads files"
        yield broken(config, f"{part}.files", rule, f"Start from data=custom, and set {part}.files.path.")
        return
    for key in SOURCE_KEYS:
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
        rule = f"must be {kind}, but does not exist (relative paths start from {Path.cwd()})"
        yield broken(config, f"{part}.files.path", rule, "Check the spelling of the path, or put the files there.")
    if files.image_root and not Path(files.image_root).is_dir():
        rule = f"must be a folder, but does not exist (relative paths start from {Path.cwd()})"
        remedy = (
            f"Check the spelling of the path, or set {part}.files.image_root=null if image paths are relative to the "
            f"folder of {part}.files.path."
        )
        yield broken(config, f"{part}.files.image_root", rule, remedy)


def _exists(source: str, path: str) -> bool:
    if source == "disk":
        return Path(path).is_dir()
    return Path(path).exists() or bool(glob.glob(path, recursive=True))


# ---- rewards


def _grading_time(config: Config) -> Iterator[Problem]:
    reward, answers = config.algo.reward, config.algo.group_size
    least = 2 * answers * reward.answer_cpu_s
    if 0 < reward.timeout_s < least:
        rule = (
            f"must be at least 2 x algo.group_size x algo.reward.answer_cpu_s = {least:g}: a group in which every "
            "answer times out and restarts the grading process must finish before its actor is killed"
        )
        yield broken(config, "algo.reward.timeout_s", rule, f"Set algo.reward.timeout_s={least:g}.")


def _custom_reward(config: Config) -> Iterator[Problem]:
    """Check the user's reward function by parsing its file: user code only runs in actors, which can be killed."""
    spec, key = config.algo.reward.custom, "algo.reward.custom"
    if spec is None:
        return
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        rule = f"must be FILE.py:FUNCTION, but the file does not exist (relative paths start from {Path.cwd()})"
        yield broken(config, key, rule, "Check the path and the colon, as in algo.reward.custom=my_rewards.py:brevity.")
        return
    try:
        functions = {
            node.name: node.args
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)
        }
    except (SyntaxError, UnicodeDecodeError) as error:
        yield broken(config, key, f"must be Python: {error}", f"Fix {file}.")
        return
    if name not in functions:
        near = get_close_matches(name, functions, n=1)
        hint = f"Did you mean {file}:{near[0]}? " if near else ""
        remedy = f"{hint}It has: {', '.join(functions)}." if functions else f"Define {name} in {file}."
        yield broken(config, key, f"{file} defines no function {name}", remedy)
    elif f"{name}_weight" in {field.name for field in fields(RewardConfig)}:  # each built-in reward has a weight
        rule = f"{name} is the name of a built-in reward"
        yield broken(config, key, rule, "Rename the function.")
    elif len(functions[name].args) - len(functions[name].defaults) != 2:
        rule = f"{name} must take two arguments: a completion's text and the true answer"
        yield broken(config, key, rule, f"Write def {name}(text: str, answer: str) -> float.")


REWARD_RULES = (_grading_time, _custom_reward)


# ---- weight transport and GPU shares


def colocated(learner: LearnerConfig, rollout: RolloutConfig) -> bool:
    """Return whether each learner rank shares its GPU with an engine."""
    shares = learner.gpus_per_rank, rollout.gpus_per_actor
    return min(shares) > 0 and sum(shares) <= 1


def needs_reference(config: Config) -> bool:
    """Return whether the learner needs the logprobs of a reference policy: in GRPO-D, if beta can be above 0."""
    return config.mode in ("train", "check") and config.algo.kl.beta_max > 0


def transport_of(config: Config) -> str:
    """Return the weight transport; `auto` is CUDA IPC on a shared GPU, NCCL between GPUs, shared memory without GPUs.

    LoRA adapters always use shared memory: they are small, and vLLM's GPU transfers handle full weights only.
    """
    learner, rollout = config.learner, config.rollout
    if learner.lora.rank:
        return "shared_memory"
    if config.weights.transport != "auto":
        return config.weights.transport
    if rollout.engine != "vllm" or min(rollout.gpus_per_actor, learner.gpus_per_rank) <= 0:
        return "shared_memory"
    return "ipc" if colocated(learner, rollout) else "nccl"


def _transport(config: Config) -> Iterator[Problem]:
    transport, learner, rollout = transport_of(config), config.learner, config.rollout
    shares = (rollout.gpus_per_actor, learner.gpus_per_rank)
    if transport not in ("nccl", "ipc"):
        return
    if rollout.engine != "vllm":
        rule = f"needs rollout.engine = vllm, which implements this transfer (now {rollout.engine})"
        yield broken(config, "weights.transport", rule, "Set weights.transport=auto.")
    elif min(shares) <= 0:
        rule = "needs GPUs on both sides: rollout.gpus_per_actor and learner.gpus_per_rank are {:g} and {:g}"
        remedy = "Set weights.transport=auto, or use rollout=vllm_gpu learner=deepspeed_gpu."
        yield broken(config, "weights.transport", rule.format(*shares), remedy)
    elif transport == "nccl" and colocated(learner, rollout):
        rule = "needs a separate GPU for each process, but rollout and learner share one"
        yield broken(config, "weights.transport", rule, "Set weights.transport=ipc.")
    elif transport == "ipc" and not colocated(learner, rollout):
        rule = "needs rollout and learner on the same GPU, but their shares {:g} and {:g} exceed one GPU"
        remedy = "Set weights.transport=nccl, or use cluster=one_gpu."
        yield broken(config, "weights.transport", rule.format(*shares), remedy)
    elif transport == "ipc" and rollout.num_actors != learner.world_size:
        rule = f"needs one engine per learner rank: learner.world_size is {learner.world_size}"
        remedy = f"Set rollout.num_actors={learner.world_size}."
        yield broken(config, "rollout.num_actors", f"weights.transport=ipc {rule}", remedy)


def _ranks_per_gpu(config: Config) -> Iterator[Problem]:
    """Check that no two ranks share a GPU: Ray fills a GPU with all shares that fit, and NCCL needs distinct GPUs."""
    learner, rollout = config.learner, config.rollout
    share = learner.gpus_per_rank + (rollout.gpus_per_actor if colocated(learner, rollout) else 0)
    if learner.world_size > 1 and 0 < share <= 0.5:
        rule = "lets two ranks share a GPU, which NCCL does not support"
        remedy = "Set it to 1, or to 0.5 with rollout.gpus_per_actor=0.5 if each rank shares its GPU with an engine."
        yield broken(config, "learner.gpus_per_rank", rule, remedy)


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    rollout = config.rollout
    processes, gpus = rollout.tensor_parallel, rollout.gpus_per_actor
    if processes > 1 and rollout.engine != "vllm":
        rule = "must be 1: only rollout.engine=vllm supports tensor parallelism"
        yield broken(config, "rollout.tensor_parallel", rule, "Set rollout.tensor_parallel=1.")
    elif gpus > 0 and processes > 1 and gpus != processes:
        rule = f"must equal rollout.tensor_parallel = {processes}: each of its processes uses one GPU"
        yield broken(config, "rollout.gpus_per_actor", rule, f"Set rollout.gpus_per_actor={processes}.")
    elif gpus > 1 and processes == 1:
        rule = "must be at most 1: one process uses one GPU"
        remedy = f"Raise rollout.num_actors, or set rollout.tensor_parallel={gpus:g}."
        yield broken(config, "rollout.gpus_per_actor", rule, remedy)


def _sleep(config: Config) -> Iterator[Problem]:
    rollout, learner = config.rollout, config.learner
    if not rollout.sleep:
        return
    if rollout.engine != "vllm" or not colocated(learner, rollout):
        rule = "needs vLLM and the learner on the same GPU"
        yield broken(config, "rollout.sleep", rule, "Set rollout.sleep=false, or use cluster=one_gpu.")
    elif config.train.overlap:
        rule = "must be false with train.overlap = true: engines and learner run at the same time"
        yield broken(config, "rollout.sleep", rule, "Set train.overlap=false, or rollout.sleep=false.")


PLACEMENT_RULES = (_transport, _ranks_per_gpu, _tensor_parallel, _sleep)


# ---- studies


def study_rules(config: Config) -> Iterator[Problem]:
    """Yield the problems of the keys from which the list of runs is built."""
    study = config.study
    if config.mode != "study":
        return
    for name in study.experiments:
        if name not in EXPERIMENTS:
            near = get_close_matches(name, EXPERIMENTS, n=1)
            remedy = f"{f'Did you mean {near[0]}? ' if near else ''}Options: {', '.join(EXPERIMENTS)}."
            yield Problem(subject=f"study.experiments = {name}", rule="unknown experiment", remedy=remedy)
    for key, values, example in (("alpha", study.alphas, "[0,0.5,1]"), ("beta", study.betas, "[0,0.02,0.04]")):
        if key in study.experiments and (not values or min(values) < 0):
            subject = f"study.{key}s = {list(values)}"
            rule = "must list at least one number, and none below 0: each number gives a run"
            yield Problem(subject=subject, rule=rule, remedy=f"Set 'study.{key}s={example}', for example.")
    for task_name, task in (("counting", study.counting), ("geometry", study.geometry)):
        if sum(override.startswith("algo.kl.beta_min=") for override in task.grpo) != 1:
            subject = f"study.{task_name}.grpo = [{', '.join(task.grpo)}]"
            rule = "must set algo.kl.beta_min once: the constant KL weight that GRPO-D is compared with"
            remedy = f'Set it once, such as \'study.{task_name}.grpo=["algo=grpo","algo.kl.beta_min=0.04"]\'.'
            yield Problem(subject=subject, rule=rule, remedy=remedy)
    if study.counting.data == study.geometry.data:
        rule = "must differ from study.counting.data: cross-task results need two tasks"
        yield broken(config, "study.geometry.data", rule, "Set study.geometry.data=geometry.")

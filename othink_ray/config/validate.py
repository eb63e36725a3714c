"""Validation of a whole configuration before Ray starts, so that no run fails minutes later; and its resource plan."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from othink_ray.config.bounds import FROZEN
from othink_ray.config.errors import Problem, broken, value_of
from othink_ray.config.keys import keys
from othink_ray.config.load import conf_dir, data_named, groups, unknown_option
from othink_ray.config.model_rules import model_rules
from othink_ray.config.rules import (
    PLACEMENT_RULES,
    REWARD_RULES,
    data_rules,
    eval_data_rules,
    splits_needed,
    study_rules,
)
from othink_ray.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """CPUs and GPUs that a local Ray can schedule."""

    cpus: float
    gpus: float


def detect_machine() -> Machine:
    """Return this machine's CPUs and visible GPUs, without importing torch or Ray."""
    gpus = 0
    if shutil.which("nvidia-smi"):
        try:
            listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
            gpus = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
        except subprocess.TimeoutExpired:
            gpus = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    return Machine(cpus=os.cpu_count() or 1, gpus=gpus)


def machine_for(config: Config) -> Machine | None:
    """Return the machine that the run must fit on; None with an existing Ray cluster, which knows its own resources."""
    return detect_machine() if config.cluster.address is None else None


def problems(config: Config, machine: Machine | None) -> list[Problem]:
    """Return a problem for each rule that the configuration breaks on this machine (None: an existing cluster)."""
    found = list(_bounds(config))
    for rule in CROSS_RULES:
        found += rule(config)
    if machine is not None and config.cluster.address is None:
        found += _capacity(config, machine)
    return found


# ---- single keys


def _bounds(config: Config) -> Iterator[Problem]:
    unused = () if "train" in splits_needed(config) else ("data.train.files.", "data.train.size")
    for key in keys(Config):
        value = value_of(config, key.name)
        if value is None or key.bound is None or key.name.startswith(unused) or key.bound.holds(value):
            continue
        near = get_close_matches(value, key.bound.choices, n=1) if key.bound.choices else []
        remedy = f"Did you mean {key.name}={near[0]}?" if near else key.bound.remedy.format(key=key.name)
        yield broken(config, key.name, key.bound.rule, remedy)


# ---- several keys


def _kl(config: Config) -> Iterator[Problem]:
    kl = config.algo.kl
    if kl.beta_max < kl.beta_min:
        remedy = "Raise algo.kl.beta_max, or lower algo.kl.beta_min."
        yield broken(config, "algo.kl.beta_max", f"must be at least algo.kl.beta_min = {kl.beta_min}", remedy)
    elif kl.schedule == "constant" and kl.beta_max != kl.beta_min:
        rule = f"must equal algo.kl.beta_min = {kl.beta_min}: the schedule constant has one value"
        remedy = f"Set algo.kl.beta_max={kl.beta_min}, or use algo=grpo, where algo.kl.beta_min sets both."
        yield broken(config, "algo.kl.beta_max", rule, remedy)
    if kl.schedule == "exponential" and kl.beta_min == 0:
        rule = "must be greater than 0: the schedule exponential is multiplicative and never leaves 0"
        yield broken(config, "algo.kl.beta_min", rule, "Set algo.kl.beta_min=0.001, or use the schedule linear.")
    if kl.schedule == "target" and kl.beta_min == 0:
        rule = "must be greater than 0: the schedule target is multiplicative, and with beta 0 no KL is measured"
        yield broken(config, "algo.kl.beta_min", rule, "Set algo.kl.beta_min=0.001.")


def _batches(config: Config) -> Iterator[Problem]:
    if config.mode == "eval":
        return
    prompts, updates, ranks = config.train.prompts_per_step, config.algo.updates_per_step, config.learner.world_size
    if min(prompts, updates, ranks) < 1 or prompts % (updates * ranks) == 0:
        return
    if prompts % updates:
        rule = f"must be a multiple of algo.updates_per_step = {updates}: every update gets the same number of prompts"
    else:
        rule = (
            f"gives {prompts // updates} prompts to an update, which must be a multiple of "
            f"learner.world_size = {ranks}: every rank gets the same number of prompts"
        )
    next_valid = -(-prompts // (updates * ranks)) * updates * ranks
    yield broken(config, "train.prompts_per_step", rule, f"Set train.prompts_per_step={next_valid}.")


def _lengths(config: Config) -> Iterator[Problem]:
    if config.rollout.max_tokens >= config.rollout.max_model_len:
        rule = f"must be less than rollout.max_model_len = {config.rollout.max_model_len}, which includes the prompt"
        yield broken(config, "rollout.max_tokens", rule, "Raise rollout.max_model_len or lower rollout.max_tokens.")
    if config.model.min_pixels > config.model.max_pixels:
        rule = f"must be at most model.max_pixels = {config.model.max_pixels}"
        yield broken(config, "model.min_pixels", rule, "Lower model.min_pixels, or raise model.max_pixels.")


def _eval_sets(config: Config) -> Iterator[Problem]:
    """Check the data sets in eval.also: each must exist, appear once, and satisfy the rules of the data section."""
    known = groups(conf_dir())["data"]
    subject = f"eval.also = [{', '.join(config.eval.also)}]"
    for index, name in enumerate(config.eval.also):
        if name not in known:
            yield unknown_option(subject, "data", name, known)
        elif name in (config.data.name, *config.eval.also[:index]):
            rule = f"names {name}, which is evaluated already"
            yield Problem(subject=subject, rule=rule, remedy="Remove it.")
        else:
            for problem in eval_data_rules(dataclasses.replace(config, data=data_named(name))):
                yield dataclasses.replace(problem, subject=f"eval.also, {name}: {problem.subject}")


_MAX_LORA_RANK = 512  # the largest that vLLM serves


def _lora(config: Config) -> Iterator[Problem]:
    learner = config.learner
    if learner.lora.rank < 1:
        return
    subject = f"learner.lora.targets = [{', '.join(learner.lora.targets)}]"
    if not learner.lora.targets:
        remedy = "Set learner.lora.targets=[text], or learner.lora.rank=0."
        yield Problem(subject=subject, rule="is empty, so nothing would be trained", remedy=remedy)
    if config.rollout.engine == "vllm":
        if learner.lora.rank > _MAX_LORA_RANK:
            rule = f"must be at most {_MAX_LORA_RANK}, the largest that vLLM serves"
            yield broken(config, "learner.lora.rank", rule, f"Set learner.lora.rank={_MAX_LORA_RANK}, or rollout=hf.")
        if config.rollout.gpus_per_actor > 0 and config.model.dtype == "float32":
            rule = "must be bfloat16 with learner.lora.rank > 0: vLLM has no float32 LoRA kernels for GPUs"
            yield broken(config, "model.dtype", rule, "Set model.dtype=bfloat16, or learner.lora.rank=0.")
    for part in learner.lora.targets:
        if part in FROZEN.get(learner.freeze, ()):
            rule = f"puts adapters on {part}, which learner.freeze = {learner.freeze} freezes"
            yield Problem(subject=subject, rule=rule, remedy=f"Remove {part}, or set learner.freeze=none.")


def _resume_and_resources(config: Config) -> Iterator[Problem]:
    resume = config.run.resume
    if resume not in ("", "auto", "never") and not Path(resume).is_dir():
        rule = "must be auto, never or an existing folder"
        yield broken(config, "run.resume", rule, "Give a run's checkpoints/step_N folder, or set run.resume=auto.")
    for key in ("cluster.num_cpus", "cluster.num_gpus"):
        value = value_of(config, key)
        if value is not None and value < 0:
            yield broken(config, key, "must be at least 0", f"Set {key}=null to use all of the machine.")
        elif value is not None and config.cluster.address is not None:
            rule = (
                f"must be null with cluster.address = {config.cluster.address}: a running cluster knows its resources"
            )
            yield broken(config, key, rule, f"Set {key}=null.")


CROSS_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    *(_kl, *REWARD_RULES, _batches, _lengths, data_rules),
    *(model_rules, _eval_sets, study_rules, _lora, _resume_and_resources, *PLACEMENT_RULES),
)


# ---- the machine


def _available(config: Config, machine: Machine) -> Machine:
    """Return the resources Ray is started with: the machine's, unless the cluster section overrides them."""
    cpus, gpus = config.cluster.num_cpus, config.cluster.num_gpus
    return Machine(cpus=machine.cpus if cpus is None else cpus, gpus=machine.gpus if gpus is None else gpus)


def _capacity(config: Config, machine: Machine) -> Iterator[Problem]:
    rollout, learner, available = config.rollout, config.learner, _available(config, machine)
    trains = config.mode != "eval" or "train" in splits_needed(config)
    runs = config.study.parallel if config.mode == "study" else 1
    lower = "Lower these numbers, or use a larger machine"
    cpu_shares = rollout.cpus_per_actor, learner.cpus_per_rank
    gpu_shares = rollout.gpus_per_actor, learner.gpus_per_rank
    for unit, (per_actor, per_rank), limit, remedy in (
        ("cpu", cpu_shares, available.cpus, f"{lower}."),
        ("gpu", gpu_shares, available.gpus, f"{lower}; rollout=vllm learner=deepspeed need no GPU."),
    ):
        needed = runs * (rollout.num_actors * per_actor + (learner.world_size * per_rank if trains else 0))
        if needed > limit:
            subject = (
                f"rollout.num_actors = {rollout.num_actors}, rollout.{unit}s_per_actor = {per_actor:g}, "
                f"learner.world_size = {learner.world_size}, learner.{unit}s_per_rank = {per_rank:g}"
            ) + (f", study.parallel = {runs}" if config.mode == "study" else "")
            rule = f"need {needed:g} {unit.upper()}s in total, but there are {limit:g}"
            yield Problem(subject=subject, rule=rule, remedy=remedy)


def plan(config: Config, machine: Machine | None) -> str:
    """Return the resource plan of a run: which processes get which CPUs and GPUs, and the size of a step."""
    rollout, learner, train, kl = config.rollout, config.learner, config.train, config.algo.kl
    if machine is None:
        cluster = f"the Ray cluster at {config.cluster.address}"
    else:
        available = _available(config, machine)
        cluster = f"local Ray with {available.cpus:g} CPUs and {available.gpus:g} GPUs"
    answers = train.prompts_per_step * config.algo.group_size
    lines = {
        "mode": config.mode,
        "model": f"{config.model.path or 'built locally'} ({config.model.name}, {config.model.dtype})",
        "cluster": f"{cluster}, {config.cluster.placement}",
        "rollout": f"{rollout.num_actors} x {rollout.engine}: {rollout.cpus_per_actor:g} CPUs and "
        f"{rollout.gpus_per_actor:g} GPUs each",
        "learner": f"{learner.world_size} x DeepSpeed ZeRO-{learner.zero_stage}: {learner.cpus_per_rank:g} CPUs and "
        f"{learner.gpus_per_rank:g} GPUs each"
        + (f"; LoRA of rank {learner.lora.rank} on {', '.join(learner.lora.targets)}" if learner.lora.rank else ""),
        "step": f"{train.prompts_per_step} prompts x {config.algo.group_size} answers = {answers}, "
        f"{config.algo.updates_per_step} update(s); {train.steps} steps"
        + (", each generated while the learner updates on the previous one" if train.overlap else ""),
        "algo": f"{config.algo.name}: {config.algo.loss} loss, {config.algo.advantage} advantages, "
        f"{config.algo.loss_weights} weights",
        "beta": f"{kl.schedule}, {kl.beta_min:g} to {kl.beta_max:g}",
        "run.dir": config.run.dir,
    }
    return "\n".join(f"  {name:<8} {text}" for name, text in lines.items())

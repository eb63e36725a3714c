"""Rules between settings: everything that would only fail after minutes is said at once, before Ray starts."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from othink_ray.config.bounds import BOUNDS, CHOICES, FROZEN
from othink_ray.config.errors import Problem, broken, value_of
from othink_ray.config.load import conf_dir, data_named, groups
from othink_ray.config.model_rules import model_rules
from othink_ray.config.rules import REWARD_RULES, SEAT_RULES, data_rules, parts_asked, study_rules, test_rules
from othink_ray.config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a Ray started here can hand out."""

    cpus: float
    gpus: float


def detect_machine() -> Machine:
    """This machine's CPUs and its visible GPUs, without loading torch or Ray."""
    present = 0
    if shutil.which("nvidia-smi"):
        try:
            listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
            present = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
        except subprocess.TimeoutExpired:
            present = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        present = min(present, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    return Machine(cpus=os.cpu_count() or 1, gpus=present)


def machine_for(config: Config) -> Machine | None:
    """The machine that must hold the run; None when Ray runs elsewhere and knows better."""
    return detect_machine() if config.cluster.address is None else None


def problems(config: Config, machine: Machine | None) -> list[Problem]:
    """Every broken rule of a configuration, on this machine."""
    found = [*_choices(config), *_bounds(config)]
    for rule in CROSS_RULES:
        found += rule(config)
    if machine is not None and config.cluster.address is None:
        found += _capacity(config, machine)
    return found


# ---- one key


def _choices(config: Config) -> Iterator[Problem]:
    for key, known in CHOICES.items():
        value = value_of(config, key)
        if value not in known:
            near = get_close_matches(value, known, n=1)
            hint = f"Did you mean {key}={near[0]}?" if near else f"Set {key}={known[0]}, for example."
            yield broken(config, key, f"must be one of {', '.join(known)}", hint)


def _bounds(config: Config) -> Iterator[Problem]:
    idle = "data.train." if "train" not in parts_asked(config) else None
    for bound in BOUNDS:
        for key in bound.keys:
            if idle and key.startswith(idle):
                continue
            value = value_of(config, key)
            if value is not None and not bound.holds(value):
                yield broken(config, key, bound.rule, bound.remedy.format(key=key))


# ---- several keys together


def _kl(config: Config) -> Iterator[Problem]:
    kl = config.algo.kl
    if kl.beta_max < kl.beta_min:
        remedy = "Swap them, or use another schedule."
        yield broken(config, "algo.kl.beta_max", f"must be at least algo.kl.beta_min = {kl.beta_min}", remedy)
    elif kl.schedule == "constant" and kl.beta_max != kl.beta_min:
        rule = f"must equal algo.kl.beta_min = {kl.beta_min}: the schedule constant has one value"
        remedy = f"Set algo.kl.beta_max={kl.beta_min}, or use algo=grpo, where algo.kl.beta_min sets both."
        yield broken(config, "algo.kl.beta_max", rule, remedy)
    if kl.schedule == "exponential" and kl.beta_min == 0:
        rule = "must be more than 0: the schedule exponential multiplies, and never leaves 0"
        yield broken(config, "algo.kl.beta_min", rule, "Set algo.kl.beta_min=0.001, or use the schedule linear.")
    if kl.schedule == "target" and kl.beta_min == 0:
        rule = "must be more than 0: the schedule target multiplies, and at 0 there is no KL to steer by"
        yield broken(config, "algo.kl.beta_min", rule, "Set algo.kl.beta_min=0.001.")


def _batches(config: Config) -> Iterator[Problem]:
    if config.mode == "eval":
        return
    prompts, updates, ranks = config.train.prompts_per_step, config.algo.updates_per_step, config.learner.world_size
    if min(prompts, updates, ranks) < 1 or prompts % (updates * ranks) == 0:
        return
    if prompts % updates:
        rule = f"must be a multiple of algo.updates_per_step = {updates}: each update gets as many prompts"
    else:
        rule = (
            f"gives {prompts // updates} prompts to an update, which must be a multiple of "
            f"learner.world_size = {ranks}: each rank gets as many prompts"
        )
    above = -(-prompts // (updates * ranks)) * updates * ranks
    yield broken(config, "train.prompts_per_step", rule, f"Set train.prompts_per_step={above}.")


def _lengths(config: Config) -> Iterator[Problem]:
    if config.rollout.max_tokens >= config.rollout.max_model_len:
        rule = f"must be less than rollout.max_model_len = {config.rollout.max_model_len}, which holds the prompt too"
        yield broken(config, "rollout.max_tokens", rule, "Raise rollout.max_model_len or lower rollout.max_tokens.")
    if config.model.min_pixels > config.model.max_pixels:
        rule = f"must be at most model.max_pixels = {config.model.max_pixels}"
        yield broken(config, "model.min_pixels", rule, "Swap them.")


def _examined(config: Config) -> Iterator[Problem]:
    """The further data sets: each must exist, and be as sound as the run's own."""
    known = groups(conf_dir())["data"]
    subject = f"eval.also = [{', '.join(config.eval.also)}]"
    for place, name in enumerate(config.eval.also):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            rule = f"there is no {name} in the group data"
            yield Problem(subject=subject, rule=rule, remedy=f"{hint}Options: {', '.join(known)}.")
        elif name in (config.data.name, *config.eval.also[:place]):
            rule = f"names {name}, which is asked already"
            yield Problem(subject=subject, rule=rule, remedy="Leave it out.")
        else:
            for problem in test_rules(dataclasses.replace(config, data=data_named(name))):
                yield dataclasses.replace(problem, subject=f"eval.also, {name}: {problem.subject}")


_VLLM_RANK = 512


def _lora(config: Config) -> Iterator[Problem]:
    learner = config.learner
    if learner.lora.rank < 1:
        return
    subject = f"learner.lora.targets = [{', '.join(learner.lora.targets)}]"
    if not learner.lora.targets:
        remedy = "Set learner.lora.targets=[text], or learner.lora.rank=0."
        yield Problem(subject=subject, rule="is empty, so nothing would be trained", remedy=remedy)
    if config.rollout.engine == "vllm":
        if learner.lora.rank > _VLLM_RANK:
            rule = f"must be at most {_VLLM_RANK}, which is what vLLM serves"
            yield broken(config, "learner.lora.rank", rule, f"Set learner.lora.rank={_VLLM_RANK}, or rollout=hf.")
        if config.rollout.gpus_per_actor > 0 and config.model.dtype == "float32":
            rule = "must be bfloat16 with learner.lora.rank > 0: vLLM has no other kernels for adapters on a GPU"
            yield broken(config, "model.dtype", rule, "Set model.dtype=bfloat16, or learner.lora.rank=0.")
    for part in learner.lora.targets:
        if part in FROZEN.get(learner.freeze, ()):
            rule = f"asks for adapters in the part {part}, which learner.freeze = {learner.freeze} keeps as it is"
            yield Problem(subject=subject, rule=rule, remedy=f"Leave {part} out, or set learner.freeze=none.")


def _places(config: Config) -> Iterator[Problem]:
    resume = config.run.resume
    if resume not in ("", "auto", "never") and not Path(resume).is_dir():
        rule = "must be auto, never or a folder that exists"
        yield broken(config, "run.resume", rule, "Give a run's checkpoints/step_N folder, or set run.resume=auto.")
    for key in ("cluster.num_cpus", "cluster.num_gpus"):
        value = value_of(config, key)
        if value is not None and value < 0:
            yield broken(config, key, "must be at least 0", f"Set {key}=null to use what the machine has.")
        elif value is not None and config.cluster.address is not None:
            rule = f"must be null where cluster.address = {config.cluster.address}: that cluster has its own count"
            yield broken(config, key, rule, f"Set {key}=null.")


CROSS_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    *(_kl, *REWARD_RULES, _batches, _lengths, data_rules),
    *(model_rules, _examined, study_rules, _lora, _places, *SEAT_RULES),
)


# ---- the machine


def _available(config: Config, machine: Machine) -> Machine:
    """What Ray is told to hand out: the machine, unless the cluster section says otherwise."""
    cpus, gpus = config.cluster.num_cpus, config.cluster.num_gpus
    return Machine(cpus=machine.cpus if cpus is None else cpus, gpus=machine.gpus if gpus is None else gpus)


def _capacity(config: Config, machine: Machine) -> Iterator[Problem]:
    rollout, learner, present = config.rollout, config.learner, _available(config, machine)
    lower = "Lower these numbers, or take a machine with more"
    for unit, each_actor, each_rank, there, remedy in (
        ("cpu", rollout.cpus_per_actor, learner.cpus_per_rank, present.cpus, f"{lower}."),
        (
            *("gpu", rollout.gpus_per_actor, learner.gpus_per_rank, present.gpus),
            f"{lower}; rollout=vllm learner=deepspeed need no GPU.",
        ),
    ):
        learning = 0 if config.mode == "eval" and "train" not in parts_asked(config) else learner.world_size * each_rank
        side_by_side = config.study.parallel if config.mode == "study" else 1
        needed = side_by_side * (rollout.num_actors * each_actor + learning)
        if needed > there:
            subject = (
                f"rollout.num_actors = {rollout.num_actors}, rollout.{unit}s_per_actor = {each_actor:g}, "
                f"learner.world_size = {learner.world_size}, learner.{unit}s_per_rank = {each_rank:g}"
            ) + (f", study.parallel = {side_by_side}" if config.mode == "study" else "")
            rule = f"need {needed:g} {unit.upper()}s together, but there are {there:g}"
            yield Problem(subject=subject, rule=rule, remedy=remedy)


def plan(config: Config, machine: Machine | None) -> str:
    """Who gets what, in a few lines."""
    rollout, learner, train, kl = config.rollout, config.learner, config.train, config.algo.kl
    if machine is None:
        where = f"the Ray cluster at {config.cluster.address}"
    else:
        present = _available(config, machine)
        where = f"Ray started here with {present.cpus:g} CPUs and {present.gpus:g} GPUs"
    answers = train.prompts_per_step * config.algo.group_size
    rows = {
        "mode": config.mode,
        "model": f"{config.model.path or 'made here'} ({config.model.name}, {config.model.dtype})",
        "cluster": f"{where}, {config.cluster.placement}",
        "rollout": f"{rollout.num_actors} x {rollout.engine}: {rollout.cpus_per_actor:g} CPUs and "
        f"{rollout.gpus_per_actor:g} GPUs each",
        "learner": f"{learner.world_size} x DeepSpeed ZeRO-{learner.zero_stage}: {learner.cpus_per_rank:g} CPUs and "
        f"{learner.gpus_per_rank:g} GPUs each"
        + (f"; LoRA of rank {learner.lora.rank} on {', '.join(learner.lora.targets)}" if learner.lora.rank else ""),
        "step": f"{train.prompts_per_step} prompts x {config.algo.group_size} answers = {answers}, "
        f"{config.algo.updates_per_step} update(s); {train.steps} steps"
        + (", each generated while the one before is learned" if train.overlap else ""),
        "algo": f"{config.algo.name}: {config.algo.loss} loss, {config.algo.advantage} advantages, "
        f"{config.algo.loss_weights} weights",
        "beta": f"{kl.schedule}, {kl.beta_min:g} to {kl.beta_max:g}",
        "run.dir": config.run.dir,
    }
    return "\n".join(f"  {name:<8} {text}" for name, text in rows.items())

"""mode=check's memory table: what each device holds at its peak, and which key to turn where that is too much."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from othink_ray.config.errors import Problem, value_of
from othink_ray.config.schema import Config
from othink_ray.driver.memory_plan import ENGINE_TOKENS, GIB, MemoryPlan, memory_plan
from othink_ray.engines.network_memory import (
    Activations,
    NetworkShape,
    activations,
    forward_peak,
    learner_skeleton,
    network_shape,
)

if TYPE_CHECKING:
    from othink_ray.families.base import Family

TIGHT = 0.85  # of a device: the plan is within 15 % of counted allocations
_SIDE_BY_SIDE = 8  # sequences of full length that a lower rollout.gpu_memory_utilization must leave room for
_IMAGES = 16  # at most in an engine's batch: more take no more at their peak than the text does
Settings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The devices' sizes in bytes, None where unknown, beside what is planned on them."""

    plan: MemoryPlan
    on_gpus: bool  # a device is one GPU; otherwise all processes share this machine
    device_bytes: float | None
    processes: dict[str, int]  # how many of each kind there are

    def held(self) -> dict[str, float]:
        """Bytes at the peak of each device."""
        peaks = {name: self.plan.peak(name).total for name in self.plan.devices}
        if self.on_gpus:
            return peaks
        return {"this machine": sum(peak * self.processes[name] for name, peak in peaks.items())}

    def excess(self) -> str | None:
        """The device that does not fit, if any."""
        size = self.device_bytes
        over = [name for name, held in self.held().items() if size is not None and held > size]
        return over[0] if over else None

    def tight(self) -> bool:
        """Whether a device is so full that the plan's own error decides; vLLM by itself keeps to its share."""
        size = self.device_bytes
        planned = [held for name, held in self.held().items() if name != "an engine's GPU"]
        return size is not None and max(planned) > TIGHT * size

    def starved(self) -> bool:
        """Whether vLLM's budget is too small for it to start."""
        return self.plan.engine.budget is not None and self.plan.engine.sequences < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the model's own class needs at the configuration's sizes."""

    shape: NetworkShape
    work: Activations  # of the largest micro-batch
    sampling: int  # bytes of an engine's largest batch


def measure(config: Config, family: Family) -> Measured:
    """With answers of full length."""
    from othink_ray.engines.policy import DTYPES

    network = learner_skeleton(family, config.learner, DTYPES[config.model.dtype])
    tokens, images, asked = micro_batch(config, family)
    shown = sum(family.image_token_counts(images))
    batch = max(ENGINE_TOKENS, config.rollout.max_model_len)
    # On a GPU, and where it compiles, vLLM tries a full batch when it starts.
    if config.rollout.gpus_per_actor <= 0 and config.rollout.enforce_eager:
        batch = min(batch, config.rollout.max_num_seqs * config.rollout.max_model_len)
    in_batch = min(
        batch // (shown // len(images) + 1), _IMAGES, config.rollout.max_num_seqs * config.rollout.max_images
    )
    return Measured(
        shape=network_shape(family, network),
        work=activations(family, network, tokens, images, asked),
        sampling=forward_peak(family, network, batch, images[:1] * in_batch),
    )


def plan_memory(config: Config, measured: Measured) -> Memory:
    on_gpus = config.rollout.gpus_per_actor > 0 and config.learner.gpus_per_rank > 0
    size = gpu_bytes(config) if on_gpus else host_bytes(config)
    plan = memory_plan(config, measured.shape, measured.work, measured.sampling, size if on_gpus else None)
    ranks, actors = config.learner.world_size, config.rollout.num_actors
    counts = {"a learner rank": ranks, "a learner's GPU": ranks, "a shared GPU": ranks}
    counts |= {
        "driver and Ray": 1,
        "a rollout actor": actors,
        "an engine's GPU": actors * config.rollout.tensor_parallel,
    }
    processes = {name: counts[name] for name in plan.devices}
    return Memory(plan=plan, on_gpus=on_gpus, device_bytes=size, processes=processes)


def micro_batch(config: Config, family: Family) -> tuple[int, list[bytes], int]:
    """Tokens, images and answer tokens of the largest micro-batch.

    Short answers leave room for more prompts, each with its images.
    """
    from othink_ray.families.hugging_face import black_square

    learner, rollout, answers = config.learner, config.rollout, config.algo.group_size
    prompt = rollout.max_model_len - rollout.max_tokens
    longest = prompt + rollout.max_tokens * (answers if learner.shared_prefix else 1)
    tokens = max(learner.micro_tokens, longest)
    image = black_square(int(config.model.max_pixels**0.5))
    [shown] = family.image_token_counts([image])
    shortest = shown * rollout.max_images + (answers if learner.shared_prefix else 1)
    rows = config.train.prompts_per_step * (1 if learner.shared_prefix else answers)
    rows = max(1, rows // (config.algo.updates_per_step * learner.world_size))
    fitting = max(1, min(rows, tokens // shortest))
    images = max(1, min(fitting * rollout.max_images, (tokens - 1) // max(1, shown)))
    asked = fitting * rollout.max_tokens * (answers if learner.shared_prefix else 1)
    return tokens, [image] * images, min(asked, tokens - images * shown)


def gpu_bytes(config: Config) -> float:
    """Of this machine's smallest GPU where Ray starts here and there is one, else cluster.gpu_memory_gb."""
    if config.cluster.address is None and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            listing = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout
        except subprocess.TimeoutExpired:
            listing = ""
        sizes = [int(line) for line in listing.splitlines() if line.strip().isdecimal()]
        if sizes:
            return min(sizes) * 2.0**20
    return config.cluster.gpu_memory_gb * GIB


def host_bytes(config: Config) -> float | None:
    import psutil

    return float(psutil.virtual_memory().total) if config.cluster.address is None else None


def table(memory: Memory) -> str:
    """A row for each phase of each device, in GiB, the fullest one item by item."""
    size = memory.device_bytes
    rows = [f"GiB at the peak{f'; of {size / GIB:.1f}' if size else ''}"]
    for name, phases in memory.plan.devices.items():
        fullest = memory.plan.peak(name)
        count = memory.processes[name]
        rows.append(f"    {name}" + (f", {count} of them" if count > 1 else ""))
        for phase in phases:
            share = f" ({phase.total / size:.0%})" if size else ""
            rows.append(f"      {phase.name:<9} {phase.total / GIB:7.1f}{share}")
            if phase is fullest:
                rows.append(f"        {_items(phase.uses)}")
    engine = memory.plan.engine
    if engine.budget is not None:
        rows.append(
            f"    vLLM's {engine.budget / GIB:.1f} hold {max(0, int(engine.sequences))} sequences of full length"
        )
    if memory.tight():
        rows.append("    tight: the plan is within 15 % of what is allocated")
    return "\n".join(rows)


def memory_problems(config: Config, family: Family, measured: Measured) -> Iterator[Problem]:
    """What does not fit, and the settings with which it does."""
    memory = plan_memory(config, measured)
    over = memory.excess()
    if over is None and not memory.starved():
        return
    turned = remedy(config, family, measured)
    if turned:
        advice = f"Set {' '.join(f'{key}={shown(value)}' for key, value in turned.items())}."
    else:
        advice = "Take more learner ranks (learner.world_size), larger devices or a smaller model."
    engine = memory.plan.engine
    if over is None:
        rule = (
            f"gives vLLM {(engine.budget or 0) / GIB:.1f} GiB, but with one sequence of full length it needs "
            f"{sum(engine.needs.values()) / GIB:.1f}"
        )
        subject = f"rollout.gpu_memory_utilization = {config.rollout.gpu_memory_utilization:g}"
    else:
        phases = [memory.plan.peak(name) for name in memory.plan.devices if over in (name, "this machine")]
        parts = "; ".join(f"to {phase.name} {_items(phase.uses)}" for phase in phases)
        has = (memory.device_bytes or 0) / GIB
        rule = f"needs {memory.held()[over] / GIB:.1f} GiB and has {has:.1f}: {parts} (in GiB)"
        subject = f"memory of {over}"
    yield Problem(subject=subject, rule=rule, remedy=advice)


def _items(uses: dict[str, float]) -> str:
    parts = sorted(((use, held) for use, held in uses.items() if held), key=lambda one: -one[1])
    return ", ".join(f"{use} {held / GIB:.1f}" for use, held in parts)


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def remedy(config: Config, family: Family, measured: Measured) -> Settings | None:
    """The fewest settings, in the order of what they cost, with which all fits; None where none do."""
    known = {_work_key(config): measured}
    turned: Settings = {}
    for settings in _candidates(config):
        for tried in (settings, turned | settings):
            changed = with_settings(config, tried)
            key = _work_key(changed)
            if key not in known:
                known[key] = measure(changed, family)
            tried = tried | _utilization(changed, plan_memory(changed, known[key]))
            memory = plan_memory(with_settings(config, tried), known[key])
            if memory.excess() is None and not memory.tight() and not memory.starved():
                return tried
        turned |= settings
    return None


def _work_key(config: Config) -> tuple[object, ...]:
    """The settings of `_candidates` that change what is measured."""
    learner = config.learner
    return learner.gradient_checkpointing, learner.micro_tokens, learner.lora.rank


def _candidates(config: Config) -> Iterator[Settings]:
    learner, rollout = config.learner, config.rollout
    yield {}
    if not learner.gradient_checkpointing:
        yield {"learner.gradient_checkpointing": True}
    if learner.zero_stage == 1 and learner.world_size > 1:
        yield {"learner.zero_stage": 2}
    if learner.zero_stage == 3 and learner.world_size == 1:
        yield {"learner.zero_stage": 2}
    if learner.zero_stage < 3 and learner.world_size > 1:
        yield {"learner.zero_stage": 3}
    if 0 < rollout.gpus_per_actor < 1 and not rollout.sleep and not config.train.overlap:
        yield {"rollout.sleep": True}
    yield {"learner.micro_tokens": learner.micro_tokens // 2}
    if not learner.lora.rank:
        yield {"learner.lora.rank": 16}


def _utilization(config: Config, memory: Memory) -> Settings:
    """The largest share of a GPU for vLLM with which the device fits, if it leaves room for some sequences."""
    engine, size, key = memory.plan.engine, memory.device_bytes, "rollout.gpu_memory_utilization"
    if engine.budget is None or size is None or not (memory.tight() or memory.excess() or memory.starved()):
        return {}
    least = sum(engine.needs.values()) + (_SIDE_BY_SIDE - 1) * engine.per_sequence
    generate = next(phase for phases in memory.plan.devices.values() for phase in phases if phase.name == "generate")
    most = TIGHT * size if memory.starved() else TIGHT * size - (generate.total - engine.budget)
    share = int(100 * most / size + 1e-6) / 100
    share = share if memory.starved() else min(share, config.rollout.gpu_memory_utilization)
    return {key: share} if share * size >= least else {}


def with_settings(config: Config, settings: Settings) -> Config:
    """The configuration with other values of dotted keys."""
    for key, value in settings.items():
        above, _, name = key.rpartition(".")
        section = replace(value_of(config, above), **{name: value})
        while above:
            above, _, name = above.rpartition(".")
            section = replace(value_of(config, above) if above else config, **{name: section})
        config = section
    return config

"""mode=check's memory table: the peak of each device, and settings that make a run fit."""

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
    meta_learner_network,
    network_shape,
)

if TYPE_CHECKING:
    from othink_ray.families.base import Family

TIGHT = 0.85  # fraction of a device: the plan is accurate to 15 %
_MIN_SEQUENCES = 8  # of full length, whose KV cache a lower rollout.gpu_memory_utilization must still hold
_MAX_IMAGES = 16  # in an engine's batch: the peak does not grow with more
Settings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory plan with the size of the devices in bytes, None if unknown."""

    plan: MemoryPlan
    on_gpus: bool  # a device is one GPU; if false, all processes share this machine's memory
    device_bytes: float | None
    processes: dict[str, int]  # number of devices or processes of each kind in the plan

    def peaks(self) -> dict[str, float]:
        """Return the peak of each device in bytes."""
        peaks = {name: self.plan.peak(name).total for name in self.plan.devices}
        if self.on_gpus:
            return peaks
        return {"this machine": sum(peak * self.processes[name] for name, peak in peaks.items())}

    def excess(self) -> str | None:
        """Return the first device whose peak exceeds its size, None if all fit."""
        size = self.device_bytes
        over = [name for name, peak in self.peaks().items() if size is not None and peak > size]
        return over[0] if over else None

    def tight(self) -> bool:
        """Return whether a peak exceeds 85 % of its device; GPUs with only vLLM are exempt: it keeps to its budget."""
        size = self.device_bytes
        planned = [peak for name, peak in self.peaks().items() if name != "an engine's GPU"]
        return size is not None and max(planned) > TIGHT * size

    def starved(self) -> bool:
        """Return whether vLLM's budget is too small for it to start."""
        return self.plan.engine.budget is not None and self.plan.engine.sequences < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredNetwork:
    """Memory of the model's class at the configured sizes, measured on the meta device."""

    shape: NetworkShape
    work: Activations  # of the largest micro-batch
    sampling: int  # peak bytes of a forward pass over an engine's largest batch


def measure(config: Config, family: Family) -> MeasuredNetwork:
    """Return the sizes of the model, and the bytes that its largest micro-batch and engine batch need.

    Both are measured on the meta device, with answers of full length and images of model.max_pixels.
    """
    from othink_ray.engines.policy import DTYPES

    network = meta_learner_network(family, config.learner, DTYPES[config.model.dtype])
    tokens, images, answer_tokens = micro_batch(config, family)
    image_tokens = sum(family.image_token_counts(images))
    batch = max(ENGINE_TOKENS, config.rollout.max_model_len)
    # On a GPU, and when it compiles, vLLM profiles a full batch at start.
    if config.rollout.gpus_per_actor <= 0 and config.rollout.enforce_eager:
        batch = min(batch, config.rollout.max_num_seqs * config.rollout.max_model_len)
    in_batch = min(
        batch // (image_tokens // len(images) + 1), _MAX_IMAGES, config.rollout.max_num_seqs * config.rollout.max_images
    )
    return MeasuredNetwork(
        shape=network_shape(family, network),
        work=activations(family, network, tokens, images, answer_tokens),
        sampling=forward_peak(family, network, batch, images[:1] * in_batch),
    )


def plan_memory(config: Config, measured: MeasuredNetwork) -> Memory:
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
    """Return tokens, images and answer tokens of the largest micro-batch.

    With short answers a micro-batch holds more prompts, and so more images.
    """
    from othink_ray.families.hugging_face import black_square

    learner, rollout, answers = config.learner, config.rollout, config.algo.group_size
    prompt = rollout.max_model_len - rollout.max_tokens
    longest = prompt + rollout.max_tokens * (answers if learner.shared_prefix else 1)
    tokens = max(learner.micro_tokens, longest)
    image = black_square(int(config.model.max_pixels**0.5))
    [image_tokens] = family.image_token_counts([image])
    shortest = image_tokens * rollout.max_images + (answers if learner.shared_prefix else 1)
    samples = config.train.prompts_per_step * (1 if learner.shared_prefix else answers)
    samples = max(1, samples // (config.algo.updates_per_step * learner.world_size))
    fitting = max(1, min(samples, tokens // shortest))
    images = max(1, min(fitting * rollout.max_images, (tokens - 1) // max(1, image_tokens)))
    answer_tokens = fitting * rollout.max_tokens * (answers if learner.shared_prefix else 1)
    return tokens, [image] * images, min(answer_tokens, tokens - images * image_tokens)


def gpu_bytes(config: Config) -> float:
    """Return the bytes of this machine's smallest GPU if Ray starts here and nvidia-smi lists GPUs.

    Else return those of cluster.gpu_memory_gb.
    """
    if config.cluster.address is None and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
        except subprocess.TimeoutExpired:
            listing = ""
        sizes = [int(line) for line in listing.splitlines() if line.strip().isdecimal()]
        if sizes:
            return min(sizes) * 2.0**20
    return config.cluster.gpu_memory_gb * GIB


def host_bytes(config: Config) -> float | None:
    """Return the bytes of this machine's memory if Ray starts here, else None."""
    import psutil

    return float(psutil.virtual_memory().total) if config.cluster.address is None else None


def table(memory: Memory) -> str:
    """Return the memory plan as text: for each device the GiB of each phase, and the items of its largest phase."""
    size = memory.device_bytes
    owner = "a GPU" if memory.on_gpus else "this machine"
    lines = [f"GiB at the peak{f'; {owner} has {size / GIB:.1f}' if size else ''}"]
    for name, phases in memory.plan.devices.items():
        peak = memory.plan.peak(name)
        count = memory.processes[name]
        lines.append(f"    {name}" + (f", {count} of them" if count > 1 else ""))
        for phase in phases:
            share = f" ({phase.total / size:.0%})" if size else ""
            lines.append(f"      {phase.name:<9} {phase.total / GIB:7.1f}{share}")
            if phase is peak:
                lines.append(f"        {_items(phase.uses)}")
    engine = memory.plan.engine
    if engine.budget is not None:
        lines.append(
            f"    vLLM's {engine.budget / GIB:.1f} GiB hold {max(0, int(engine.sequences))} sequences of full length"
        )
    if memory.tight():
        lines.append("    tight: the plan is accurate to 15 %, so the run may still not fit")
    return "\n".join(lines)


def memory_problems(config: Config, family: Family, measured: MeasuredNetwork) -> Iterator[Problem]:
    """Yield a problem if a device or vLLM's share of one is too small, with settings that make the run fit."""
    memory = plan_memory(config, measured)
    over = memory.excess()
    if over is None and not memory.starved():
        return
    settings = remedy(config, family, measured)
    if settings:
        advice = f"Set {' '.join(f'{key}={_format(value)}' for key, value in settings.items())}."
    else:
        advice = "Use more learner ranks (learner.world_size), larger devices or a smaller model."
    engine = memory.plan.engine
    if over is None:
        rule = (
            f"gives vLLM {(engine.budget or 0) / GIB:.1f} GiB, but the weights, a forward pass and the KV cache of "
            f"one sequence of full length need {sum(engine.needs.values()) / GIB:.1f} GiB"
        )
        subject = f"rollout.gpu_memory_utilization = {config.rollout.gpu_memory_utilization:g}"
    else:
        phases = {name: memory.plan.peak(name) for name in memory.plan.devices if over in (name, "this machine")}
        parts = "; ".join(f"{name} in phase {phase.name}: {_items(phase.uses)}" for name, phase in phases.items())
        has = (memory.device_bytes or 0) / GIB
        rule = f"needs {memory.peaks()[over] / GIB:.1f} GiB and has {has:.1f}; in GiB, {parts}"
        subject = f"memory of {over}"
    yield Problem(subject=subject, rule=rule, remedy=advice)


def _items(uses: dict[str, float]) -> str:
    parts = sorted(((use, size) for use, size in uses.items() if size), key=lambda item: -item[1])
    return ", ".join(f"{use} {size / GIB:.1f}" for use, size in parts)


def _format(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def remedy(config: Config, family: Family, measured: MeasuredNetwork) -> Settings | None:
    """Return the first settings that make the run fit, None if none do.

    Candidates are tried from the cheapest on: each alone, then together with all cheaper ones.
    """
    known = {_work_key(config): measured}
    accumulated: Settings = {}
    for settings in _candidates(config):
        for tried in (settings, accumulated | settings):
            changed = with_settings(config, tried)
            key = _work_key(changed)
            if key not in known:
                known[key] = measure(changed, family)
            tried = tried | _utilization(changed, plan_memory(changed, known[key]))
            memory = plan_memory(with_settings(config, tried), known[key])
            if memory.excess() is None and not memory.tight() and not memory.starved():
                return tried
        accumulated |= settings
    return None


def _work_key(config: Config) -> tuple[object, ...]:
    """Return the values of those settings in `_candidates` that change the measurement."""
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
    """Return rollout.gpu_memory_utilization lowered or raised so that the run fits.

    Empty if it fits already, or if the KV cache would hold fewer than `_MIN_SEQUENCES`.
    """
    engine, size, key = memory.plan.engine, memory.device_bytes, "rollout.gpu_memory_utilization"
    if engine.budget is None or size is None or not (memory.tight() or memory.excess() or memory.starved()):
        return {}
    least = sum(engine.needs.values()) + (_MIN_SEQUENCES - 1) * engine.per_sequence
    generate = next(phase for phases in memory.plan.devices.values() for phase in phases if phase.name == "generate")
    most = TIGHT * size if memory.starved() else TIGHT * size - (generate.total - engine.budget)
    share = int(100 * most / size + 1e-6) / 100
    share = share if memory.starved() else min(share, config.rollout.gpu_memory_utilization)
    return {key: share} if share * size >= least else {}


def with_settings(config: Config, settings: Settings) -> Config:
    """Return the configuration with the values of dotted keys replaced."""
    for key, value in settings.items():
        parent, _, name = key.rpartition(".")
        section = replace(value_of(config, parent), **{name: value})
        while parent:
            parent, _, name = parent.rpartition(".")
            section = replace(value_of(config, parent) if parent else config, **{name: section})
        config = section
    return config

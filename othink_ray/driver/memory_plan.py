"""Memory of every process and device, phase by phase, computed before any process starts.

DeepSpeed's bytes per weight follow its sources (0.19.8): ZeRO stage 1 in bfloat16 is its BF16_Optimizer, which holds
all float32 gradients; stage 2 holds a shard of them from the first backward pass to the optimizer step; stage 3 holds
its shard from load on. Adam's moments exist from the first step on.
"""

from __future__ import annotations

from dataclasses import dataclass

from othink_ray.config.rules import colocated, needs_reference
from othink_ray.config.schema import Config
from othink_ray.engines.network_memory import Activations, NetworkShape
from othink_ray.engines.zero_settings import REDUCE_BUCKET

GIB = 2**30
CONTEXT = 0.6 * GIB  # per process on a GPU: CUDA context, cuBLAS and NCCL workspaces; typical value, not measured
GRAPHS = 1.0 * GIB  # vLLM's CUDA graphs, which it keeps while asleep; typical value, not measured
PROCESS = 0.9 * GIB  # of a CPU process with torch and its libraries, before a model is loaded
DRIVER = 0.5 * GIB  # this and the next two are measured by `python -m benchmarks.memory`
RAY = 0.8 * GIB  # daemons and idle workers, on the driver's node
GRADER = 0.1 * GIB
LIVE_PARAMETERS = 1_000_000_000  # ZeRO-3's max_live_parameters: most parameters gathered at a time
SUB_GROUP = 1_000_000_000  # ZeRO-3's sub_group_size: weights per optimizer call
ENGINE_TOKENS = 8192  # vLLM's max_num_batched_tokens, unless rollout.max_model_len is larger
_BYTES = {"float32": 4, "bfloat16": 2}

Uses = dict[str, float]
"""Bytes by purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerMemory:
    """Bytes of one learner rank on its device."""

    resident: Uses  # from the first update on, also during generation
    updating: Uses  # in addition, at the peak of an update
    loading: float  # total at the peak of loading


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Bytes of one rollout process on its device."""

    needs: Uses  # weights, forward pass, KV cache (GPU: of one sequence of full length; CPU: rollout.kv_cache_gb)
    per_sequence: float  # KV cache of rollout.max_model_len tokens
    budget: float | None  # memory that vLLM reserves on a GPU; None on a CPU or if the GPU's size is unknown

    @property
    def sequences(self) -> float:
        """Return how many sequences of full length the KV cache holds."""
        least = sum(self.needs.values())
        return 0.0 if self.budget is None else 1 + (self.budget - least) / self.per_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The contents of one device during one phase."""

    name: str
    uses: Uses

    @property
    def total(self) -> float:
        return sum(self.uses.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The phases of each kind of device: GPUs of learner and engines, shared GPUs, or processes on CPUs."""

    learner: LearnerMemory
    engine: EngineMemory
    devices: dict[str, tuple[Phase, ...]]

    def peak(self, device: str) -> Phase:
        return max(self.devices[device], key=lambda phase: phase.total)


def _holds_reference(config: Config) -> bool:
    """Return whether ranks hold a reference network; with LoRA the reference is the policy without its adapters."""
    return needs_reference(config) and not config.learner.lora.rank


def learner_memory(config: Config, shape: NetworkShape, work: Activations) -> LearnerMemory:
    """Return the memory of one rank; `work`: activations of its largest micro-batch."""
    learner, each = config.learner, _BYTES[config.model.dtype]
    ranks, stage, trained, mixed = learner.world_size, learner.zero_stage, shape.trained, each == 2
    shard = trained / ranks
    fraction = 1 / ranks if stage == 3 else 1
    reference = each * shape.weights * fraction if _holds_reference(config) else 0
    resident: Uses = {
        "weights": each * shape.weights * fraction,
        "reference": reference,
        "float32 weights": 4 * shard,
        "Adam's moments": 8 * shard,
    }
    gradients = 4 * trained if stage == 1 else 4 * shard
    bucket = min(REDUCE_BUCKET, trained)
    if stage == 3:
        resident |= {"gradients": gradients, "gradient bucket": 4 * REDUCE_BUCKET}
        gathered = each * min(shape.weights, LIVE_PARAMETERS) if ranks > 1 else 0
        reduction = 10.0 * shape.largest if shape.largest > REDUCE_BUCKET else 8 * bucket
        step = 4 * min(shard, SUB_GROUP)
    elif stage == 2:
        gathered = 0
        alone = 8.0 * shape.largest if shape.largest > REDUCE_BUCKET and shape.head_trained else 0.0
        reduction = max(alone, each * REDUCE_BUCKET + (each + 4) * bucket * mixed)
        step = 0 if mixed else 4 * shard
    else:
        if mixed:
            resident |= {"gradients": gradients}
        gathered = 0
        reduction = each * shape.largest if mixed else each * REDUCE_BUCKET
        step = 0 if mixed else 4 * shard
    head = _head(config, shape, work.logit_tokens)
    parts = {"activations": work.peak + reduction, "logits": work.kept + head, "optimizer step": step}
    held = {} if "gradients" in resident else {"gradients": gradients}
    largest = max(parts, key=parts.__getitem__)
    moment = {"activations": {"activations": work.peak, "reduction": reduction}}.get(
        largest, {"activations": work.kept, "logits": head} if largest == "logits" else {largest: float(step)}
    )
    return LearnerMemory(
        resident=resident,
        updating={name: float(size) for name, size in (held | {"gathered layers": gathered} | moment).items()},
        loading=_loading(resident, each, shape, reference, fraction),
    )


def _loading(resident: Uses, each: int, shape: NetworkShape, reference: float, fraction: float) -> float:
    """Return the peak of loading: the full policy while it is partitioned, later the full reference in addition."""
    policy = sum(resident.values()) - reference - resident["Adam's moments"]
    return max(each * (shape.weights + shape.trained * fraction), policy + (each * shape.weights if reference else 0))


def _head(config: Config, shape: NetworkShape, answer_tokens: int) -> float:
    """Return bytes of a chunk of float32 logits with its gradient, and of the output matrix's float32 gradient."""
    rows, matrix = min(config.learner.logit_rows, answer_tokens), shape.vocabulary * shape.width
    each = _BYTES[config.model.dtype]
    chunk = 4 * rows * shape.vocabulary
    # On a GPU the matmul takes half-precision inputs; on a CPU they are cast to float32 first.
    cast = 0.5 * chunk if config.learner.gpus_per_rank > 0 else 4 * matrix * (each == 2)
    gradient = 2 * 4 * matrix if shape.head_trained else 0
    return max(2 * chunk, chunk + cast + gradient)


def engine_memory(config: Config, shape: NetworkShape, forward: float, card: float | None) -> EngineMemory:
    """Return the memory of one engine; `forward`: bytes of a forward pass over vLLM's largest batch."""
    rollout, each = config.rollout, _BYTES[config.model.dtype]
    on_gpu = rollout.gpus_per_actor > 0
    per_sequence = each * shape.kv_per_token * rollout.max_model_len / rollout.tensor_parallel
    matrix = shape.vocabulary * shape.width
    # CPU kernels work on packed copies of the matrices. With adapters the originals are dropped, except the output
    # matrix, which is cast to float32 for each matmul. Without adapters all weights are counted twice, although an
    # untied embedding is not packed.
    packed = 0 if on_gpu else matrix if config.learner.lora.rank else shape.weights
    cast = 0 if on_gpu or each == 4 else 4 * matrix
    needs: Uses = {
        "engine weights": each * (shape.weights + packed) / rollout.tensor_parallel,
        "engine activations": forward + 3.0 * 4 * rollout.max_num_seqs * shape.vocabulary + cast,
        "engine cache": per_sequence if on_gpu else rollout.kv_cache_gb * GIB,
    }
    budget = rollout.gpu_memory_utilization * card if on_gpu and card is not None else None
    return EngineMemory(needs=needs, per_sequence=per_sequence, budget=budget)


def memory_plan(
    config: Config, shape: NetworkShape, work: Activations, sampling: float, card: float | None
) -> MemoryPlan:
    """Return the plan; `work` is of a learner's largest micro-batch.

    `sampling`: bytes of a forward pass over an engine's largest batch; `card`: bytes of a GPU, None on CPUs.
    """
    learner = learner_memory(config, shape, work)
    engine = engine_memory(config, shape, sampling, card)
    return MemoryPlan(learner=learner, engine=engine, devices=_devices(config, learner, engine))


def _devices(config: Config, learner: LearnerMemory, engine: EngineMemory) -> dict[str, tuple[Phase, ...]]:
    rollout = config.rollout
    if rollout.gpus_per_actor <= 0 or config.learner.gpus_per_rank <= 0:
        graders = GRADER * config.algo.reward.actors
        return {
            "a learner rank": (Phase(name="update", uses={"process": PROCESS} | learner.resident | learner.updating),),
            "a rollout actor": (Phase(name="generate", uses={"process": PROCESS} | engine.needs),),
            "driver and Ray": (Phase(name="run", uses={"driver": DRIVER, "Ray": RAY, "graders": graders}),),
        }
    awake = {"engine": engine.budget} if engine.budget is not None else dict(engine.needs)
    graphs = {} if rollout.enforce_eager else {"CUDA graphs": GRAPHS}
    if not colocated(config.learner, rollout):
        context = {"context": CONTEXT}
        return {
            "a learner's GPU": (
                Phase(name="load", uses=context | {"learner": learner.loading}),
                Phase(name="update", uses=context | learner.resident | learner.updating),
            ),
            "an engine's GPU": (Phase(name="generate", uses=context | graphs | awake),),
        }
    both = {"contexts": 2 * CONTEXT} | graphs
    engine_with_learner = {} if rollout.sleep else awake
    return {
        "a shared GPU": (
            Phase(name="load", uses=both | engine_with_learner | {"learner": learner.loading}),
            Phase(name="generate", uses=both | awake | learner.resident),
            Phase(name="update", uses=both | engine_with_learner | learner.resident | learner.updating),
        )
    }

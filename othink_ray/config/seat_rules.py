"""Who shares a GPU, how weights travel, and the rules between the settings of both."""

from __future__ import annotations

from collections.abc import Iterator

from othink_ray.config.problem import Problem, broken
from othink_ray.config.schema import Config, LearnerConfig, RolloutConfig


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

"""Rules between the settings of who sits where: GPUs shared or not, engines on several of them, how weights travel."""

from __future__ import annotations

from collections.abc import Iterator

from othink_ray.config.problem import Problem, broken
from othink_ray.config.schema import Config


def _transport(config: Config) -> Iterator[Problem]:
    transport = config.weights.transport
    shares = (config.rollout.gpus_per_actor, config.learner.gpus_per_rank)
    if transport not in ("nccl", "ipc"):
        return
    if min(shares) <= 0:
        rule = "needs GPUs on both sides: rollout.gpus_per_actor and learner.gpus_per_rank are {:g} and {:g}"
        remedy = "Set weights.transport=auto, or use rollout=vllm_gpu learner=deepspeed_gpu."
        yield broken(config, "weights.transport", rule.format(*shares), remedy)
    elif transport == "nccl" and max(shares) < 1 and sum(shares) <= 1:
        rule = "needs a GPU of its own for each process, but rollout and learner share one"
        yield broken(config, "weights.transport", rule, "Set weights.transport=ipc.")
    elif transport == "ipc" and config.rollout.num_actors != config.learner.world_size:
        rule = f"needs an engine for each learner rank: learner.world_size is {config.learner.world_size}"
        remedy = f"Set rollout.num_actors={config.learner.world_size}."
        yield broken(config, "rollout.num_actors", f"weights.transport=ipc {rule}", remedy)
    elif transport == "ipc" and sum(shares) > 1:
        rule = "needs rollout and learner on the same GPU, but their shares are {:g} and {:g}, more than one GPU"
        remedy = "Set weights.transport=nccl, or use cluster=one_gpu."
        yield broken(config, "weights.transport", rule.format(*shares), remedy)


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
    if rollout.engine != "vllm" or not (0 < rollout.gpus_per_actor < 1 and 0 < learner.gpus_per_rank < 1):
        rule = "needs vLLM and the learner on the same GPU"
        yield broken(config, "rollout.sleep", rule, "Set rollout.sleep=false, or use cluster=one_gpu.")
    elif config.train.overlap:
        rule = "must be false where train.overlap = true: both sides work at the same time"
        yield broken(config, "rollout.sleep", rule, "Set train.overlap=false, or rollout.sleep=false.")


SEAT_RULES = (_transport, _tensor_parallel, _sleep)

"""Program of one learner rank in a separate process, as DeepSpeed needs it: runs the scenarios of a job in order.

`run_ranks` starts one such process per rank and returns their outcomes.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from othink_ray import tracing
from othink_ray.config.schema import LearnerConfig, ModelConfig
from othink_ray.engines.base import rendezvous_store
from othink_ray.engines.collate import MicroBatch
from othink_ray.types import Pack, Probe, UpdateSettings, UpdateStats

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 270  # below pytest's limit, so that the ranks' logs are shown

# [rank][update][micro-batch][packed sample] of one training step
Shares = Sequence[Sequence[Sequence[Sequence[Pack]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Inputs of one learner: load a checkpoint if given, run the steps, then save and export if given."""

    learner: LearnerConfig
    steps: Sequence[Shares] = ()
    beta: float = 0.1
    loss: str = "grpo"
    tis: str = "none"
    temperature: float = 1.0
    with_reference: bool = True
    load: Path | None = None
    save: Path | None = None
    export: Path | None = None
    probes: Sequence[Probe] = ()
    observe: bool = False
    prefetch: bool = False  # prepare the samples of each step while the update before it runs
    shares_gpu: bool = False
    rates: Sequence[float] = ()  # learning rate of each step; empty: learner.lr, with which the optimizer was created


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The network at one moment: digests of all its tensors, and the reference's logprobs of one sample's answers."""

    digests: dict[str, str]
    reference_logprobs: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Results of a scenario on one rank."""

    stats: Sequence[UpdateStats]
    weights: dict[str, NDArray[np.float32]]
    first_moments: dict[str, NDArray[np.float32]]  # Adam's: after one step the gradient times 1 - beta1
    candidate_logprobs: Sequence[NDArray[np.float32]] = field(default=())
    factors: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # of adapters, before training
    trained_factors: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # the same after training
    snapshots: Sequence[Snapshot] = field(default=())  # before and after training
    frozen: dict[str, str] = field(default_factory=dict)  # digests of the frozen weights
    prefetched: Sequence[int] = ()  # micro-batches that were prefetched for each step
    cost: Cost | None = None


@dataclass(slots=True, kw_only=True)
class Cost:
    """Work and memory of a scenario, counted from outside of the learner."""

    forwards: list[int]  # forward passes of each layer of the policy, the vision tower's first
    read: list[int] = field(default_factory=list)  # tokens of each training forward pass, from the timeline
    saved_bytes: int = 0  # tensors that autograd saved for backward
    pixels: int = 0  # micro-batches whose pixels are on the device
    peak_pixels: int = 0
    releases: list[tuple[int, int]] = field(default_factory=list)  # (optimizer steps so far, `pixels`) at each release


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Arguments of all ranks, pickled to a file."""

    model: ModelConfig
    folder: Path
    world_size: int
    port: int
    scenarios: dict[str, Scenario]


def run_ranks(
    model: ModelConfig, folder: Path, world_size: int, scenarios: dict[str, Scenario], scratch: Path
) -> list[dict[str, Outcome]]:
    """Run the scenarios on new ranks and return the outcomes by rank; a failure shows the ranks' logs."""
    scratch.mkdir(parents=True)
    store = rendezvous_store()
    job = Job(model=model, folder=folder, world_size=world_size, port=store.port, scenarios=scenarios)
    (scratch / "job").write_bytes(pickle.dumps(job))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    running = []
    for rank in range(world_size):
        with (scratch / f"log_{rank}").open("w") as log:
            command = [sys.executable, "-m", "tests.engines.learner_process", str(scratch), str(rank)]
            running.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(TIMEOUT_S) for process in running]
    finally:
        for process in running:
            process.kill()
    logs = "\n".join((scratch / f"log_{rank}").read_text()[-3000:] for rank in range(world_size))
    assert not any(codes), f"learner ranks ended with {codes}:\n{logs}"
    return [pickle.loads((scratch / f"outcomes_{rank}").read_bytes()) for rank in range(world_size)]


def run_scenario(job: Job, scenario: Scenario, rank: int) -> Outcome:
    with counted() as cost:
        return _run_scenario(job, scenario, rank, cost)


@contextmanager
def counted() -> Iterator[Cost]:
    """Count micro-batches whose pixels are on the device and bytes saved by autograd, for learners used inside."""
    from othink_ray.engines import deepspeed_learner

    cost, to_device = Cost(forwards=[]), deepspeed_learner.to_device

    def counting(*inputs: Any) -> MicroBatch:
        batch = to_device(*inputs)
        pixels = batch.images.pixels.clone()  # as a copy to another device would be
        cost.pixels += 1
        cost.peak_pixels = max(cost.peak_pixels, cost.pixels)
        weakref.finalize(pixels, freed)
        return replace(batch, images=replace(batch.images, pixels=pixels))

    def freed() -> None:
        cost.pixels -= 1

    def keep(tensor: Tensor) -> Tensor:
        cost.saved_bytes += tensor.nbytes
        return tensor

    deepspeed_learner.to_device = counting
    tracing.take_spans(keep_recording=True)
    try:
        with saved_tensors_hooks(keep, lambda kept: kept):
            yield cost
    finally:
        deepspeed_learner.to_device = to_device
        cost.read = [
            span.attributes["tokens"]
            for span in tracing.take_spans(keep_recording=False).spans
            if span.name == "forward"
        ]


def count_work(learner: Any, cost: Cost) -> None:
    """Count forward passes at their start: a recomputation for backward may stop early."""
    from othink_ray.engines import deepspeed_learner

    def started(number: int) -> None:
        cost.forwards[number] += 1

    for number, layer in enumerate(learner.family.layers(learner.engine.module.network)):
        cost.forwards.append(0)
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: started(number))
    deepspeed_learner.release_cache = lambda device: cost.releases.append((learner.engine.global_steps, cost.pixels))


def _run_scenario(job: Job, scenario: Scenario, rank: int, cost: Cost) -> Outcome:
    from othink_ray.engines.base import RendezvousInfo
    from othink_ray.engines.deepspeed_learner import DeepSpeedLearner
    from othink_ray.families import open_family
    from tests.engines.reference_training import CLIP_EPS, TIS_BOUNDS

    rendezvous = RendezvousInfo(rank=rank, world_size=job.world_size, master_address="127.0.0.1", master_port=job.port)
    learner = DeepSpeedLearner(
        scenario.learner,
        open_family(job.model, str(job.folder)),
        dtype=job.model.dtype,
        temperature=scenario.temperature,
        clip_eps=(CLIP_EPS, CLIP_EPS),
        kl_estimator="k3",
        tis_bounds=TIS_BOUNDS,
        with_reference=scenario.with_reference,
        seed=0,
        rendezvous=rendezvous,
        shares_gpu=scenario.shares_gpu,
    )
    count_work(learner, cost)
    if scenario.load:
        learner.load(scenario.load)
    snapshots = [_snapshot(learner, scenario, rank)] if scenario.observe else []
    if scenario.observe and scenario.probes:  # as in the audit of the first push; the update's stats exclude it
        learner.candidate_logprobs(scenario.probes)
    factors = _factors(learner)
    stats, prefetched = [], []
    rates = scenario.rates or [scenario.learner.lr] * len(scenario.steps)
    for number, (shares, rate) in enumerate(zip(scenario.steps, rates, strict=True)):
        before = learner.prefetcher._queue
        prefetched.append(len(before.started))
        following = (
            [shares_of_step[rank] for shares_of_step in scenario.steps[number + 1 :][:1]] if scenario.prefetch else []
        )
        with ThreadPoolExecutor() as threads:
            preparing = [threads.submit(_prepare, learner, before, shard, scenario) for shard in following]
            stats.append(
                learner.update(
                    shares[rank],
                    UpdateSettings(beta=scenario.beta, lr=rate, loss=scenario.loss, tis=scenario.tis),
                )
            )
            [future.result() for future in preparing]
    if scenario.observe:
        snapshots.append(_snapshot(learner, scenario, rank))
    if scenario.save:
        scenario.save.mkdir(exist_ok=True)
        learner.save(scenario.save)
        learner.finish_save()
    if scenario.export:
        learner.export(scenario.export)
    return Outcome(
        stats=stats,
        weights={name: weight.float().numpy().copy() for name, weight in learner.named_weights()},
        first_moments=_first_moments(learner) if stats else {},
        candidate_logprobs=learner.candidate_logprobs(scenario.probes) if scenario.probes else (),
        factors=factors,
        trained_factors=_factors(learner),
        snapshots=snapshots,
        frozen={name: _digest(weight) for name, weight in learner.frozen_weights()} if scenario.observe else {},
        prefetched=prefetched,
        cost=cost,
    )


def _prepare(learner: Any, before: Any, updates: Sequence[Sequence[Sequence[Pack]]], scenario: Scenario) -> None:
    """Prefetch as soon as the update has started and taken the earlier queue."""
    until = time.monotonic() + TIMEOUT_S
    while learner.prefetcher._queue is before and time.monotonic() < until:
        time.sleep(0.001)
    learner.prefetch(updates, UpdateSettings(beta=scenario.beta, lr=0.0, loss=scenario.loss, tis=scenario.tis))


def _whole(learner: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the network's gathered parameters by their names in it."""
    for name, parameter in learner.engine.module.network.named_parameters():
        with learner._whole([parameter]):
            yield name, parameter.detach()


def _factors(learner: Any) -> dict[str, NDArray[np.float32]]:
    return {name: weight.float().numpy().copy() for name, weight in _whole(learner) if ".lora_" in name}


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()


def _snapshot(learner: Any, scenario: Scenario, rank: int) -> Snapshot:
    digests = {name: _digest(weight) for name, weight in _whole(learner)}
    [[row, *_], *_], *_ = scenario.steps[0][rank]
    logprobs = learner._no_grad(learner.reference, learner._prepared([row], learner.prefetcher.take()))
    learner._take_encodes()
    return Snapshot(digests=digests, reference_logprobs=logprobs.numpy().copy())


def _first_moments(learner: Any) -> dict[str, NDArray[np.float32]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    moments = {}
    learner.state.link_moments()
    for name, parameter in learner.engine.module.network.named_parameters():
        if not parameter.requires_grad:
            continue
        moments[name] = safe_get_full_optimizer_state(parameter, "exp_avg").float().numpy().copy()
    return moments


def main(scratch: Path, rank: int) -> None:
    job: Job = pickle.loads((scratch / "job").read_bytes())
    outcomes = {name: run_scenario(job, scenario, rank) for name, scenario in job.scenarios.items()}
    (scratch / f"outcomes_{rank}").write_bytes(pickle.dumps(outcomes))


if __name__ == "__main__":
    from tests.engines import learner_process  # under its real name, so that other processes can unpickle the outcomes

    learner_process.main(Path(sys.argv[1]), int(sys.argv[2]))

"""Engine and learner together, as in a run: generate, sleep, learn, push and audit, step after step."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.engine_process import EngineProcess
from benchmarks.gpu.generating import CANDIDATES
from benchmarks.gpu.learner import PlainLearner
from benchmarks.gpu.learning import open_learner
from benchmarks.gpu.peaks import synchronize
from benchmarks.gpu.rows import Row, check_limit
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.shapes import questions, scored
from othink_ray.engines.base import RendezvousInfo, Sampling
from othink_ray.engines.vllm_transfer import open_sender
from othink_ray.types import Audit
from othink_ray.weights import compare, repeated

RATE = 1e-4  # large enough that each step changes the logprobs, so that the audit detects a missing push
BUCKET = 2**26
EARLY = 5  # step whose memory is compared with that of the last step
PARTS = ("generate", "sleep", "learn", "push", "audit")
_GAP, _GROWN = "gap mean", "GB more"
_SHARE = 0.5  # of the GPU's memory, for the engine


def colocated(setup: Setup) -> Iterator[Row]:
    """Engine and learner on one GPU: push by CUDA IPC, the engine sleeps while the learner works."""
    with EngineProcess(setup, transport="ipc", gpu_memory_utilization=_SHARE, sleep=True) as engine:
        yield from _train(setup, engine, "ipc", sleeps=True)


def apart(setup: Setup) -> Iterator[Row]:
    """Engine and learner on two GPUs: push by NCCL, which does not allow two processes on one device."""
    if torch.cuda.device_count() < 2:
        yield Row(setting="push by NCCL", state="skipped", error="needs two GPUs")
        return
    with EngineProcess(setup, transport="nccl", gpu=1) as engine:
        yield from _train(setup, engine, "nccl", sleeps=False)


def by_memory(setup: Setup) -> Iterator[Row]:
    """Engine and learner on one GPU: push through shared memory, which needs no CUDA IPC."""
    with EngineProcess(setup, transport="shared_memory", gpu_memory_utilization=_SHARE) as engine:
        yield from _train(setup, engine, "shared_memory", sleeps=False)


def _train(setup: Setup, engine: EngineProcess, transport: str, *, sleeps: bool) -> Iterator[Row]:
    """Run the steps; yield rows of pushes, audits, sleeping, memory and seconds per phase."""
    engine_gb = _used_gb(setup)
    learner = open_learner(setup, lr=RATE, shares_gpu=sleeps)
    push = _pusher(learner, engine, transport)
    prompts = questions(setup.groups, setup.sides[0])
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    audits: list[Audit] = []
    used: list[float] = []
    freed = 0.0

    def timed(part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = work(*arguments)
        synchronize(setup.device)
        seconds[part].append(time.perf_counter() - start)
        return result

    def learn(groups: list[Any]) -> None:
        samples = learner.packs([scored(group, seed) for seed, group in enumerate(groups)])
        learner.update([learner.batch(sample) for sample in samples])

    push(0)
    for step in range(1, setup.colocated_steps + 1):
        groups = timed("generate", engine.call, "generate", prompts, _sampling(setup))
        awake = _used_gb(setup)
        if sleeps:
            timed("sleep", engine.call, "sleep")
            freed = awake - _used_gb(setup)
        timed("learn", learn, groups)
        if step == 1 and not sleeps:
            yield _audit_row("audit before the push", _audit(setup, learner, engine, step))
        timed("push", push, step)
        audits.append(timed("audit", _audit, setup, learner, engine, step))
        used.append(_used_gb(setup))
        if step == 1:
            yield check_limit(_audit_row(f"first push by {transport}", audits[0]), _GAP, at_most=setup.gap)
    size = sum(weight.nbytes for _, weight in learner.named_weights()) / 1e9
    push_s = statistics.median(seconds["push"])
    pushed = Row(setting=f"{transport}: push", figures={"s": push_s, "GB": size, "GB/s": size / push_s})
    yield check_limit(pushed, "s", at_most=setup.push_s) if transport == "ipc" else pushed
    worst = max(audits, key=lambda audit: audit.gap_mean)
    yield check_limit(_audit_row(f"{transport}: worst of {len(audits)} audits", worst), _GAP, at_most=setup.gap)
    if sleeps:
        yield Row(
            setting="sleep; the push wakes the engine",
            figures={"GB freed": freed, "s": statistics.median(seconds["sleep"])},
        )
    early = min(EARLY, len(used))
    memory = Row(
        setting=f"{transport}: memory in use",
        figures={
            f"GB after step {early}": used[early - 1],
            f"GB after step {len(used)}": used[-1],
            _GROWN: used[-1] - used[early - 1],
            "GB of the engine": engine_gb,
            "peak GB of the learner": learner.peak_gb(),
        },
    )
    yield check_limit(memory, _GROWN, at_most=setup.grown_gb)
    yield Row(
        setting=f"{transport}: seconds per step, {setup.groups} x {setup.answers} answers",
        figures={part: statistics.median(times) for part, times in seconds.items() if times},
    )


def _pusher(learner: PlainLearner, engine: EngineProcess, transport: str) -> Callable[[int], None]:
    """Return a function that pushes the learner's weights to the engine as a given version."""
    if transport == "shared_memory":

        def push_in_memory(version: int) -> None:
            engine.call("begin_push")
            engine.call("load_weights", [(name, weight.detach().cpu()) for name, weight in learner.named_weights()])
            engine.call("finish_push", version, 1)

        return push_in_memory
    rendezvous = RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=29_500)
    sender = open_sender(
        transport,
        lambda: ((name, weight.detach()) for name, weight in learner.named_weights()),
        engine,
        rendezvous,
        port=_free_port(),
        receivers=1,
        bucket_bytes=BUCKET,
    )

    def send(version: int) -> None:
        sender.send_weights()
        learner.release_memory()
        engine.call("finish_push", version, 0)

    return send


def _free_port() -> int:
    """Return a free port for vLLM's weight transfer, which opens its own rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _sampling(setup: Setup) -> Sampling:
    return Sampling(answers=setup.answers, max_tokens=setup.tokens[0], temperature=1.0, seed=0)


def _audit(setup: Setup, learner: PlainLearner, engine: EngineProcess, version: int) -> Audit:
    sampling = Sampling(answers=1, max_tokens=4, temperature=0.0, seed=0)
    probes = engine.call("probe", questions(2, setup.sides[0]), sampling, CANDIDATES)
    return compare(probes, repeated(probes, learner.candidate_logprobs(probes)), version)


def _audit_row(setting: str, audit: Audit) -> Row:
    return Row(setting=setting, figures={_GAP: audit.gap_mean, "gap max": audit.gap_max, "tokens": audit.tokens})


def _used_gb(setup: Setup) -> float:
    """Return the device memory in use by all processes."""
    if setup.device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(setup.device)
    return (total - free) / 1e9

"""Engine and learner together: generate, sleep, learn, push and audit, step after step, as a run does."""

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
from benchmarks.gpu.peaks import settle
from benchmarks.gpu.rows import Row, judged
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.shapes import questions, scored
from othink_ray.engines.base import RendezvousInfo, Sampling
from othink_ray.engines.vllm_transfer import open_sender
from othink_ray.types import Audit
from othink_ray.weights.audit import compare, repeated

RATE = 1e-4  # each step must be seen in the logprobs: the audit tells a push from none
BUCKET = 2**26
EARLY = 5  # the step whose memory the last one's is compared with
PARTS = ("generate", "sleep", "learn", "push", "audit")
_GAP, _GROWN = "gap mean", "GB more"
_SHARE = 0.5  # of the GPU for the engine


def colocated(setup: Setup) -> Iterator[Row]:
    with EngineProcess(setup, transport="ipc", gpu_memory_utilization=_SHARE, sleep=True) as engine:
        yield from _life(setup, engine, "ipc", sleeps=True)


def apart(setup: Setup) -> Iterator[Row]:
    """NCCL has no two processes on one device."""
    if torch.cuda.device_count() < 2:
        yield Row(setting="push by NCCL", state="skipped", error="needs two GPUs")
        return
    with EngineProcess(setup, transport="nccl", gpu=1) as engine:
        yield from _life(setup, engine, "nccl", sleeps=False)


def by_memory(setup: Setup) -> Iterator[Row]:
    """The way of the weights that needs no GPU."""
    with EngineProcess(setup, transport="shared_memory", gpu_memory_utilization=_SHARE) as engine:
        yield from _life(setup, engine, "shared_memory", sleeps=False)


def _life(setup: Setup, engine: EngineProcess, transport: str, *, sleeps: bool) -> Iterator[Row]:
    of_engine = _used_gb(setup)
    learner = open_learner(setup, lr=RATE, shares_gpu=sleeps)
    push = _pusher(learner, engine, transport)
    prompts = questions(setup.learned, setup.sides[0])
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    audits: list[Audit] = []
    used: list[float] = []
    freed = 0.0

    def timed(part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        found = work(*arguments)
        settle(setup.device)
        seconds[part].append(time.perf_counter() - start)
        return found

    def learn(groups: list[Any]) -> None:
        rows = learner.rows([scored(group, seed) for seed, group in enumerate(groups)])
        learner.update([learner.batch(row) for row in rows])

    push(0)
    for step in range(1, setup.colocated_steps + 1):
        groups = timed("generate", engine.ask, "generate", prompts, _sampling(setup))
        awake = _used_gb(setup)
        if sleeps:
            timed("sleep", engine.ask, "sleep")
            freed = awake - _used_gb(setup)
        timed("learn", learn, groups)
        if step == 1 and not sleeps:
            yield _audit_row("audit before the push", _audit(setup, learner, engine, step))
        timed("push", push, step)
        audits.append(timed("audit", _audit, setup, learner, engine, step))
        used.append(_used_gb(setup))
        if step == 1:
            yield judged(_audit_row(f"first push by {transport}", audits[0]), _GAP, at_most=setup.gap)
    size = sum(weight.nbytes for _, weight in learner.named_weights()) / 1e9
    took = statistics.median(seconds["push"])
    pushed = Row(setting=f"{transport}: push", figures={"s": took, "GB": size, "GB/s": size / took})
    yield judged(pushed, "s", at_most=setup.push_s) if transport == "ipc" else pushed
    worst = max(audits, key=lambda one: one.gap_mean)
    yield judged(_audit_row(f"{transport}: worst of {len(audits)} audits", worst), _GAP, at_most=setup.gap)
    if sleeps:
        yield Row(
            setting="sleep, waking within the push",
            figures={"GB freed": freed, "s": statistics.median(seconds["sleep"])},
        )
    early = min(EARLY, len(used))
    memory = Row(
        setting=f"{transport}: memory in use over the steps",
        figures={
            f"GB after step {early}": used[early - 1],
            f"GB after step {len(used)}": used[-1],
            _GROWN: used[-1] - used[early - 1],
            "GB of the engine": of_engine,
            "peak GB of the learner": learner.peak_gb(),
        },
    )
    yield judged(memory, _GROWN, at_most=setup.grown_gb)
    yield Row(
        setting=f"{transport}: seconds of a step, {setup.learned} x {setup.answers} answers",
        figures={part: statistics.median(own) for part, own in seconds.items() if own},
    )


def _pusher(learner: PlainLearner, engine: EngineProcess, transport: str) -> Callable[[int], None]:
    if transport == "shared_memory":

        def hand_over(version: int) -> None:
            engine.ask("begin_push")
            engine.ask("load_weights", [(name, weight.detach().cpu()) for name, weight in learner.named_weights()])
            engine.ask("finish_push", version, 1)

        return hand_over
    place = RendezvousInfo(rank=0, world_size=1, master_address="127.0.0.1", master_port=29_500)
    sender = open_sender(
        transport,
        lambda: ((name, weight.detach()) for name, weight in learner.named_weights()),
        engine,
        place,
        port=_free_port(),
        receivers=1,
        bucket_bytes=BUCKET,
    )

    def send(version: int) -> None:
        sender.send_weights()
        learner.release_memory()
        engine.ask("finish_push", version, 0)

    return send


def _free_port() -> int:
    """For vLLM's weight transfer, which opens its rendezvous itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _sampling(setup: Setup) -> Sampling:
    return Sampling(answers=setup.answers, max_tokens=setup.tokens[0], temperature=1.0, seed=0)


def _audit(setup: Setup, learner: PlainLearner, engine: EngineProcess, version: int) -> Audit:
    asked = Sampling(answers=1, max_tokens=4, temperature=0.0, seed=0)
    probes = engine.ask("probe", questions(2, setup.sides[0]), asked, CANDIDATES)
    return compare(probes, repeated(probes, learner.candidate_logprobs(probes)), version)


def _audit_row(setting: str, audit: Audit) -> Row:
    return Row(setting=setting, figures={_GAP: audit.gap_mean, "gap max": audit.gap_max, "nats over": audit.tokens})


def _used_gb(setup: Setup) -> float:
    """Of the whole device, by all processes."""
    if setup.device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(setup.device)
    return (total - free) / 1e9

"""The learner on the GPU: throughput and MFU, comparison with padded samples, memory, kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.learner import ATTENTIONS, LOGIT_ROWS, PlainLearner
from benchmarks.gpu.peaks import measured_peak, mfu, synchronize
from benchmarks.gpu.rows import Figures, Row, check_limit, measure_each
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.shapes import questions, random_answers
from benchmarks.padded import answer_logprobs, padded_samples
from othink_ray.core.kl import kl_k3
from othink_ray.types import ScoredGroup

RATE = 1e-6
_ALL_LOGITS = 10**9
_KERNELS = 25
_TIMES = "times as fast"


def device(setup: Setup) -> Iterator[Row]:
    """Measure the FLOP/s of a large bfloat16 matmul, beside the peak that MFU is relative to."""

    def measure() -> Figures:
        rate = measured_peak(setup.device, setup.matmul_side)
        return {
            "torch": torch.__version__,
            "TFLOP/s of a matmul": rate / 1e12,
            "TFLOP/s peak": setup.peak / 1e12,
        }

    return measure_each([(setup.device_name, measure)])


def learn(setup: Setup) -> Iterator[Row]:
    """Measure samples per second and MFU of complete steps, including reference and optimizer."""
    learner = PlainLearner(setup.model(), setup.device, lr=RATE)
    learner.set_checkpointing(True)
    works = [(side, tokens) for side in setup.sides for tokens in setup.tokens]
    kinds = [(ATTENTIONS[0], *work) for work in works] + [(kind, *works[0]) for kind in ATTENTIONS[1:]]
    yield from measure_each(
        (f"{setup.name} {kind} {side}x{side} T={tokens}", partial(_rate, setup, learner, kind, side, tokens))
        for kind, side, tokens in kinds
    )


def open_learner(setup: Setup, *, lr: float, shares_gpu: bool = False) -> PlainLearner:
    """Return a learner with gradient checkpointing and the fastest attention that works on this device."""
    learner = PlainLearner(setup.model(), setup.device, lr=lr, shares_gpu=shares_gpu)
    learner.set_checkpointing(True)
    learner.choose_attention(_groups(setup, learner, 1, setup.sides[0], setup.tokens[0]))
    return learner


def _groups(setup: Setup, learner: PlainLearner, count: int, side: int, tokens: int) -> list[ScoredGroup]:
    return random_answers(learner.family, questions(count, side), setup.answers, tokens)


def _rate(setup: Setup, learner: PlainLearner, kind: str, side: int, tokens: int) -> Figures:
    learner.reset()
    learner.attention = kind
    samples = learner.packs(_groups(setup, learner, setup.groups, side, tokens))
    operations = learner.operations(samples)
    learner.reset()
    prepare_times, update_times = [], []
    for _ in range(1 + setup.steps):
        start = time.perf_counter()
        batches = [learner.batch(sample) for sample in samples]
        synchronize(setup.device)
        ready = time.perf_counter()
        learner.update(batches)
        synchronize(setup.device)
        prepare_times.append(ready - start)
        update_times.append(time.perf_counter() - ready)
    prepare, update = (statistics.median(seconds[1:]) for seconds in (prepare_times, update_times))
    return {
        "samples/s": setup.groups * setup.answers / (prepare + update),
        "MFU %": 100 * mfu(operations, update, setup.peak),
        "update s": update,
        "prepare s": prepare,
        "TFLOP": operations / 1e12,
        "peak GB": learner.peak_gb(),
    }


def padded(setup: Setup) -> Iterator[Row]:
    """Compare one shared-prefix packed sample with a padded sample per answer, with equal weights."""
    learner = open_learner(setup, lr=RATE)
    tokens = setup.tokens[0]
    for row in measure_each(
        (
            f"{setup.name} {learner.attention} {side}x{side} T={tokens}",
            partial(_against_padded, setup, learner, side, tokens),
        )
        for side in setup.sides
    ):
        yield check_limit(row, _TIMES, at_least=setup.times_padded) if row.state == "ok" else row


def _against_padded(setup: Setup, learner: PlainLearner, side: int, tokens: int) -> Figures:
    learner.reset()
    groups = _groups(setup, learner, 1, side, tokens)
    [sample] = learner.packs(groups)
    inputs, answer_ids = padded_samples([scored.group for scored in groups], learner.family)
    inputs = {name: value.to(setup.device) for name, value in inputs.items()}
    answer_ids = answer_ids.to(setup.device)
    policy, reference = learner.policy.network, learner.reference.network
    advantages = torch.from_numpy(sample.advantages[sample.segments > 0]).float().to(setup.device)
    advantages = advantages.view(answer_ids.shape)
    batch = learner.batch(sample)
    with torch.no_grad():
        gap = (learner.logprobs(batch).view(answer_ids.shape) - answer_logprobs(policy, inputs, answer_ids)).abs()

    def padded_step() -> None:
        with torch.no_grad():
            ref_logprobs = answer_logprobs(reference, inputs, answer_ids)
        policy_logprobs = answer_logprobs(policy, inputs, answer_ids)
        ratio = torch.exp(policy_logprobs - policy_logprobs.detach())
        (kl_k3(policy_logprobs, ref_logprobs) - ratio * advantages).mean().backward()
        learner.optimizer_step()

    shared_s, padded_s = (_median(setup, step) for step in (lambda: learner.update([batch]), padded_step))
    return {
        _TIMES: padded_s / shared_s,
        "shared s": shared_s,
        "padded s": padded_s,
        "logprob gap mean": gap.mean().item(),
        "logprob gap max": gap.max().item(),
    }


def _median(setup: Setup, step: Callable[[], None]) -> float:
    """Return the median seconds of a step, after a warm-up step."""
    seconds = []
    for _ in range(1 + setup.steps):
        synchronize(setup.device)
        start = time.perf_counter()
        step()
        synchronize(setup.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def memory(setup: Setup) -> Iterator[Row]:
    """Measure peak memory of a step: logits in chunks or at once, with and without gradient checkpointing."""
    learner = open_learner(setup, lr=RATE)
    side, tokens = setup.sides[0], setup.tokens[-1]

    def step(checkpointing: bool, logit_rows: int) -> Figures:
        learner.reset()
        learner.set_checkpointing(checkpointing)
        learner.policy.logit_rows = learner.reference.logit_rows = logit_rows
        [sample] = learner.packs(_groups(setup, learner, 1, side, tokens))
        batch = learner.batch(sample)
        seconds = _median(setup, lambda: learner.update([batch]))
        return {"peak GB": learner.peak_gb(), "update s": seconds, "answer tokens": len(batch.targets)}

    yield from measure_each(
        [
            (f"checkpointing, logits {LOGIT_ROWS} rows at a time", partial(step, True, LOGIT_ROWS)),
            ("checkpointing, logits all at once", partial(step, True, _ALL_LOGITS)),
            (f"no checkpointing, logits {LOGIT_ROWS} rows at a time", partial(step, False, LOGIT_ROWS)),
        ]
    )


def kernels(setup: Setup) -> Iterator[Row]:
    """Profile an update by kernel: the row has the five longest; the full table is written beside the figures."""
    learner = open_learner(setup, lr=RATE)
    side, tokens = setup.sides[-1], setup.tokens[0]

    def profile_update() -> Figures:
        [sample] = learner.packs(_groups(setup, learner, 1, side, tokens))
        batch = learner.batch(sample)
        learner.update([batch])
        on_gpu = setup.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            learner.update([batch])
            synchronize(setup.device)
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        averages = [event for event in profiler.key_averages() if not on_gpu or event.device_type.name == "CUDA"]
        (setup.folder / "gpu_profile.txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=_KERNELS))
        return _shares([(event.key, getattr(event, key)) for event in averages])

    return measure_each([(f"{setup.name} {learner.attention} {side}x{side} T={tokens}", profile_update)])


def _shares(times: Sequence[tuple[str, float]]) -> Figures:
    """Return the five longest kernels, in percent of the total."""
    total = sum(time for _, time in times) or 1.0
    longest = sorted(times, key=lambda pair: -pair[1])[:5]
    return {f"{name[:40]} %": 100 * time / total for name, time in longest}

"""The learner on the GPU: its rate, its attention against others, its memory, its kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.learner import ATTENTIONS, LOGIT_ROWS, PlainLearner
from benchmarks.gpu.peaks import measured_peak, mfu, settle
from benchmarks.gpu.rows import Figures, Row, each, judged
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.shapes import questions, random_answers
from benchmarks.padded import answer_logprobs, padded_rows
from othink_ray.core.kl import kl_k3
from othink_ray.types import ScoredGroup

RATE = 1e-6
_ALL_ROWS = 10**9
_KERNELS = 25
_TIMES = "times as fast"


def device(setup: Setup) -> Iterator[Row]:
    def found() -> Figures:
        rate = measured_peak(setup.device, setup.yardstick)
        return {
            "torch": torch.__version__,
            "TFLOP/s of a product": rate / 1e12,
            "TFLOP/s counted on": setup.peak / 1e12,
        }

    return each([(setup.device_name, found)])


def learn(setup: Setup) -> Iterator[Row]:
    """Samples a second and MFU of whole steps, reference and optimiser included."""
    learner = PlainLearner(setup.model(), setup.device, lr=RATE)
    learner.set_checkpointing(True)
    works = [(side, tokens) for side in setup.sides for tokens in setup.tokens]
    kinds = [(ATTENTIONS[0], *work) for work in works] + [(kind, *works[0]) for kind in ATTENTIONS[1:]]
    yield from each(
        (f"{setup.name} {kind} {side}x{side} T={tokens}", partial(_rate, setup, learner, kind, side, tokens))
        for kind, side, tokens in kinds
    )


def open_learner(setup: Setup, *, lr: float, shares_gpu: bool = False) -> PlainLearner:
    """With gradient checkpointing, and the attention that works here."""
    learner = PlainLearner(setup.model(), setup.device, lr=lr, shares_gpu=shares_gpu)
    learner.set_checkpointing(True)
    learner.choose_attention(_groups(setup, learner, 1, setup.sides[0], setup.tokens[0]))
    return learner


def _groups(setup: Setup, learner: PlainLearner, count: int, side: int, tokens: int) -> list[ScoredGroup]:
    return random_answers(learner.family, questions(count, side), setup.answers, tokens)


def _rate(setup: Setup, learner: PlainLearner, kind: str, side: int, tokens: int) -> Figures:
    learner.clear()
    learner.attention = kind
    rows = learner.rows(_groups(setup, learner, setup.learned, side, tokens))
    operations = learner.operations(rows)
    learner.clear()
    prepared, updated = [], []
    for _ in range(1 + setup.steps):
        start = time.perf_counter()
        batches = [learner.batch(row) for row in rows]
        settle(setup.device)
        ready = time.perf_counter()
        learner.update(batches)
        settle(setup.device)
        prepared.append(ready - start)
        updated.append(time.perf_counter() - ready)
    prepare, update = (statistics.median(seconds[1:]) for seconds in (prepared, updated))
    return {
        "samples/s": setup.learned * setup.answers / (prepare + update),
        "MFU %": 100 * mfu(operations, update, setup.peak),
        "update s": update,
        "prepare s": prepare,
        "TFLOP": operations / 1e12,
        "peak GB": learner.peak_gb(),
    }


def padded(setup: Setup) -> Iterator[Row]:
    """One shared-prefix row against a row an answer, of the same weights."""
    learner = open_learner(setup, lr=RATE)
    tokens = setup.tokens[0]
    for row in each(
        (
            f"{setup.name} {learner.attention} {side}x{side} T={tokens}",
            partial(_against_padded, setup, learner, side, tokens),
        )
        for side in setup.sides
    ):
        yield judged(row, _TIMES, at_least=setup.times_padded) if row.state == "ok" else row


def _against_padded(setup: Setup, learner: PlainLearner, side: int, tokens: int) -> Figures:
    learner.clear()
    groups = _groups(setup, learner, 1, side, tokens)
    [row] = learner.rows(groups)
    inputs, answered = padded_rows([one.group for one in groups], learner.family)
    given = {name: value.to(setup.device) for name, value in inputs.items()}
    answered = answered.to(setup.device)
    policy, reference = learner.policy.network, learner.reference.network
    gain = torch.from_numpy(row.advantages[row.segments > 0]).float().to(setup.device).view(answered.shape)
    batch = learner.batch(row)
    with torch.no_grad():
        gap = (learner.logprobs(batch).view(answered.shape) - answer_logprobs(policy, given, answered)).abs()

    def plainly() -> None:
        with torch.no_grad():
            referred = answer_logprobs(reference, given, answered)
        found = answer_logprobs(policy, given, answered)
        (kl_k3(found, referred) - torch.exp(found - found.detach()) * gain).mean().backward()
        learner.descend()

    shared_s, padded_s = (_median(setup, step) for step in (lambda: learner.update([batch]), plainly))
    return {
        _TIMES: padded_s / shared_s,
        "shared s": shared_s,
        "padded s": padded_s,
        "logprob gap mean": gap.mean().item(),
        "logprob gap max": gap.max().item(),
    }


def _median(setup: Setup, step: Callable[[], None]) -> float:
    """Seconds of a step, after one that does not count."""
    seconds = []
    for _ in range(1 + setup.steps):
        settle(setup.device)
        start = time.perf_counter()
        step()
        settle(setup.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def memory(setup: Setup) -> Iterator[Row]:
    """Peaks of one step: logits in chunks or all at once, layers computed again or kept."""
    learner = open_learner(setup, lr=RATE)
    side, tokens = setup.sides[0], setup.tokens[-1]

    def step(checkpointing: bool, logit_rows: int) -> Figures:
        learner.clear()
        learner.set_checkpointing(checkpointing)
        learner.policy.logit_rows = learner.reference.logit_rows = logit_rows
        [row] = learner.rows(_groups(setup, learner, 1, side, tokens))
        batch = learner.batch(row)
        seconds = _median(setup, lambda: learner.update([batch]))
        return {"peak GB": learner.peak_gb(), "update s": seconds, "answer tokens": len(batch.targets)}

    yield from each(
        [
            (f"checkpointing, logits {LOGIT_ROWS} rows at a time", partial(step, True, LOGIT_ROWS)),
            ("checkpointing, logits all at once", partial(step, True, _ALL_ROWS)),
            (f"no checkpointing, logits {LOGIT_ROWS} rows at a time", partial(step, False, LOGIT_ROWS)),
        ]
    )


def kernels(setup: Setup) -> Iterator[Row]:
    """Where an update's time goes, kernel by kernel; the whole list is written beside the figures."""
    learner = open_learner(setup, lr=RATE)
    side, tokens = setup.sides[-1], setup.tokens[0]

    def profiled() -> Figures:
        [row] = learner.rows(_groups(setup, learner, 1, side, tokens))
        batch = learner.batch(row)
        learner.update([batch])
        on_gpu = setup.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as found:
            learner.update([batch])
            settle(setup.device)
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        averages = [event for event in found.key_averages() if not on_gpu or event.device_type.name == "CUDA"]
        (setup.folder / "gpu_profile.txt").write_text(found.key_averages().table(sort_by=key, row_limit=_KERNELS))
        return _shares([(event.key, getattr(event, key)) for event in averages])

    return each([(f"{setup.name} {learner.attention} {side}x{side} T={tokens}", profiled)])


def _shares(times: Sequence[tuple[str, float]]) -> Figures:
    """The five longest, in percent of all."""
    whole = sum(time for _, time in times) or 1.0
    longest = sorted(times, key=lambda one: -one[1])[:5]
    return {f"{name[:40]} %": 100 * time / whole for name, time in longest}

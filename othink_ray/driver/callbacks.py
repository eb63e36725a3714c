"""Callbacks of a run: log, evaluate and save after each step, stop after too many bad steps, trace the first steps."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from othink_ray.atomic_write import atomic_write
from othink_ray.config.schema import Config, FaultsConfig
from othink_ray.data.prompt_stream import PromptStream
from othink_ray.driver.checkpoint import Checkpoints
from othink_ray.driver.console import Console
from othink_ray.driver.evaluate import EvalSet, Evaluation, graded, summarize
from othink_ray.driver.loop import StepRecord
from othink_ray.driver.metrics import RunRecords, jsonable, sample_record, sft_metrics, step_metrics
from othink_ray.driver.sft import SFTStepRecord
from othink_ray.driver.stopping import Stopped, StopRequest
from othink_ray.runtime.monitoring import Incidents
from othink_ray.tracing import Spans, TraceFile, record_span, span, take_spans
from othink_ray.types import Audit, Group, Prompt, ScoredGroup, TrainState, UpdateStats


class RunawayError(RuntimeError):
    """Training diverged; the message names the violated limits and the file with the samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Result of a finished step, the same for all training loops."""

    step: int
    data_position: int
    schedule_state: Mapping[str, float]
    beta: float
    stats: UpdateStats
    groups: Sequence[tuple[ScoredGroup, NDArray[np.float64]]]  # the trained groups with their advantages (G,)
    sampled: bool  # whether engines sampled the answers, with logprobs to compare with the learner's


class Guards:
    """Checks each step against the limits of `faults` and dumps the samples of a bad step to `faults/step_N.json`."""

    def __init__(self, faults: FaultsConfig, run_dir: Path, log: Callable[[str], None]) -> None:
        self.faults, self.folder, self.log = faults, run_dir / "faults", log
        self.in_a_row = 0

    def check(self, record: StepResult) -> None:
        """Log a bad step; raise RunawayError at `faults.patience` bad steps in a row."""
        violations = list(self._violations(record))
        self.in_a_row = self.in_a_row + 1 if violations else 0
        if not violations:
            return
        text = f"step {record.step + 1}: {'; '.join(violations)}. Its prompts and answers are in {self._dump(record)}"
        if self.in_a_row >= self.faults.patience:
            raise RunawayError(
                f"{text}. This is bad step {self.in_a_row} in a row, and faults.patience = {self.faults.patience}. "
                "Resume from an earlier checkpoint with a lower learner.lr, a lower learner.max_grad_norm or a higher "
                "KL weight"
            )
        self.log(
            f"{text} (bad step {self.in_a_row} in a row; the run stops at faults.patience = {self.faults.patience})"
        )

    def _violations(self, record: StepResult) -> Iterator[str]:
        stats, faults = record.stats, self.faults
        if stats.skipped:
            of = f" of {', '.join(stats.bad_prompts[:3])}" if stats.bad_prompts else ""
            yield f"{stats.skipped} update(s) skipped, because loss or gradient{of} was not finite"
        if stats.kl_mean > faults.kl_limit:
            yield f"KL is {stats.kl_mean:.3g} nats per token, above faults.kl_limit = {faults.kl_limit:g}"
        if record.sampled and stats.logp_gap_mean > faults.gap_limit:
            yield (
                f"sampler and learner are {stats.logp_gap_mean:.3g} nats apart, above faults.gap_limit = "
                f"{faults.gap_limit:g}"
            )

    def _dump(self, record: StepResult) -> Path:
        """Write the groups of the bad prompts, or all groups of the step if none is known to be bad."""
        bad_groups = [pair for pair in record.groups if pair[0].group.prompt.id in record.stats.bad_prompts]
        samples = [sample_record(record.step, *pair) for pair in bad_groups or record.groups]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{record.step + 1}.json"
        content = {"step": record.step, "beta": record.beta, "stats": asdict(record.stats), "samples": samples}
        atomic_write(path, json.dumps(jsonable(content), indent=1) + "\n")
        return path


class GreedyWorkers(Protocol):
    """Workers that can answer held-out prompts."""

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]: ...


class RunCallbacks(ABC):
    """Callbacks that all training loops share; they keep the evaluations before and after training for summary.json."""

    def __init__(
        self,
        config: Config,
        workers: GreedyWorkers,
        stream: PromptStream,
        eval_sets: Sequence[EvalSet],
        records: RunRecords,
        show: Callable[[Mapping[str, float]], None],
        console: Console,
        before: Mapping[str, Mapping[str, Any]],
        checkpoints: Checkpoints,
        incidents: Incidents,
        request: StopRequest,
    ) -> None:
        self.config, self.workers, self.stream, self.eval_sets = config, workers, stream, eval_sets
        self.records, self.show, self.console = records, show, console
        self.checkpoints, self.incidents, self.request = checkpoints, incidents, request
        self.guards = Guards(config.faults, Path(config.run.dir), incidents.log)
        self.before = {name: Evaluation(**result) for name, result in before.items()}
        self.after: dict[str, Evaluation] = {}
        self.audit_gap_max: float | None = None  # None until an audit has compared tokens
        self.dropped = [(row.row_id, row.text) for eval_set in eval_sets for row in eval_set.bad_rows]
        self._reported_drops = 0  # of the stream
        self._report_drops(self.dropped)

    def on_start(self, step: int) -> None:
        """Evaluate the initial weights, unless the run is resumed: its checkpoint holds that evaluation."""
        if not self.before:
            self.before = self._evaluate(step)
        elif step >= self.config.train.steps:  # resumed after its last step: only the final evaluation is missing
            self.after = self._evaluate(step)

    @property
    @abstractmethod
    def algo(self) -> str:
        """Name of the algorithm in summary.json."""
        ...

    def finish_step(self, record: StepResult, metrics: dict[str, float]) -> None:
        """Evaluate if due, log, check the limits, and save a checkpoint if due."""
        done = record.step + 1
        last = done == self.config.train.steps
        if self._evaluation_due(done):
            self.after = self._evaluate(done)
            for name, result in self.after.items():
                suffix = "" if name == self.eval_sets[0].name else f"/{name}"
                metrics |= {f"eval/accuracy{suffix}": result.accuracy, f"eval/format{suffix}": result.format}
        line = self.records.log(
            record.step, metrics | self.incidents.take() | {"faults/skipped_updates": float(record.stats.skipped)}
        )
        self.show(line)
        scored, advantages = record.groups[0]
        self.records.sample(record.step, scored, advantages)
        self.console.step(done, metrics)
        self.console.sample(done, scored)
        self._report_stream_drops()
        self.guards.check(record)
        self._save(record, last)

    def _save(self, record: StepResult, last: bool) -> None:
        """Begin a checkpoint if one is due; it is written during the next steps.

        After the last step and on a stop request, wait for the checkpoint; on a request before the last step raise
        Stopped.
        """
        done, every = record.step + 1, self.config.train.checkpoint_every
        self.checkpoints.finish_if_written()
        if last or self.request.made or (every and done % every == 0):
            self.checkpoints.begin(self._state(record))
        if last or self.request.made:
            self.checkpoints.finish()
        if self.request.made and not last:
            raise Stopped(f"step {done} of {self.config.train.steps} is saved; run.resume=auto resumes from it")

    def _evaluation_due(self, done: int) -> bool:
        every = self.config.eval.every
        return done == self.config.train.steps or bool(every and done % every == 0)

    def _accuracy_of(self, done: int) -> float | None:
        return self.after[self.eval_sets[0].name].accuracy if self._evaluation_due(done) else None

    def _evaluate(self, step: int) -> dict[str, Evaluation]:
        """Return the evaluations by eval set; the training data's is shown last, because the console keeps the last."""
        results = {}
        for eval_set in self.eval_sets:
            with (
                span("evaluate", data=eval_set.name, questions=len(eval_set.prompts)),
                self.console.phase(f"evaluating {len(eval_set.prompts)} held-out questions of {eval_set.name}"),
            ):
                answers = [graded(scored)[0] for scored in self.workers.answer_greedily(eval_set.prompts)]
            results[eval_set.name] = summarize(answers)
        for eval_set in reversed(self.eval_sets):
            result = results[eval_set.name]
            self.console.eval(step, eval_set.name, result.accuracy, result.lo, result.hi, result.n)
        return results

    def _report_stream_drops(self) -> None:
        new = self.stream.dropped[self._reported_drops :]
        self._reported_drops += len(new)
        self.dropped += new
        self._report_drops(new)

    def _report_drops(self, rows: Sequence[tuple[str, str]]) -> None:
        for row, reason in rows:
            self.console.say(f"dropped row {row}: {reason}")

    def _state(self, record: StepResult) -> TrainState:
        return TrainState(
            step=record.step + 1,
            data_position=record.data_position,
            schedule_state=record.schedule_state,
            seed=self.config.train.seed,
            before={name: asdict(result) for name, result in self.before.items()},
            accuracy=self._accuracy_of(record.step + 1),
        )

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json for the run so far."""
        config, main_set = self.config, self.eval_sets[0].name
        after = self.after or self.before
        return {
            "mode": config.mode,
            "model": config.model.name,
            "data": config.data.name,
            "algo": self.algo,
            "seed": config.train.seed,
            "steps": config.train.steps,
            "before": asdict(self.before[main_set]),
            "after": asdict(after[main_set]),
            "also": {
                eval_set.name: {"before": asdict(self.before[eval_set.name]), "after": asdict(after[eval_set.name])}
                for eval_set in self.eval_sets[1:]
            },
            "audit_gap_max": self.audit_gap_max,
            "dropped": self.dropped,
        }


class GRPOCallbacks(RunCallbacks):
    """Callbacks of `loop.train` and `train_overlapped`."""

    @property
    def algo(self) -> str:
        return self.config.algo.name

    def on_step(self, record: StepRecord) -> None:
        if record.audit.tokens:
            self.audit_gap_max = max(self.audit_gap_max or 0.0, record.audit.gap_max)
        result = StepResult(
            step=record.step,
            data_position=record.data_position,
            schedule_state=record.schedule_state,
            beta=record.beta,
            stats=record.stats,
            groups=list(zip(record.scored, record.advantages, strict=True)),
            sampled=True,
        )
        self.finish_step(result, step_metrics(record))


class EvalEngines(GreedyWorkers, Protocol):
    """Rollout engines that SFT uses for evaluation only."""

    def push(self, version: int) -> Audit: ...

    def sleep(self) -> None:
        """With rollout.sleep, free the engines' GPU memory until the next push; else do nothing."""
        ...


class SFTCallbacks(RunCallbacks):
    """Callbacks of `sft.fine_tune`: the engines get the weights only before an evaluation."""

    workers: EvalEngines

    @property
    def algo(self) -> str:
        return "sft"

    def _evaluate(self, step: int) -> dict[str, Evaluation]:
        self.workers.push(step)
        results = super()._evaluate(step)
        self.workers.sleep()
        return results

    def on_step(self, record: SFTStepRecord) -> None:
        result = StepResult(
            step=record.step,
            data_position=record.data_position,
            schedule_state={},
            beta=0.0,
            stats=record.stats,
            groups=[_correct(group) for group in record.demonstrations],
            sampled=False,
        )
        self.finish_step(result, sft_metrics(record))


def _correct(group: Group) -> tuple[ScoredGroup, NDArray[np.float64]]:
    """Return demonstrations as samples.jsonl shows them: not graded, each with reward and advantage 1."""
    ones = np.ones(len(group.completions))
    return ScoredGroup(group=group, rewards=ones, parts={}, valid=ones.astype(bool)), ones


class TracedProcesses(Protocol):
    """The processes of a run, whose spans the trace collects."""

    def spans(self, *, keep_recording: bool) -> Mapping[str, Spans]:
        """Return the spans of each process since the last call, by process name."""
        ...


class FinishedStep(Protocol):
    """Record of a finished step of any training loop."""

    @property
    def step(self) -> int: ...


class LoopCallbacks(Protocol):
    """Callbacks of any training loop."""

    def on_start(self, step: int) -> None: ...

    def on_step(self, record: Any) -> None: ...


class Timeline:
    """Wraps a run's callbacks and traces its first `steps` steps; trace.json is valid JSON after every step.

    After `steps` steps tracing stops, so that neither its cost nor the file grows further.
    """

    def __init__(self, path: Path, processes: TracedProcesses, callbacks: LoopCallbacks, *, steps: int) -> None:
        self.path, self.processes, self.callbacks, self.steps_left = path, processes, callbacks, steps
        self.trace: TraceFile | None = None

    def __enter__(self) -> Self:
        self.path.unlink(missing_ok=True)  # left by an earlier start
        if self.steps_left:
            self.trace = TraceFile(self.path)
            self._collect(keep_recording=True)
        return self

    def on_start(self, step: int) -> None:
        self.callbacks.on_start(step)
        self.step_start_s = time.time()

    def on_step(self, record: FinishedStep) -> None:
        record_span("step", self.step_start_s, step=record.step)
        with span("callbacks", step=record.step):
            self.callbacks.on_step(record)
        self.steps_left -= 1
        self._collect(keep_recording=self.steps_left > 0)
        self.step_start_s = time.time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._collect(keep_recording=False)
        elif self.trace is not None:  # the other processes may be dead, or too busy to answer before the run ends
            self._write(self.trace, {"driver": take_spans(keep_recording=False)})

    def _collect(self, *, keep_recording: bool) -> None:
        if self.trace is None:
            return
        written = self._write(self.trace, self._spans(keep_recording=keep_recording))
        if keep_recording and not written:
            self._spans(keep_recording=False)  # stop recording in all processes
        if not (keep_recording and written):
            self.trace = None

    @staticmethod
    def _write(trace: TraceFile, spans_by_process: Mapping[str, Spans]) -> bool:
        """Write the spans; return False if that fails, on a full disk: tracing then stops, and the run continues."""
        for name, spans in spans_by_process.items():
            trace.add(name, spans)
        try:
            trace.flush()
        except OSError:
            return False
        return True

    def _spans(self, *, keep_recording: bool) -> dict[str, Spans]:
        return {
            "driver": take_spans(keep_recording=keep_recording),
            **self.processes.spans(keep_recording=keep_recording),
        }

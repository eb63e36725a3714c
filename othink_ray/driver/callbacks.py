"""Steps that go wrong in their numbers: told, written down, and not too many in a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from othink_ray.atomic_write import atomic_write
from othink_ray.config.schema import Config, FaultsConfig
from othink_ray.data.prompt_stream import PromptStream
from othink_ray.driver.checkpoint import Checkpoints
from othink_ray.driver.console import Console
from othink_ray.driver.evaluate import EvalSet, Evaluation, graded, summarise
from othink_ray.driver.loop import Step
from othink_ray.driver.metrics import RunRecords, jsonable, measures, sample_record, taught_measures
from othink_ray.driver.stopping import Stopped, StopRequest
from othink_ray.runtime.monitoring import Incidents
from othink_ray.tracing import span
from othink_ray.types import Prompt, ScoredGroup, TrainState


class RunawayError(RuntimeError):
    """Training has left the rails; says what was seen, and where it is written."""


class Guards:
    """Of one run."""

    def __init__(self, faults: FaultsConfig, run_dir: Path, tell: Callable[[str], None]) -> None:
        self.faults, self.folder, self.tell = faults, run_dir / "faults", tell
        self.in_a_row = 0

    def look(self, seen: Step) -> None:
        """Raises after `faults.patience` bad steps in a row."""
        wrong = list(self._wrong(seen))
        self.in_a_row = self.in_a_row + 1 if wrong else 0
        if not wrong:
            return
        told = f"step {seen.step + 1}: {'; '.join(wrong)}. Its questions and answers are in {self._dump(seen)}"
        if self.in_a_row >= self.faults.patience:
            raise RunawayError(
                f"{told}. That was bad step {self.in_a_row} in a row, as many as faults.patience allows. Go on from an "
                "earlier checkpoint with a lower learner.lr, a lower learner.max_grad_norm or a higher KL weight"
            )
        self.tell(f"{told} (bad step {self.in_a_row} in a row; at {self.faults.patience} the run stops)")

    def _wrong(self, seen: Step) -> Iterator[str]:
        stats, faults = seen.stats, self.faults
        if stats.skipped:
            of = f" of {', '.join(stats.bad_prompts[:3])}" if stats.bad_prompts else ""
            yield f"{stats.skipped} update(s) skipped, because loss or gradient{of} was not finite"
        if stats.kl_mean > faults.kl_limit:
            yield f"KL is {stats.kl_mean:.3g} nats per token, above faults.kl_limit = {faults.kl_limit:g}"
        if seen.audit.tokens and stats.logp_gap_mean > faults.gap_limit:  # a teacher's answers have no sampler
            yield (
                f"sampler and learner are {stats.logp_gap_mean:.3g} nats apart, above faults.gap_limit = "
                f"{faults.gap_limit:g}"
            )

    def _dump(self, seen: Step) -> Path:
        """Those at fault, where they are known; else all of the step."""
        groups = list(zip(seen.scored, seen.advantages, strict=True))
        at_fault = [pair for pair in groups if pair[0].group.prompt.id in seen.stats.bad_prompts]
        samples = [sample_record(seen.step, *pair) for pair in at_fault or groups]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{seen.step + 1}.json"
        record = {"step": seen.step, "beta": seen.beta, "stats": asdict(seen.stats), "samples": samples}
        atomic_write(path, json.dumps(jsonable(record), indent=1) + "\n")
        return path


class Answers(Protocol):
    """What a journal asks of a team."""

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]: ...


class RunCallbacks:
    """The memory of one run."""

    def __init__(
        self,
        config: Config,
        team: Answers,
        stream: PromptStream,
        exams: Sequence[EvalSet],
        records: RunRecords,
        show: Callable[[Mapping[str, float]], None],
        console: Console,
        before: Mapping[str, Mapping[str, Any]],
        checkpoints: Checkpoints,
        incidents: Incidents,
        request: StopRequest,
    ) -> None:
        self.config, self.team, self.stream, self.exams = config, team, stream, exams
        self.records, self.show, self.console = records, show, console
        self.checkpoints, self.incidents, self.request = checkpoints, incidents, request
        self.guards = Guards(config.faults, Path(config.run.dir), incidents.tell)
        self.measures = taught_measures if config.mode == "sft" else measures
        self.before = {name: Evaluation(**result) for name, result in before.items()}
        self.after: dict[str, Evaluation] = {}
        self.audit_gap_max: float | None = None  # as long as nothing was compared
        self.dropped = [(row.row_id, row.reason) for exam in exams for row in exam.bad_rows]
        self._stream_drops = 0
        self._say_drops(self.dropped)

    def begin(self, step: int) -> None:
        """The engines have the weights after `step` steps; a run that goes on knows how it began."""
        if not self.before:
            self.before = self._evaluate(step)
        elif step >= self.config.train.steps:  # it stopped after its last step: all that is missing is its result
            self.after = self._evaluate(step)

    def step(self, seen: Step) -> None:
        done = seen.step + 1
        found = self.measures(seen)
        if seen.audit.tokens:
            self.audit_gap_max = max(self.audit_gap_max or 0.0, seen.audit.gap_max)
        last = done == self.config.train.steps
        if self._is_evaluated(done):
            self.after = self._evaluate(done)
            for name, result in self.after.items():
                suffix = "" if name == self.exams[0].name else f"/{name}"
                found |= {f"eval/accuracy{suffix}": result.accuracy, f"eval/format{suffix}": result.format}
        line = self.records.log(
            seen.step, found | self.incidents.take() | {"faults/skipped_updates": float(seen.stats.skipped)}
        )
        self.show(line)
        self.records.sample(seen.step, seen.scored[0], seen.advantages[0])
        self.console.step(done, found)
        self.console.sample(done, seen.scored[0])
        self._note_drops()
        self.guards.look(seen)
        self._save(seen, last)

    def _save(self, seen: Step, last: bool) -> None:
        """What is begun here is written during the next steps, and counts when it is whole."""
        done, every = seen.step + 1, self.config.train.checkpoint_every
        self.checkpoints.finish_if_written()
        if last or self.request.made or (every and done % every == 0):
            self.checkpoints.begin(self._state(seen))
        if last or self.request.made:
            self.checkpoints.finish()
        if self.request.made and not last:
            raise Stopped(f"step {done} of {self.config.train.steps} is saved; run.resume=auto goes on from it")

    def _is_evaluated(self, done: int) -> bool:
        every = self.config.eval.every
        return done == self.config.train.steps or bool(every and done % every == 0)

    def _accuracy_of(self, done: int) -> float | None:
        return self.after[self.exams[0].name].accuracy if self._is_evaluated(done) else None

    def _evaluate(self, step: int) -> dict[str, Evaluation]:
        """The run's own data set is shown last: it is what the console keeps in view."""
        found = {}
        for exam in self.exams:
            with (
                span("evaluate", data=exam.name, questions=len(exam.prompts)),
                self.console.phase(f"answering {len(exam.prompts)} held-out questions of {exam.name}"),
            ):
                answers = [graded(one)[0] for one in self.team.answer_greedily(exam.prompts)]
            found[exam.name] = summarise(answers)
        for exam in reversed(self.exams):
            result = found[exam.name]
            self.console.eval(step, exam.name, result.accuracy, result.lo, result.hi, result.n)
        return found

    def _note_drops(self) -> None:
        new = self.stream.dropped[self._stream_drops :]
        self._stream_drops += len(new)
        self.dropped += new
        self._say_drops(new)

    def _say_drops(self, rows: Sequence[tuple[str, str]]) -> None:
        for row, reason in rows:
            self.console.say(f"dropped row {row}: {reason}")

    def _state(self, seen: Step) -> TrainState:
        return TrainState(
            step=seen.step + 1,
            data_position=seen.data_position,
            schedule_state=seen.schedule_state,
            seed=self.config.train.seed,
            before={name: asdict(result) for name, result in self.before.items()},
            accuracy=self._accuracy_of(seen.step + 1),
        )

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the run so far."""
        config, own = self.config, self.exams[0].name
        after = self.after or self.before
        return {
            "mode": config.mode,
            "model": config.model.name,
            "data": config.data.name,
            "algo": "sft" if config.mode == "sft" else config.algo.name,
            "seed": config.train.seed,
            "steps": config.train.steps,
            "before": asdict(self.before[own]),
            "after": asdict(after[own]),
            "also": {
                exam.name: {"before": asdict(self.before[exam.name]), "after": asdict(after[exam.name])}
                for exam in self.exams[1:]
            },
            "audit_gap_max": self.audit_gap_max,
            "dropped": self.dropped,
        }

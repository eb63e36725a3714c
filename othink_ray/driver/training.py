"""mode=train and mode=sft: the order in which the parts of a run come up, what it leaves behind, and its restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from othink_ray.config.load import to_yaml
from othink_ray.config.schema import Config
from othink_ray.data import PromptStream, open_training
from othink_ray.driver.build import (
    beta_schedule,
    length_filter,
    lr_schedule,
    open_loop,
    open_sft_workers,
    open_workers,
    recipe,
    require_targets,
    students,
)
from othink_ray.driver.callbacks import RunCallbacks
from othink_ray.driver.checkpoint import Checkpoints, ResumeError, compare_settings, find
from othink_ray.driver.console import Console
from othink_ray.driver.evaluate import eval_sets
from othink_ray.driver.metrics import RunRecords
from othink_ray.driver.run_dir import environment, set_aside_older, written_down
from othink_ray.driver.stopping import Stopped, finishing_steps, stop_requested
from othink_ray.driver.timeline import Timeline, TracedWorkers
from othink_ray.driver.warm_start import base_model
from othink_ray.runtime.futures import ProcessLost
from othink_ray.runtime.monitoring import Gauges, Incidents
from othink_ray.types import TrainState


def train_model(
    config: Config, run_dir: Path, console: Console, write_report: Callable[[Path], Path], started: float
) -> None:
    """On a Ray that is up. Where a process is lost that cannot be replaced alone, all start again from a checkpoint."""
    tell = written_down(run_dir, console.say)
    incidents = Incidents(config.faults.max_restarts, tell)
    if config.run.resume == "never":
        set_aside_older(run_dir)
    resumed, state = find(run_dir, config.run.resume, config.train.seed, tell)
    if resumed:
        compare_settings(resumed, config, console.say)
        console.say(f"resuming after step {state.step} of {config.train.steps}, from {resumed}")
    while True:
        try:
            summary = _train(config, run_dir, console, incidents, resumed, state, started)
            break
        except ProcessLost as error:
            incidents.restart("learner_restarts", error)
        own, own_state = find(run_dir, "auto", config.train.seed, tell)
        resumed, state = (own, own_state) if own else (resumed, state)
        if stop_requested():
            raise Stopped(f"a process was lost in this step; the next run goes on after step {state.step}")
        tell(f"all processes start again; training goes on after step {state.step}")
    with console.phase("writing the report"):
        report = write_report(run_dir)
    console.finish(
        summary["before"],
        summary["after"],
        {"report": report, "model": run_dir / "export", "metrics": run_dir / "metrics.jsonl"},
        time.monotonic() - started,
    )


def _train(
    config: Config,
    run_dir: Path,
    console: Console,
    incidents: Incidents,
    resumed: Path | None,
    state: TrainState,
    started: float,
) -> dict[str, Any]:
    """From `state` to the end; what summary.json says."""
    training = open_training(config.data)
    with ExitStack() as stack:
        path = base_model(config, console, open_sft_workers)
        require_targets(config, path)
        fits = length_filter(config, path)
        stream = PromptStream(
            training,
            seed=config.train.seed,
            on_bad_row=config.data.on_bad_row,
            position=state.data_position,
            length_filter=fits,
            read_ahead=config.train.prompts_per_step if config.train.read_ahead else 0,
        )
        stack.callback(stream.close)
        held_out = eval_sets(config, fits)
        unasked = {exam.name for exam in held_out} - set(state.before or [exam.name for exam in held_out])
        if unasked:
            raise ResumeError(
                f"eval.also: {', '.join(sorted(unasked))} was not asked before the first step, so there is nothing to "
                "compare with; leave it out, and ask it by mode=eval when the run is done"
            )
        for exam in held_out:
            if len(exam.prompts) < (config.eval.questions or 0):
                console.say(f"{exam.name}: {len(exam.prompts)} held-out questions, no more than that")
        loop = stack.enter_context(open_loop(config))
        probes = held_out[0].prompts[: config.weights.audit_prompts]
        with console.phase("loading the rollout engines and the learner"):
            team = stack.enter_context(open_workers(config, path, probes, incidents, console.say, stream.upcoming))
            if resumed:
                team.learner.load(resumed)
        records = stack.enter_context(
            RunRecords(
                run_dir,
                wandb=config.wandb,
                config_yaml=to_yaml(config),
                environment=environment(),
                tell=incidents.tell,
                resume_step=state.step - 1,
            )
        )
        gauges = stack.enter_context(Gauges(run_dir))
        checkpoints = Checkpoints(
            run_dir, team, keep_last=config.train.keep_last, keep_best=config.train.keep_best, tell=incidents.tell
        )
        present = students(config, path, team)
        request = stack.enter_context(finishing_steps(incidents.tell))
        journal = RunCallbacks(
            config,
            present,
            stream,
            held_out,
            records,
            gauges.show,
            console,
            state.before,
            checkpoints,
            incidents,
            request,
        )
        stack.enter_context(console.training(config.train.steps, done=state.step))
        timeline = stack.enter_context(Timeline(run_dir / "trace.json", team, journal, steps=config.run.trace_steps))
        schedule = beta_schedule(config)
        loop(
            TracedWorkers(present),
            stream,
            steps=range(state.step, config.train.steps),
            recipe=recipe(config),
            schedule=schedule,
            schedule_state=schedule.resume(state.schedule_state),
            lr=lr_schedule(config),
            journal=timeline,
        )
        with console.phase("exporting the model"):
            team.export(run_dir / "export")
        summary = journal.summary() | {
            "seconds": time.monotonic() - started,
            "restarts": incidents.restarts,
            "export": "export",
            "report": "report.html",
        }
        records.summary(summary)
    return summary

"""mode=train and mode=sft: build the parts of a run, run the loop, export, and restart after a lost process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from othink_ray.config.load import to_yaml
from othink_ray.config.schema import Config
from othink_ray.data import PromptStream, open_training
from othink_ray.driver.async_loop import OVERLAP_THREADS, train_overlapped
from othink_ray.driver.build import (
    beta_schedule,
    length_filter,
    lr_schedule,
    open_demonstrations,
    open_sft_session,
    open_workers,
    recipe,
    require_targets,
)
from othink_ray.driver.callbacks import GRPOCallbacks, SFTCallbacks, Timeline
from othink_ray.driver.checkpoint import Checkpoints, ResumeError, compare_settings, find
from othink_ray.driver.console import Console
from othink_ray.driver.evaluate import eval_sets
from othink_ray.driver.loop import Callbacks, Workers, train
from othink_ray.driver.metrics import RunRecords
from othink_ray.driver.run_dir import environment, incident_log, set_aside_older
from othink_ray.driver.sft import SFTHooks, fine_tune
from othink_ray.driver.stopping import Stopped, finishing_steps, stop_requested
from othink_ray.driver.warm_start import base_model
from othink_ray.runtime.futures import ProcessLost
from othink_ray.runtime.monitoring import Gauges, Incidents
from othink_ray.runtime.worker_group import WorkerGroup
from othink_ray.types import TrainState


def train_model(
    config: Config, run_dir: Path, console: Console, write_report: Callable[[Path], Path], started: float
) -> None:
    """Train on a running Ray; when a process is lost that cannot be replaced alone, restart all processes.

    Training then resumes from the newest checkpoint, or from where this run began if it has saved none.
    """
    log = incident_log(run_dir, console.say)
    incidents = Incidents(config.faults.max_restarts, log)
    if config.run.resume == "never":
        set_aside_older(run_dir)
    resumed, state = find(run_dir, config.run.resume, config.train.seed, log)
    if resumed:
        compare_settings(resumed, config, console.say)
        console.say(f"resuming after step {state.step} of {config.train.steps}, from {resumed}")
    while True:
        try:
            summary = _train(config, run_dir, console, incidents, resumed, state, started)
            break
        except ProcessLost as error:
            incidents.restart("learner_restarts", error)
        newest, newest_state = find(run_dir, "auto", config.train.seed, log)
        resumed, state = (newest, newest_state) if newest else (resumed, state)
        if stop_requested():
            raise Stopped(f"a process was lost in this step; run.resume=auto resumes after step {state.step}")
        log(f"restarting all processes; training resumes after step {state.step}")
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
    """Train from `state` to the last step and export; return the content of summary.json."""
    training = open_training(config.data)
    with ExitStack() as stack:
        path = base_model(config, console, open_sft_session)
        require_targets(config, path)
        fits = length_filter(config, path)
        stream = PromptStream(
            training,
            seed=config.train.seed,
            on_bad_row=config.data.on_bad_row,
            position=state.data_position,
            length_filter=fits,
            prefetch=config.train.prompts_per_step if config.train.prefetch_prompts else 0,
        )
        stack.callback(stream.close)
        held_out = eval_sets(config, fits)
        names = {eval_set.name for eval_set in held_out}
        new = names - set(state.before or names)
        if new:
            raise ResumeError(
                f"eval.also: {', '.join(sorted(new))} was not evaluated before the first step, so there is "
                "no baseline; restore eval.also and data.blind, and evaluate the export with mode=eval after the run"
            )
        for eval_set in held_out:
            if len(eval_set.prompts) < (config.eval.questions or 0):
                console.say(
                    f"{eval_set.name}: only {len(eval_set.prompts)} held-out questions, "
                    f"fewer than eval.questions = {config.eval.questions}"
                )
        loop = stack.enter_context(open_loop(config))
        probes = held_out[0].prompts[: config.weights.audit_prompts]
        with console.phase("loading the rollout engines and the learner"):
            workers = stack.enter_context(open_workers(config, path, probes, incidents, console.say))
            if resumed:
                workers.learner.load(resumed)
        records = stack.enter_context(
            RunRecords(
                run_dir,
                wandb=config.wandb,
                config_yaml=to_yaml(config),
                environment=environment(),
                log=incidents.log,
                resume_step=state.step - 1,
            )
        )
        gauges = stack.enter_context(Gauges(run_dir))
        checkpoints = Checkpoints(
            run_dir, workers, keep_last=config.train.keep_last, keep_best=config.train.keep_best, log=incidents.log
        )
        request = stack.enter_context(finishing_steps(incidents.log))
        callbacks = (SFTCallbacks if config.mode == "sft" else GRPOCallbacks)(
            config,
            workers,
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
        timeline = stack.enter_context(
            Timeline(run_dir / "trace.json", workers, callbacks, steps=config.run.trace_steps)
        )
        loop(
            workers,
            stream,
            path=path,
            steps=range(state.step, config.train.steps),
            schedule_state=state.schedule_state,
            callbacks=timeline,
        )
        with console.phase("exporting the model"):
            workers.export(run_dir / "export")
        summary = callbacks.summary() | {
            "seconds": time.monotonic() - started,
            "restarts": incidents.restarts,
            "export": "export",
            "report": "report.html",
        }
        records.summary(summary)
    return summary


class OpenLoop(Protocol):
    """A training loop; `path` is the model's folder, `schedule_state` that of the last checkpoint."""

    def __call__(
        self,
        workers: Any,
        stream: PromptStream,
        *,
        path: str,
        steps: range,
        schedule_state: Mapping[str, float],
        callbacks: Any,
    ) -> None: ...


@contextmanager
def open_loop(config: Config) -> Iterator[OpenLoop]:
    """Yield the loop of the configured mode: `train`, `train_overlapped` with its thread pool, or `fine_tune`.

    Open it before the workers: on exit the pool joins its threads, and after a failure a thread that waits for a worker
    process ends only when that process does.
    """
    if config.mode == "sft":
        yield partial(_run_sft, config)
    elif config.train.overlap:
        with ThreadPoolExecutor(max_workers=OVERLAP_THREADS, thread_name_prefix="overlap") as executor:
            overlapped = partial(train_overlapped, executor, prefetch_update=config.train.prefetch_update)
            yield partial(_run_grpo, config, overlapped)
    else:
        yield partial(_run_grpo, config, train)


def _run_grpo(
    config: Config,
    loop: Callable[..., None],
    workers: Workers,
    stream: PromptStream,
    *,
    path: str,
    steps: range,
    schedule_state: Mapping[str, float],
    callbacks: Callbacks,
) -> None:
    schedule = beta_schedule(config)
    loop(
        workers,
        stream,
        steps=steps,
        recipe=recipe(config),
        schedule=schedule,
        schedule_state=schedule.resume(schedule_state),
        lr=lr_schedule(config),
        callbacks=callbacks,
    )


def _run_sft(
    config: Config,
    workers: WorkerGroup,
    stream: PromptStream,
    *,
    path: str,
    steps: range,
    schedule_state: Mapping[str, float],
    callbacks: SFTHooks,
) -> None:
    fine_tune(
        workers.learner,
        open_demonstrations(config, path),
        stream,
        steps=steps,
        batch_size=config.train.prompts_per_step,
        lr=lr_schedule(config),
        callbacks=callbacks,
    )

"""Entry point of mode=train, sft and eval: start Ray, run the mode, and turn expected errors into one line."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import import_module
from io import StringIO
from pathlib import Path
from shutil import disk_usage
from tempfile import gettempdir

from othink_ray.config.schema import Config
from othink_ray.driver.console import Console
from othink_ray.driver.exit_reporter import ExitReporter
from othink_ray.driver.live_console import open_console
from othink_ray.driver.run_dir import FolderError, lock_run_dir
from othink_ray.driver.stopping import (
    Stopped,
    interrupted,
    interrupted_status,
    interruptible,
    join_unless_interrupted,
)
from othink_ray.runtime.cluster import (
    close_token_file,
    kill_children,
    kill_local_ray,
    ray_agents,
    ray_job_notice,
    ray_session,
    set_ray_environment,
    watch_ray,
)

WriteReport = Callable[[Path], Path]
_RESUME_HINT = "the same command with run.resume=auto resumes the run"
_FULL_BYTES = 2**24  # a disk with less free space than this counts as full


def run(config: Config, write_report: WriteReport) -> int:
    """Run and return the exit status; an error that the user can fix is printed as one line, without a traceback."""
    run_dir = Path(config.run.dir)
    imports = threading.Thread(target=_import_in_background, daemon=True)
    with open_console() as console:
        try:
            with lock_run_dir(run_dir):  # before a process starts, and before a file of another run is overwritten
                status = _run(config, run_dir, console, write_report, imports)
        except FolderError as error:
            console.say(f"stopped: {error}")
            return 1
    if interrupted() and imports.is_alive():
        # An interrupt during Ray's start can leave a lock of Python's held, and exit hooks would wait for it forever.
        kill_children()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    return status


def _run(config: Config, run_dir: Path, console: Console, write_report: WriteReport, imports: threading.Thread) -> int:
    records_file = "evaluation.json" if config.mode == "eval" else "metrics.jsonl"
    try:
        with interruptible(), ExitReporter(run_dir, records_file, write_report, _RESUME_HINT) as reporter:
            for notice in (ray_job_notice(), close_token_file()):
                if notice:
                    console.say(notice)
            _work(config, run_dir, console, write_report, imports, reporter)
    except Stopped as error:
        console.say(f"stopped on request: {error}")
        status = 143
    except (KeyboardInterrupt, Exception) as error:
        if interrupted() or isinstance(error, KeyboardInterrupt):
            console.say("interrupted")
            status = interrupted_status()
        elif isinstance(error, _expected_errors()):
            console.say(f"stopped: {_message(error, run_dir)}")
            status = 1
        else:
            raise
    else:
        return 0
    _write_partial_report(run_dir, console, write_report, records_file)
    return status


def _work(
    config: Config,
    run_dir: Path,
    console: Console,
    write_report: WriteReport,
    imports: threading.Thread,
    reporter: ExitReporter,
) -> None:
    started = time.monotonic()
    set_ray_environment(config.cluster)  # before the background imports, which import Ray
    with ExitStack() as stack:
        with console.phase("starting Ray"):
            imports.start()
            stack.enter_context(ray_session(config.cluster))
            reporter.end_with_driver(ray_agents())
            join_unless_interrupted(imports)  # an interrupt lost in it may have left the import lock held
        stack.enter_context(watch_ray(lambda reason: _exit_without_ray(reason, console, reporter)))
        if config.mode == "eval":
            from othink_ray.driver.evaluate import evaluate_models

            evaluate_models(config, run_dir, console, write_report, started)
        else:
            from othink_ray.driver.training import train_model

            train_model(config, run_dir, console, write_report, started)


def _import_in_background() -> None:
    """Import torch and transformers while Ray starts; an import error is raised again where the module is used."""
    with suppress(Exception):
        for package in ("driver.build", "families"):
            import_module(f"othink_ray.{package}")


def _expected_errors() -> tuple[type[Exception], ...]:
    from othink_ray.data import BadRow, SourceError
    from othink_ray.driver.callbacks import RunawayError
    from othink_ray.driver.checkpoint import ResumeError
    from othink_ray.engines.learner_checkpoint import StateError
    from othink_ray.engines.lora import AdapterError
    from othink_ray.families.base import ModelError
    from othink_ray.runtime.cluster import ClusterError
    from othink_ray.runtime.futures import WorkerFailed
    from othink_ray.weights import AuditError

    return (
        *(AuditError, BadRow, ClusterError, ModelError, OSError, ResumeError, RunawayError, SourceError),
        *(AdapterError, StateError, WorkerFailed),
    )


def _message(error: Exception, run_dir: Path) -> str:
    """Return the error's text; for a full disk, which actors report with a traceback, its first line and the remedy."""
    text = str(error)
    if not any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT)):
        return text
    disks = (run_dir, Path(gettempdir()), Path("/dev/shm"))
    full = [str(disk) for disk in disks if disk.exists() and disk_usage(disk).free < _FULL_BYTES]
    return f"{text.splitlines()[0]}; free space in {' and '.join(full) or 'the full file system'}, then {_RESUME_HINT}"


def _exit_without_ray(reason: str, console: Console, reporter: ExitReporter) -> None:
    """Report and exit from the watchdog thread: the main thread may block in a Ray call until Ray exits the process."""
    try:
        console.close()
        sys.stdout = StringIO()  # silences Ray, which prints the last lines of the raylet's log
        reporter.report(reason)
        kill_local_ray()
        reporter.wait()
    finally:
        os._exit(1)


def _write_partial_report(run_dir: Path, console: Console, write_report: WriteReport, records_file: str) -> None:
    """Write the report of a run that stopped early, if it has any records."""
    try:
        if (run_dir / records_file).is_file():
            console.say(f"partial report: {write_report(run_dir)}")
    except OSError as error:  # for example, the disk is full
        console.say(f"the report could not be written: {error}")

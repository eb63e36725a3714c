"""A run of any mode: Ray and the libraries come up, the mode's own work follows, and what ends it is told in a line."""

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
from othink_ray.driver.folder import FolderError, own_folder
from othink_ray.driver.stopping import Stopped, interrupted, interrupted_status, interruptible
from othink_ray.runtime.cluster import close_token_file, prepare, ray_session
from othink_ray.runtime.job import short_notice
from othink_ray.runtime.watch import agents, kill_children, kill_own_ray, watching

WriteReport = Callable[[Path], Path]
_GOES_ON = "the same command with run.resume=auto goes on"
_FULL_BYTES = 2**24  # less than this free: the disk is as good as full


def run(config: Config, write_report: WriteReport) -> int:
    """Its exit status. What a user can mend is told in a line, not in a traceback."""
    run_dir = Path(config.run.dir)
    imports = threading.Thread(target=_import_beside, daemon=True)
    with Console() as console:
        try:
            with own_folder(run_dir):  # before anything starts, and before anything is written into another run's
                status = _run(config, run_dir, console, write_report, imports)
        except FolderError as error:
            console.say(f"stopped: {error}")
            return 1
    if interrupted() and imports.is_alive():
        # An interrupt while Ray started can leave one of Python's locks held, for which exit hooks would wait.
        kill_children()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    return status


def _run(config: Config, run_dir: Path, console: Console, write_report: WriteReport, imports: threading.Thread) -> int:
    records_file = "evaluation.json" if config.mode == "eval" else "metrics.jsonl"
    try:
        with interruptible(), ExitReporter(run_dir, records_file, write_report, _GOES_ON) as reporter:
            for notice in (short_notice(), close_token_file()):
                if notice:
                    console.say(notice)
            _work(config, run_dir, console, write_report, imports, reporter)
    except Stopped as error:
        console.say(f"ended as asked: {error}")
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
    _report_what_there_is(run_dir, console, write_report, records_file)
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
    prepare(config.cluster)  # before the imports beside it: they bring Ray with them
    with ExitStack() as stack:
        with console.phase("starting Ray"):
            imports.start()
            stack.enter_context(ray_session(config.cluster))
            reporter.end_with_driver(agents())
            imports.join()
        stack.enter_context(watching(lambda what: _end_without_ray(what, console, reporter)))
        if config.mode == "eval":
            from othink_ray.driver.examine import examine

            examine(config, run_dir, console, write_report, started)
        else:
            from othink_ray.driver.training import train_model

            train_model(config, run_dir, console, write_report, started)


def _import_beside() -> None:
    """Torch and transformers take seconds too; what fails here is raised again where it is needed."""
    with suppress(Exception):
        for room in ("driver.build", "families"):
            import_module(f"othink_ray.{room}")


def _expected_errors() -> tuple[type[Exception], ...]:
    from othink_ray.data import BadRow, SourceError
    from othink_ray.driver.checkpoint import ResumeError
    from othink_ray.driver.guards import RunawayError
    from othink_ray.engines.adapters import AdapterError
    from othink_ray.engines.learner_state import StateError
    from othink_ray.families.base import ModelError
    from othink_ray.runtime.calls import WorkerFailed
    from othink_ray.runtime.cluster import ClusterError
    from othink_ray.weights.audit import AuditError

    return (
        *(AuditError, BadRow, ClusterError, ModelError, OSError, ResumeError, RunawayError, SourceError),
        *(AdapterError, StateError, WorkerFailed),
    )


def _message(error: Exception, run_dir: Path) -> str:
    """The text of the error; of a full disk, which actors forward as text with a traceback, one line and the remedy."""
    text = str(error)
    if not any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT)):
        return text
    disks = (run_dir, Path(gettempdir()), Path("/dev/shm"))
    full = [str(disk) for disk in disks if disk.exists() and disk_usage(disk).free < _FULL_BYTES]
    return f"{text.splitlines()[0]}; make room in {' and '.join(full) or 'it'}, then {_GOES_ON}"


def _end_without_ray(what: str, console: Console, reporter: ExitReporter) -> None:
    """Runs in the watching thread: the main thread may be blocked in a Ray call until Ray exits the process."""
    try:
        console.close()
        sys.stdout = StringIO()  # of Ray, which prints the last lines of the raylet's log
        reporter.report(what)
        kill_own_ray()
        reporter.wait()
    finally:
        os._exit(1)


def _report_what_there_is(run_dir: Path, console: Console, write_report: WriteReport, records_file: str) -> None:
    """So that a run that failed can be read like one that did not."""
    try:
        if (run_dir / records_file).is_file():
            console.say(f"report of what was done: {write_report(run_dir)}")
    except OSError as error:  # where the disk is full there is no room for a report either
        console.say(f"no report could be written: {error}")

"""A run of any mode: Ray and the libraries come up, the mode's own work follows, and what ends it is told in a line."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import import_module
from io import StringIO
from pathlib import Path
from threading import Thread

from othink_ray.config.schema import Config
from othink_ray.driver.console import Console
from othink_ray.driver.folder import FolderError, own_folder
from othink_ray.driver.last_words import LastWords
from othink_ray.driver.stopping import Stopped, interrupted_status, interruptible
from othink_ray.runtime.cluster import close_token_file, prepare, ray_session
from othink_ray.runtime.job import short_notice
from othink_ray.runtime.watch import kill_own_ray, watching

WriteReport = Callable[[Path], Path]


def run(config: Config, write_report: WriteReport) -> int:
    """Its exit status. What a user can mend is told in a line, not in a traceback."""
    run_dir = Path(config.run.dir)
    with Console() as console:
        try:
            with own_folder(run_dir):  # before anything starts, and before anything is written into another run's
                return _run(config, run_dir, console, write_report)
        except FolderError as error:
            console.say(f"stopped: {error}")
            return 1


def _run(config: Config, run_dir: Path, console: Console, write_report: WriteReport) -> int:
    made_of = "evaluation.json" if config.mode == "eval" else "metrics.jsonl"
    try:
        with interruptible(), LastWords(run_dir, made_of, write_report) as last_words:
            for notice in (short_notice(), close_token_file()):
                if notice:
                    console.say(notice)
            _work(config, run_dir, console, write_report, last_words)
    except KeyboardInterrupt:
        console.say("interrupted")
        return _leave(run_dir, console, write_report, made_of, interrupted_status())
    except Stopped as error:
        console.say(f"ended as asked: {error}")
        return _leave(run_dir, console, write_report, made_of, status=143)
    except _told_in_a_line() as error:
        console.say(f"stopped: {error}{_remedy(error, run_dir)}")
        return _leave(run_dir, console, write_report, made_of, status=1)
    return 0


def _work(config: Config, run_dir: Path, console: Console, write_report: WriteReport, last_words: LastWords) -> None:
    started = time.monotonic()
    prepare(config.cluster)  # before the imports beside it: they bring Ray with them
    with ExitStack() as stack:
        with console.phase("starting Ray"):
            # A daemon, which nothing waits for after an interrupt: raised within an import of this thread, that can
            # leave Python's import lock held for good.
            imports = Thread(target=_import_beside, daemon=True)
            imports.start()
            stack.enter_context(ray_session(config.cluster))
            imports.join()
        stack.enter_context(watching(lambda what: _end_without_ray(what, console, last_words)))
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


def _told_in_a_line() -> tuple[type[Exception], ...]:
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


def _remedy(error: Exception, run_dir: Path) -> str:
    """For errors of the system, which have none in their text; other processes hand them on in theirs."""
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        return f"; make room for {run_dir}, then the same command with run.resume=auto goes on"
    return ""


def _end_without_ray(what: str, console: Console, last_words: LastWords) -> None:
    """Runs in the watching thread: the main thread may be blocked in a Ray call until Ray exits the process."""
    try:
        console.close()
        sys.stdout = StringIO()  # of Ray, which prints the last lines of the raylet's log
        last_words.tell(f"{what}; the same command with run.resume=auto goes on when Ray is there again")
        kill_own_ray()
        last_words.wait()
    finally:
        os._exit(1)


def _leave(run_dir: Path, console: Console, write_report: WriteReport, made_of: str, status: int) -> int:
    """Make a report of what there is, so that a run that failed can be read like one that did not."""
    try:
        if (run_dir / made_of).is_file():
            console.say(f"report of what was done: {write_report(run_dir)}")
    except OSError as error:  # where the disk is full there is no room for a report either
        console.say(f"no report could be written: {error}")
    return status

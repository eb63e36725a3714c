"""Ends real runs in every known way and tabulates exit status, last line, files and what a restart does."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.drills.endings_table import (
    IN_A_STEP,
    IN_A_STUDY,
    SETTINGS,
    STEPS,
    STUDY,
    Ended,
    Table,
    goes_on,
    last_line,
    on_disk,
)
from tests.drills.environment import keep_full, small_disk
from tests.drills.faults import processes_of
from tests.drills.harness import Harness, Outcome
from tests.drills.job_endings import end_ray_jobs, end_slurm_jobs
from tests.drills.slurm import missing_slurm

Strike = Callable[[psutil.Process, Path], None]  # (driver, run.dir)
_AT_THE_END = f"held-out accuracy after step {STEPS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A fault, the start of the output line after which it is injected, and the expected exit status."""

    what: str
    when: str
    strike: Strike
    status: int
    at_once: bool = False  # else at a random moment of the next second
    keys: tuple[str, ...] = ()
    faked_clock: bool = False
    small_disk: bool = False


def nothing(run: psutil.Process, run_dir: Path) -> None:
    """Leave the run undisturbed."""


def tell(*signals: signal.Signals) -> Strike:
    def strike(run: psutil.Process, run_dir: Path) -> None:
        for each in signals:
            run.send_signal(each)
            time.sleep(0.3)

    return strike


def kill(words: str) -> Strike:
    """Return a strike that kills (-9) the first descendant of the driver whose command matches `words`."""

    def strike(run: psutil.Process, run_dir: Path) -> None:
        for process in run.children(recursive=True):
            command = process.cmdline()[:3]
            if any(part.startswith(words) or part.endswith(f"/{words}") for part in command):
                return process.kill()
        raise AssertionError(f"no {words} below the driver")

    return strike


def kill_role(role: str) -> Strike:
    def strike(run: psutil.Process, run_dir: Path) -> None:
        processes_of(role, run)[0].kill()

    return strike


def insist(run: psutil.Process, run_dir: Path) -> None:
    """Send SIGTERM twice while a rollout process hangs and the step cannot finish."""
    processes_of("rollout", run)[0].suspend()
    run.terminate()
    time.sleep(2.5)
    run.terminate()


def fill(run: psutil.Process, run_dir: Path) -> None:
    """Fill the disk for good."""
    keep_full(run_dir.parent)


def jump(run: psutil.Process, run_dir: Path) -> None:
    """Set the wall clock a day ahead from now on."""
    _clock(run_dir).write_text("+1d\n")


def missing_for_endings() -> str | None:
    """The reason why this machine cannot run the drill, or None."""
    if reason := missing_slurm():
        return reason
    missing = [name for name, is_here in (("libfaketime", _FAKETIME), ("gcc", shutil.which("cc"))) if not is_here]
    return f"{' and '.join(missing)} missing: apt-get install {' '.join(missing)}" if missing else None


def _clock(run_dir: Path) -> Path:
    return run_dir.parent / f"{run_dir.name}.clock"


# libfaketime 0.9.10 breaks waits on the monotonic clock when that is not faked: route these to the C library.
_REAL_WAITS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>
static void *real(const char *name) { return dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), name); }
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    static int (*wait)(clockid_t, int, const struct timespec *, struct timespec *);
    if (!wait) wait = real("clock_nanosleep");
    return wait(clock, flags, until, left);
}
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!wait) wait = real("pthread_cond_timedwait");
    return wait(condition, mutex, until);
}
"""
_FAKETIME = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
_TERM, _INT, _KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
_LOADING = "loading the rollout engines"
_NEW_BASE = ("run.cache_dir={folder}/fresh",)  # so that the tiny model is pretrained first
ENDINGS = (
    Ending(what="nothing", when=IN_A_STEP, strike=nothing, status=0),
    Ending(what="Ctrl-C in a step", when=IN_A_STEP, strike=tell(_INT), status=130),
    Ending(what="Ctrl-C twice in a step", when=IN_A_STEP, strike=tell(_INT, _INT), status=130),
    Ending(what="Ctrl-C while loading", when=_LOADING, strike=tell(_INT), status=130),
    Ending(what="SIGTERM while Ray starts", when="starting Ray", strike=tell(_TERM), status=143),
    Ending(what="SIGTERM in the warm start", when="base model", strike=tell(_TERM), status=143, keys=_NEW_BASE),
    Ending(what="SIGTERM while loading", when=_LOADING, strike=tell(_TERM), status=143),
    Ending(what="SIGTERM in a step", when=IN_A_STEP, strike=tell(_TERM), status=143),
    Ending(what="SIGTERM twice in a step that hangs", when=IN_A_STEP, strike=insist, status=143),
    Ending(what="SIGTERM after the last step", when=_AT_THE_END, strike=tell(_TERM), status=0, at_once=True),
    Ending(what="SIGTERM, mode=sft", when=IN_A_STEP, strike=tell(_TERM), status=143, at_once=True, keys=("mode=sft",)),
    Ending(what="SIGTERM, mode=eval", when="evaluating", strike=tell(_TERM), status=143, keys=("mode=eval",)),
    Ending(what="Ctrl-C, mode=study", when=IN_A_STUDY, strike=tell(_INT), status=130, keys=STUDY),
    Ending(what="SIGTERM, mode=study", when=IN_A_STUDY, strike=tell(_TERM), status=143, keys=STUDY),
    Ending(what="kill -9 of a study", when=IN_A_STUDY, strike=tell(_KILL), status=-9, keys=STUDY),
    Ending(what="kill -9 of the driver", when=IN_A_STEP, strike=tell(_KILL), status=-9),
    Ending(what="kill -9 of Ray's raylet", when=IN_A_STEP, strike=kill("raylet"), status=1),
    Ending(what="kill -9 of Ray's GCS", when=IN_A_STEP, strike=kill("gcs_server"), status=1),
    Ending(what="kill -9 of Ray's dashboard", when=IN_A_STEP, strike=kill("dashboard.py"), status=0),
    Ending(what="kill -9 of Ray's log monitor", when=IN_A_STEP, strike=kill("log_monitor.py"), status=0),
    Ending(what="kill -9 of Ray's autoscaler", when=IN_A_STEP, strike=kill("monitor.py"), status=0),
    Ending(what="kill -9 of Ray's dashboard agent", when=IN_A_STEP, strike=kill("ray::DashboardAgent"), status=1),
    Ending(what="kill -9 of Ray's runtime env agent", when=IN_A_STEP, strike=kill("ray::RuntimeEnvAgent"), status=1),
    Ending(what="kill -9 of a rollout actor", when=IN_A_STEP, strike=kill_role("rollout"), status=0),
    Ending(what="kill -9 of a learner rank", when=IN_A_STEP, strike=kill_role("learner"), status=0),
    Ending(what="kill -9 of a reward actor", when=IN_A_STEP, strike=kill_role("reward"), status=0),
    Ending(what="disk full while Ray starts", when="starting Ray", strike=fill, status=1, small_disk=True),
    Ending(what="disk full while loading", when=_LOADING, strike=fill, status=1, small_disk=True),
    Ending(what="disk full from a step on", when=IN_A_STEP, strike=fill, status=1, small_disk=True),
    Ending(
        what="disk full after the last step", when=_AT_THE_END, strike=fill, status=1, at_once=True, small_disk=True
    ),
    Ending(what="the clock jumps a day ahead", when=IN_A_STEP, strike=jump, status=0, faked_clock=True),
)


def end_in_every_way(harness: Harness) -> list[Outcome]:
    """Do each of ENDINGS once, then the endings of jobs; write the table to endings.md."""
    dice = random.Random(harness.seed)
    table = Table(harness.folder / "endings.md")
    for number, ending in enumerate(ENDINGS):
        table.add(ending.what, observe(harness, number, ending, dice.uniform(0.0, 1.0)))
    for jobs in (end_slurm_jobs, end_ray_jobs):
        for what, ended in jobs(harness, dice):
            table.add(what, ended)
    return table.outcomes


def observe(harness: Harness, number: int, ending: Ending, after_s: float) -> Ended:
    """Run once with the fault injected, then run the same command again; return what was observed."""
    folder = harness.folder / f"ending_{number}"
    run_dir = folder / folder.name
    keys = [*SETTINGS, *(key.format(folder=folder) for key in ending.keys)]
    around: AbstractContextManager[None] = small_disk(folder, 100) if ending.small_disk else nullcontext(folder.mkdir())
    with around, _faked_clock(run_dir) if ending.faked_clock else nullcontext({}) as environment:
        run = harness.start(run_dir, *keys, environment=environment)
        screen = harness.screen(run_dir)
        while run.poll() is None and not re.search(f"^{re.escape(ending.when)}", screen.read_text(), re.MULTILINE):
            time.sleep(0.01)
        time.sleep(0 if ending.at_once else after_s)
        driver = psutil.Process(run.pid)
        children = driver.children(recursive=True)
        if run.poll() is None:
            ending.strike(driver, run_dir)
        status = harness.finish(run)
        _, left = psutil.wait_procs(children, timeout=30)
        output = screen.read_text()
        there = on_disk(run_dir)
        (folder / "ballast").unlink(missing_ok=True)
        again = harness.finish(harness.start(run_dir, *keys))
    faults = {
        f"exit status {status}, not {ending.status}": status != ending.status,
        "a traceback": re.search(r"Traceback|\^\^\^", output) is not None,
        f"left behind: {left}": bool(left),
        f"the next command ended with {again}": again != 0,
    }
    return Ended(
        status=str(status),
        last_line=last_line(output, run_dir),
        on_disk=there,
        next_command=goes_on(screen.read_text()[len(output) :]),
        wrong="; ".join(what for what, is_so in faults.items() if is_so),
    )


@contextmanager
def _faked_clock(run_dir: Path) -> Iterator[Mapping[str, str]]:
    """Yield environment variables that fake a process's wall clock from a file; its monotonic clock stays real."""
    _clock(run_dir).write_text("+0\n")
    waits = run_dir.parent / "waits.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", waits], input=_REAL_WAITS, text=True, check=True)
    yield {
        "LD_PRELOAD": f"{waits}:{_FAKETIME[0]}",
        "FAKETIME_TIMESTAMP_FILE": str(_clock(run_dir)),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }

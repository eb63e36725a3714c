"""Drills of faults in the environment: a disk that is full for a while, a host that loses its network."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from tests.drills.faults import steps_done
from tests.drills.harness import APART, RECOVERY_STEPS, Harness, Outcome, incident_times
from tests.drills.hosts import Hosts, two_hosts


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a small file system at `folder`; needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Keep the disk full inside the context."""
    ballast = fill_up(disk)
    yield
    ballast.unlink()


def fill_up(disk: Path) -> Path:
    """Fill the disk but for a part of a page; return the file that fills it."""
    ballast = disk / "ballast"
    ballast.touch()
    _grow(ballast)
    return ballast


def keep_full(disk: Path) -> None:
    """Keep the disk full, even as other files are removed, until its `ballast` is."""
    ballast = fill_up(disk)

    def keep() -> None:
        with suppress(FileNotFoundError):
            while True:
                _grow(ballast)
                time.sleep(0.02)

    threading.Thread(target=keep, daemon=True).start()


def _grow(ballast: Path) -> None:
    with ballast.open("r+b", buffering=0) as file:
        file.seek(0, os.SEEK_END)
        for size in (2**20, 2**12):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def fill_the_disk(harness: Harness) -> list[Outcome]:
    """Fill the run's disk each time until the run reports that a checkpoint could not be written."""
    dice, fault_times, noticed_at, due = random.Random(harness.seed), [], [], 1
    with small_disk(harness.folder / "disk", megabytes=400):
        run_dir = harness.folder / "disk" / "disk_full"
        run = harness.start(run_dir)

        complaints = partial(_count, harness.screen(run_dir), "could not be written")
        for number in range(harness.times):
            _wait(run, partial(steps_done, run_dir), max(1 + APART * number, due))
            time.sleep(dice.uniform(0.0, 1.0))
            with full(harness.folder / "disk"):
                fault_times.append(time.time())
                _wait(run, complaints, complaints() + 1)
                noticed_at.append(time.time())
            due = steps_done(run_dir) + RECOVERY_STEPS
        status = harness.finish(run)
        return harness.outcomes(run_dir, "disk full for a while", fault_times, status, noticed_at)


def pull_the_cable(harness: Harness) -> list[Outcome]:
    """Disconnect the host of one of two rollout actors; the run waits for it, or once goes on without it."""
    with ExitStack() as stack:
        folders = {name: harness.folder / name for name in ("head_only", "home")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        hosts = stack.enter_context(two_hosts(cpus=1, head_only=folders["head_only"], home=folders["home"]))

        def start(run_dir: Path, *settings: str) -> subprocess.Popen[bytes]:
            cluster = (
                "rollout=hf",
                "rollout.num_actors=2",
                "cluster.placement=SPREAD",
                f"cluster.address={hosts.address}",
            )
            return harness.start(run_dir, *cluster, *settings, before=hosts.on("head"), environment=hosts.environment)

        baseline = harness.folder / "two_hosts_baseline"
        assert harness.finish(start(baseline)) == 0, harness.screen(baseline).read_text()
        found = []
        for lost_node, times in (("wait", harness.times), ("continue", 1)):
            run_dir = harness.folder / f"cable_pulled_{lost_node}"
            run = start(run_dir, f"faults.lost_node={lost_node}")
            fault_times = _cuts(harness, run, run_dir, hosts, times, back=lost_node == "wait")
            status = harness.finish(run)
            fault = f"cable pulled, lost_node={lost_node}"
            found += harness.outcomes(
                run_dir, fault, fault_times, status, incident_times(run_dir), baseline=baseline, times=times
            )
        return found


def _cuts(
    harness: Harness, run: subprocess.Popen[bytes], run_dir: Path, hosts: Hosts, times: int, *, back: bool
) -> list[float]:
    """Pull the cable `times` times, and with `back` plug it in again; return the times of the pulls."""
    dice, fault_times, due = random.Random(harness.seed), [], 1
    for number in range(times):
        _wait(run, partial(steps_done, run_dir), max(1 + APART * number, due))
        time.sleep(dice.uniform(0.0, 1.0))
        hosts.cable("down")
        fault_times.append(time.time())
        if back:
            _wait(run, partial(_count, harness.screen(run_dir), "waiting for the cluster: "), number + 1)
            hosts.cable("up")
            hosts.bring_worker()
        due = steps_done(run_dir) + RECOVERY_STEPS
    return fault_times


def _count(screen: Path, words: str) -> int:
    return screen.read_text().count(words)


def _wait(run: subprocess.Popen[bytes], count: Callable[[], int], at_least: int) -> None:
    """Wait until the count is reached or the run is over."""
    while run.poll() is None and count() < at_least:
        time.sleep(0.02)

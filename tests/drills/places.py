"""Drills of faults around a run: a disk that is full for a while, a network cable that is pulled."""

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
from tests.drills.ground import APART, MENDED, Ground, Outcome, told_by
from tests.drills.hosts import Hosts, two_hosts


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[None]:
    """A real one, at `place`; needs root."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """For a while."""
    ballast = fill_up(disk)
    yield
    ballast.unlink()


def fill_up(disk: Path) -> Path:
    """Take all of it but a part of a page; returns the file that does."""
    ballast = disk / "ballast"
    ballast.touch()
    _grow(ballast)
    return ballast


def keep_full(disk: Path) -> None:
    """Until its `ballast` is removed, whatever else is."""
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


def fill_the_disk(ground: Ground) -> list[Outcome]:
    """Something else takes all that is left of it, until the run says that a checkpoint found no room."""
    dice, deeds, told, due = random.Random(ground.seed), [], [], 1
    with small_disk(ground.folder / "disk", megabytes=400):
        run_dir = ground.folder / "disk" / "disk_full"
        run = ground.start(run_dir)

        complaints = partial(_said, ground.screen(run_dir), "could not be written")
        for number in range(ground.times):
            _wait(run, partial(steps_done, run_dir), max(1 + APART * number, due))
            time.sleep(dice.uniform(0.0, 1.0))
            with full(ground.folder / "disk"):
                deeds.append(time.time())
                _wait(run, complaints, complaints() + 1)
                told.append(time.time())
            due = steps_done(run_dir) + MENDED
        status = ground.finish(run)
        return ground.outcomes(run_dir, "disk full for a while", deeds, status, told)


def pull_the_cable(ground: Ground) -> list[Outcome]:
    """Disconnect the host of one of two rollout actors; the run waits for it, or once goes on without it."""
    with ExitStack() as stack:
        places = {name: ground.folder / name for name in ("head_only", "home")}
        for place in places.values():
            place.mkdir(parents=True)
        hosts = stack.enter_context(two_hosts(cpus=1, head_only=places["head_only"], home=places["home"]))

        def start(run_dir: Path, *settings: str) -> subprocess.Popen[bytes]:
            own = ("rollout=hf", "rollout.num_actors=2", "cluster.placement=SPREAD", f"cluster.address={hosts.address}")
            return ground.start(run_dir, *own, *settings, before=hosts.on("head"), environment=hosts.environment)

        peaceful = ground.folder / "two_hosts_in_peace"
        assert ground.finish(start(peaceful)) == 0, ground.screen(peaceful).read_text()
        found = []
        for lost_node, times in (("wait", ground.times), ("continue", 1)):
            run_dir = ground.folder / f"cable_pulled_{lost_node}"
            run = start(run_dir, f"faults.lost_node={lost_node}")
            deeds = _cuts(ground, run, run_dir, hosts, times, back=lost_node == "wait")
            status = ground.finish(run)
            fault = f"cable pulled, lost_node={lost_node}"
            found += ground.outcomes(run_dir, fault, deeds, status, told_by(run_dir), peaceful=peaceful, times=times)
        return found


def _cuts(
    ground: Ground, run: subprocess.Popen[bytes], run_dir: Path, hosts: Hosts, times: int, *, back: bool
) -> list[float]:
    """When the cable was pulled."""
    dice, deeds, due = random.Random(ground.seed), [], 1
    for number in range(times):
        _wait(run, partial(steps_done, run_dir), max(1 + APART * number, due))
        time.sleep(dice.uniform(0.0, 1.0))
        hosts.cable("down")
        deeds.append(time.time())
        if back:
            _wait(run, partial(_said, ground.screen(run_dir), "waiting for the cluster: "), number + 1)
            hosts.cable("up")
            hosts.bring_worker()
        due = steps_done(run_dir) + MENDED
    return deeds


def _said(screen: Path, words: str) -> int:
    return screen.read_text().count(words)


def _wait(run: subprocess.Popen[bytes], count: Callable[[], int], at_least: int) -> None:
    """Or until the run is over."""
    while run.poll() is None and count() < at_least:
        time.sleep(0.02)

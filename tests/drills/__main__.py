"""Faults in real runs, again and again, and what became of them:  python -m tests.drills --help"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil

from tests.drills.endings import end_in_every_way, why_no_endings
from tests.drills.faults import ROLES, Fault, Saboteur, lines, processes_of, steps_done
from tests.drills.ground import APART, MENDED, Ground, Outcome, told_by
from tests.drills.hosts import why_not
from tests.drills.places import fill_the_disk, pull_the_cable
from tests.drills.slurm import let_time_run_out, why_no_slurm


def lose_processes(ground: Ground, role: str, how: signal.Signals) -> list[Outcome]:
    """Two rollout actors and one learner rank lose a process at random moments; the run mends itself each time."""
    faults = [Fault(role, how, 1 + APART * number) for number in range(ground.times)]
    run_dir = ground.folder / f"{role}_{how.name}"
    run = ground.start(run_dir, "rollout.num_actors=2")
    with Saboteur(psutil.Process(run.pid), run_dir, faults, ground.seed, apart=MENDED) as saboteur:
        status = ground.finish(run)
    deeds, told = [deed for _, deed in saboteur.done], told_by(run_dir)
    return ground.outcomes(run_dir, str(faults[0]), deeds, status, told)


def lose_the_driver(ground: Ground) -> list[Outcome]:
    """kill -9 at random moments, and the same command again with run.resume=auto."""
    dice, deeds, due = random.Random(ground.seed), [], 1
    run_dir = ground.folder / "driver"
    run = ground.start(run_dir, "run.resume=auto")
    for number in range(ground.times):
        while steps_done(run_dir) < max(1 + APART * number, due) and run.poll() is None:
            time.sleep(0.02)
        time.sleep(dice.uniform(0.0, 1.0))
        run.kill()
        run.wait()
        deeds.append(time.time())
        due = steps_done(run_dir) + MENDED
        run = ground.start(run_dir, "run.resume=auto")
    status = ground.finish(run)
    # Nobody is there to notice it: what is told later is of something else.
    return ground.outcomes(run_dir, "kill -9 of the driver, then run.resume=auto", deeds, status, told=())


def soak(ground: Ground, minutes: float, every_s: float) -> Outcome:
    """One long run with a random fault every so often; in the end it is asked to go, and nothing may be left of it."""
    run_dir = ground.folder / "soak"
    dice = random.Random(0)
    run = ground.start(run_dir, "rollout.num_actors=2", "train.steps=100000", "train.checkpoint_every=5")
    driver = psutil.Process(run.pid)
    until, after, masked, told, sizes = time.time() + 60 * minutes, every_s, 0, 0, []
    while steps_done(run_dir) < 5 and run.poll() is None:
        time.sleep(0.5)
    while time.time() < until and run.poll() is None:
        time.sleep(after)
        sizes.append(driver.memory_info().rss / 2**20)
        role, how = dice.choice(list(ROLES)), dice.choice([signal.SIGKILL, signal.SIGSTOP])
        victims = processes_of(role, driver)
        if victims:
            dice.choice(victims).send_signal(how)
            told += 1
        after = dice.uniform(0.5, 1.5) * every_s
    below = driver.children(recursive=True)
    run.send_signal(signal.SIGTERM)
    status = ground.finish(run)
    _, left = psutil.wait_procs(below, timeout=30)
    found = [line["step"] for line in lines(run_dir)]
    masked = int(sum(line["faults/masked_answers"] for line in lines(run_dir)))
    discarded = run_dir / "metrics.discarded.jsonl"
    wrong = "; ".join(
        text
        for text, holds in (
            (f"ended with {status}", status == 143),
            (f"steps {found[:3]} … {found[-3:]}", found == list(range(len(found)))),
            (f"{len(left)} processes are left", not left),
            (f"driver grew from {sizes[0]:.0f} to {sizes[-1]:.0f} MB", sizes[-1] < sizes[0] + 100),
        )
        if not holds
    )
    return Outcome(
        fault=f"{told} faults in {minutes:g} minutes, {len(found)} steps",
        number=0,
        noticed_after_s=float("nan"),
        recovered_after_s=float("nan"),
        steps_lost=discarded.read_text().count("\n") if discarded.exists() else 0,
        samples_masked=masked,
        wrong=wrong,
    )


AROUND: dict[str, Callable[[Ground], list[Outcome]]] = {
    "disk_full": fill_the_disk,
    "cable_pulled": pull_the_cable,
    "slurm": let_time_run_out,
    "endings": end_in_every_way,
}
MISSING = {"disk_full": why_not, "cable_pulled": why_not, "slurm": why_no_slurm, "endings": why_no_endings}
DRILLS: dict[str, Callable[[Ground], list[Outcome]]] = {
    f"{role}_{name}": partial(lose_processes, role=role, how=how)
    for name, how in (("dies", signal.SIGKILL), ("hangs", signal.SIGSTOP))
    for role in ROLES
} | {"driver_dies": lose_the_driver, **AROUND}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make drills", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="each of them, one after the other in one run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="*", choices=list(DRILLS), default=list(DRILLS))
    parser.add_argument(
        "--soak", type=float, default=60, help="minutes of one run, a random fault each minute; 0: none"
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/drills"))
    asked = parser.parse_args(arguments)
    folder = asked.dir.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    ground = Ground(folder, asked.times, asked.seed)
    found: list[Outcome] = []

    def keep(more: Sequence[Outcome]) -> None:
        found.extend(more)
        print("\n".join(map(row, more)), flush=True)
        (folder / "drills.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")

    print(f"{'fault':<46}{'no.':>7}{'noticed':>10}{'recovered':>11}{'lost':>6}{'masked':>8}  as in peace", flush=True)
    for name in asked.only:
        if name in MISSING and (missing := MISSING[name]()):
            print(f"{name}: not done, {missing}", flush=True)
            continue
        keep(DRILLS[name](ground))
    if asked.soak:
        keep([soak(ground, asked.soak, every_s=60)])
    failed = sum(bool(one.wrong) for one in found)
    print(f"{len(found)} faults, {failed} of them in runs that went wrong; {folder / 'drills.json'}")
    return int(failed > 0)


def row(one: Outcome) -> str:
    times = f"{one.noticed_after_s:>8.1f} s{one.recovered_after_s:>9.1f} s"
    return f"{one.fault:<46}{one.number:>7}{times}{one.steps_lost:>6}{one.samples_masked:>8}  {one.wrong or 'yes'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

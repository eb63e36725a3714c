"""Inject faults into real runs, many times, and report how they recover:  python -m tests.drills --help"""

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

from tests.drills.endings import end_in_every_way, missing_for_endings
from tests.drills.environment import fill_the_disk, pull_the_cable
from tests.drills.faults import ROLES, Fault, Saboteur, lines, processes_of, steps_done
from tests.drills.harness import APART, RECOVERY_STEPS, Harness, Outcome, incident_times
from tests.drills.hosts import missing_namespaces
from tests.drills.slurm import let_time_run_out, missing_slurm


def lose_processes(harness: Harness, role: str, how: signal.Signals) -> list[Outcome]:
    """Lose processes of a role at random moments in a run that recovers each time."""
    faults = [Fault(role, how, 1 + APART * number) for number in range(harness.times)]
    run_dir = harness.folder / f"{role}_{how.name}"
    run = harness.start(run_dir, "rollout.num_actors=2")
    with Saboteur(psutil.Process(run.pid), run_dir, faults, harness.seed, apart=RECOVERY_STEPS) as saboteur:
        status = harness.finish(run)
    fault_times, noticed_at = [fault_time for _, fault_time in saboteur.done], incident_times(run_dir)
    return harness.outcomes(run_dir, str(faults[0]), fault_times, status, noticed_at)


def lose_the_driver(harness: Harness) -> list[Outcome]:
    """Kill the driver with -9 at random moments, then start the same command with run.resume=auto."""
    dice, fault_times, due = random.Random(harness.seed), [], 1
    run_dir = harness.folder / "driver"
    run = harness.start(run_dir, "run.resume=auto")
    for number in range(harness.times):
        while steps_done(run_dir) < max(1 + APART * number, due) and run.poll() is None:
            time.sleep(0.02)
        time.sleep(dice.uniform(0.0, 1.0))
        run.kill()
        run.wait()
        fault_times.append(time.time())
        due = steps_done(run_dir) + RECOVERY_STEPS
        run = harness.start(run_dir, "run.resume=auto")
    status = harness.finish(run)
    # No process is left to report the fault: later incidents have other causes.
    return harness.outcomes(run_dir, "kill -9 of the driver, then run.resume=auto", fault_times, status, noticed_at=())


def soak(harness: Harness, minutes: float, every_s: float) -> Outcome:
    """Run for long with random faults at intervals; SIGTERM at the end must leave no process."""
    run_dir = harness.folder / "soak"
    dice = random.Random(0)
    run = harness.start(run_dir, "rollout.num_actors=2", "train.steps=100000", "train.checkpoint_every=5")
    driver = psutil.Process(run.pid)
    until, after, masked, injected, sizes = time.time() + 60 * minutes, every_s, 0, 0, []
    while steps_done(run_dir) < 5 and run.poll() is None:
        time.sleep(0.5)
    while time.time() < until and run.poll() is None:
        time.sleep(after)
        sizes.append(driver.memory_info().rss / 2**20)
        role, how = dice.choice(list(ROLES)), dice.choice([signal.SIGKILL, signal.SIGSTOP])
        victims = processes_of(role, driver)
        if victims:
            dice.choice(victims).send_signal(how)
            injected += 1
        after = dice.uniform(0.5, 1.5) * every_s
    children = driver.children(recursive=True)
    run.send_signal(signal.SIGTERM)
    status = harness.finish(run)
    _, left = psutil.wait_procs(children, timeout=30)
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
        fault=f"{injected} faults in {minutes:g} minutes, {len(found)} steps",
        number=0,
        noticed_after_s=float("nan"),
        recovered_after_s=float("nan"),
        steps_lost=discarded.read_text().count("\n") if discarded.exists() else 0,
        samples_masked=masked,
        wrong=wrong,
    )


AROUND: dict[str, Callable[[Harness], list[Outcome]]] = {
    "disk_full": fill_the_disk,
    "cable_pulled": pull_the_cable,
    "slurm": let_time_run_out,
    "endings": end_in_every_way,
}
MISSING = {
    "disk_full": missing_namespaces,
    "cable_pulled": missing_namespaces,
    "slurm": missing_slurm,
    "endings": missing_for_endings,
}
DRILLS: dict[str, Callable[[Harness], list[Outcome]]] = {
    f"{role}_{name}": partial(lose_processes, role=role, how=how)
    for name, how in (("dies", signal.SIGKILL), ("hangs", signal.SIGSTOP))
    for role in ROLES
} | {"driver_dies": lose_the_driver, **AROUND}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make drills", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="faults per drill, one after the other in one run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--only", nargs="*", choices=list(DRILLS), default=list(DRILLS))
    parser.add_argument(
        "--soak", type=float, default=60, help="minutes of the long run, with a random fault each minute; 0: none"
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/drills"))
    options = parser.parse_args(arguments)
    folder = options.dir.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    harness = Harness(folder, options.times, options.seed)
    found: list[Outcome] = []

    def keep(more: Sequence[Outcome]) -> None:
        found.extend(more)
        print("\n".join(map(row, more)), flush=True)
        (folder / "drills.json").write_text(json.dumps([asdict(outcome) for outcome in found], indent=1) + "\n")

    print(f"{'fault':<46}{'no.':>7}{'noticed':>10}{'recovered':>11}{'lost':>6}{'masked':>8}  as baseline", flush=True)
    for name in options.only:
        if name in MISSING and (reason := MISSING[name]()):
            print(f"{name}: skipped, {reason}", flush=True)
            continue
        keep(DRILLS[name](harness))
    if options.soak:
        keep([soak(harness, options.soak, every_s=60)])
    failed = sum(bool(outcome.wrong) for outcome in found)
    print(f"{len(found)} faults, {failed} of them in failed runs; {folder / 'drills.json'}")
    return int(failed > 0)


def row(it: Outcome) -> str:
    times = f"{it.noticed_after_s:>8.1f} s{it.recovered_after_s:>9.1f} s"
    return f"{it.fault:<46}{it.number:>7}{times}{it.steps_lost:>6}{it.samples_masked:>8}  {it.wrong or 'yes'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Faults in real runs, again and again, and what became of them:  python -m tests.drills --help"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.drills.faults import ROLES, Fault, Saboteur, lines, processes_of, steps_done

STEPS = 8
SMALL = (
    *("model.tiny.warm_steps=40", "model.tiny.warm_lr=2e-3", "model.tiny.warm_batch=16", "eval.questions=16"),
    *(f"train.steps={STEPS}", "train.prompts_per_step=4", "train.checkpoint_every=1", "algo.group_size=4"),
    *("eval.every=0", "rollout.step_timeout_s=15", "learner.step_timeout_s=15", "algo.reward.timeout_s=5"),
    "algo.reward.answer_cpu_s=0.5",
    *("rollout.threads=1", "learner.threads=1"),
)
EXACT = ("reward/mean", "kl/beta", "loss", "tokens/completion_mean", "groups/constant_frac")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a fault cost. `wrong` is empty where the run is, step by step, the one that was left in peace."""

    fault: str
    seed: int
    noticed_after_s: float
    recovered_after_s: float
    steps_lost: int
    samples_masked: int
    wrong: str


class Ground:
    """Where the drills take place: one base model, and a run that was left in peace."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peaceful = folder, folder / "in_peace"
        assert self.finish(self.start(self.peaceful)) == 0, (self.peaceful / "screen.txt").read_text()

    def start(self, run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
        run_dir.mkdir(parents=True, exist_ok=True)
        folders = (f"run.dir={run_dir}", f"run.cache_dir={self.folder / 'cache'}")
        with (run_dir / "screen.txt").open("ab") as screen:
            return subprocess.Popen(
                [sys.executable, "-m", "othink_ray.main", *SMALL, *folders, *overrides],
                stdout=screen,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CI": "true"},
                start_new_session=True,
            )

    @staticmethod
    def finish(run: subprocess.Popen[bytes]) -> int:
        try:
            return run.wait(600)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)

    def differences(self, run_dir: Path) -> str:
        """From the run in peace; a masked answer changes what follows it: then only the steps are compared."""
        found, expected = lines(run_dir), lines(self.peaceful)
        if [line["step"] for line in found] != [line["step"] for line in expected]:
            return f"steps {[line['step'] for line in found]}"
        if any(line["faults/masked_answers"] for line in found):
            return ""
        for one, other in zip(found, expected, strict=True):
            for name in EXACT:
                if one[name] != other[name]:
                    return f"step {one['step']}: {name} is {one[name]}, in peace {other[name]}"
        return ""


def lose_a_process(ground: Ground, role: str, how: signal.Signals, seed: int) -> Outcome:
    """Two rollout actors and one learner rank lose a process at a random moment; the run mends itself."""
    fault = Fault(role, how, random.Random(seed).randrange(1, STEPS - 1))
    run_dir = ground.folder / f"{role}_{how.name}_{seed}"
    run = ground.start(run_dir, "rollout.num_actors=2")
    with Saboteur(psutil.Process(run.pid), run_dir, [fault], seed) as saboteur:
        status = ground.finish(run)
    said = (run_dir / "screen.txt").read_text()
    wrong = f"ended with {status}: {said[-300:]}" if status else ground.differences(run_dir)
    done = [line for line in lines(run_dir) if "time/unix_s" in line]
    deed = saboteur.done[0][1] if saboteur.done else float("nan")
    after = min((line["time/unix_s"] for line in done if line["time/unix_s"] > deed + 0.5), default=float("nan"))
    discarded = run_dir / "metrics.discarded.jsonl"
    return Outcome(
        fault=str(fault),
        seed=seed,
        noticed_after_s=_noticed(run_dir, deed),
        recovered_after_s=after - deed,
        steps_lost=discarded.read_text().count("\n") if discarded.exists() else 0,
        samples_masked=int(sum(line["faults/masked_answers"] for line in done)),
        wrong=wrong,
    )


def _noticed(run_dir: Path, deed: float) -> float:
    diary = run_dir / "incidents.jsonl"
    told = [json.loads(line)["unix_s"] for line in diary.read_text().splitlines()] if diary.exists() else []
    return min((moment - deed for moment in told if moment > deed), default=float("nan"))


def lose_the_driver(ground: Ground, seed: int) -> Outcome:
    """kill -9 at a random moment, and the same command again with run.resume=auto."""
    dice = random.Random(seed)
    run_dir = ground.folder / f"driver_{seed}"
    run = ground.start(run_dir)
    goal = dice.randrange(1, STEPS - 1)
    while steps_done(run_dir) < goal and run.poll() is None:
        time.sleep(0.02)
    time.sleep(dice.uniform(0.0, 1.0))
    there = steps_done(run_dir)
    run.kill()
    run.wait()
    deed = time.time()
    status = ground.finish(ground.start(run_dir, "run.resume=auto"))
    wrong = f"ended with {status}" if status else ground.differences(run_dir)
    discarded = run_dir / "metrics.discarded.jsonl"
    lost = discarded.read_text().count("\n") if discarded.exists() else 0
    after = [line["time/unix_s"] for line in lines(run_dir) if line["step"] >= there - lost]
    return Outcome(
        fault="kill -9 of the driver, then run.resume=auto",
        seed=seed,
        noticed_after_s=0.0,
        recovered_after_s=(min(after) - deed) if after else float("nan"),
        steps_lost=lost,
        samples_masked=0,
        wrong=wrong,
    )


def soak(ground: Ground, minutes: float, every_s: float) -> Outcome:
    """One long run with a random fault every so often; in the end it is asked to go, and nothing may be left of it."""
    run_dir = ground.folder / "soak"
    dice = random.Random(0)
    run = ground.start(
        run_dir, "rollout.num_actors=2", "train.steps=100000", "train.checkpoint_every=5", "faults.max_restarts=100000"
    )
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
        seed=0,
        noticed_after_s=float("nan"),
        recovered_after_s=float("nan"),
        steps_lost=discarded.read_text().count("\n") if discarded.exists() else 0,
        samples_masked=masked,
        wrong=wrong,
    )


DRILLS: dict[str, Callable[[Ground, int], Outcome]] = {
    "rollout_dies": lambda ground, seed: lose_a_process(ground, "rollout", signal.SIGKILL, seed),
    "learner_dies": lambda ground, seed: lose_a_process(ground, "learner", signal.SIGKILL, seed),
    "reward_dies": lambda ground, seed: lose_a_process(ground, "reward", signal.SIGKILL, seed),
    "rollout_hangs": lambda ground, seed: lose_a_process(ground, "rollout", signal.SIGSTOP, seed),
    "learner_hangs": lambda ground, seed: lose_a_process(ground, "learner", signal.SIGSTOP, seed),
    "reward_hangs": lambda ground, seed: lose_a_process(ground, "reward", signal.SIGSTOP, seed),
    "driver_dies": lose_the_driver,
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make drills", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="each of them, at other moments")
    parser.add_argument("--only", nargs="*", choices=list(DRILLS), default=list(DRILLS))
    parser.add_argument(
        "--soak", type=float, default=60, help="minutes of one run, a random fault each minute; 0: none"
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/drills"))
    asked = parser.parse_args(arguments)
    folder = asked.dir.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    ground = Ground(folder)
    found: list[Outcome] = []
    print(f"{'fault':<46}{'seed':>5}{'noticed':>10}{'recovered':>11}{'lost':>6}{'masked':>8}  as in peace", flush=True)
    for name in asked.only:
        for seed in range(asked.times):
            found.append(DRILLS[name](ground, seed))
            print(row(found[-1]), flush=True)
            (folder / "drills.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    if asked.soak:
        found.append(soak(ground, asked.soak, every_s=60))
        print(row(found[-1]), flush=True)
        (folder / "drills.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    failed = sum(bool(one.wrong) for one in found)
    print(f"{len(found)} drills, {failed} went wrong; {folder / 'drills.json'}")
    return int(failed > 0)


def row(one: Outcome) -> str:
    times = f"{one.noticed_after_s:>8.1f} s{one.recovered_after_s:>9.1f} s"
    return f"{one.fault:<46}{one.seed:>5}{times}{one.steps_lost:>6}{one.samples_masked:>8}  {one.wrong or 'yes'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

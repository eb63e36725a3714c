"""How jobs end in Slurm and in Ray: rows of the table of endings."""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.drills.endings_table import IN_A_STEP, IN_A_STUDY, SETTINGS, STUDY, Ended, goes_on, last_line, on_disk
from tests.drills.faults import steps_done
from tests.drills.harness import SMALL, Harness
from tests.drills.hosts import Hosts, two_hosts
from tests.drills.slurm import MINUTES, OVER, ROOT, Slurm, slurm

Strike = Callable[[Slurm, str], object]  # (Slurm, job)
_AT = 9  # steps done


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmEnding:
    """A fault, the start of the output line after which it is injected, and the job's expected state."""

    what: str
    strike: Strike
    state: str
    when: str = IN_A_STEP
    keys: tuple[str, ...] = ()


def tell(*command: str) -> Strike:
    return lambda cluster, job: cluster.run(*command, job)


SLURM = (
    SlurmEnding(what="Slurm: its time is up", strike=Slurm.run_out, state="PENDING"),
    SlurmEnding(what="Slurm: a study's time is up", strike=Slurm.run_out, state="PENDING", when=IN_A_STUDY, keys=STUDY),
    SlurmEnding(
        what="Slurm: `scancel --batch --signal=TERM`",
        strike=tell("scancel", "--batch", "--signal=TERM"),
        state="FAILED",
    ),
    SlurmEnding(what="Slurm: `scancel`", strike=tell("scancel"), state="CANCELLED"),
    SlurmEnding(what="Slurm: `scontrol requeue`", strike=tell("scontrol", "requeue"), state="PENDING"),
    # Last, since the node stays down.
    SlurmEnding(what="Slurm: the node loses power", strike=Slurm.cut_power, state="PENDING"),
)
RAY_JOBS = {"`ray job stop`, with launch/job.yaml": True, "`ray job stop`, without": False}


def end_slurm_jobs(harness: Harness, dice: random.Random) -> Iterator[tuple[str, Ended]]:
    """Yield the endings of Slurm jobs on one node, struck during their work; requeued jobs resume by themselves."""
    with slurm(harness.folder / "slurm_endings") as cluster:
        for number, ending in enumerate(SLURM):
            yield ending.what, _end_slurm_job(harness, cluster, number, ending, dice.uniform(0, 1))


def _end_slurm_job(harness: Harness, cluster: Slurm, number: int, ending: SlurmEnding, after_s: float) -> Ended:
    run_dir, log = harness.folder / f"slurm_ending_{number}", harness.folder / f"slurm_ending_{number}.txt"
    settings = (*ending.keys, f"run.dir={run_dir}", f"run.cache_dir={harness.folder / 'cache'}")

    def submit() -> str:
        options = (f"--time={MINUTES}", "--signal=B:USR1@1", "--nodes=1")
        return cluster.submit(*options, settings=(*SMALL, *SETTINGS, *settings), log=log)

    job = submit()
    cluster.until(job, lambda _: log.exists() and f"\n{ending.when}" in log.read_text(), 240)
    time.sleep(after_s)
    ending.strike(cluster, job)
    ended = cluster.until(job, lambda found: found["JobState"] in ("PENDING", *OVER), 240)
    left = _left_of(job)
    output, files = log.read_text(), on_disk(run_dir)
    if ended["JobState"] == "PENDING":
        cluster.start_again(job)
    else:
        job = submit()
    again = cluster.wait(job, 600)["JobState"]
    faults = {
        f"{ended['JobState']}, not {ending.state}": ended["JobState"] != ending.state,
        "a traceback": re.search(r"Traceback|\^\^\^", output) is not None,
        f"left behind: {left}": bool(left),
        f"the next one is {again}": again != "COMPLETED",
    }
    status = f"{ended['JobState']}, {ended['ExitCode'].partition(':')[0]}"
    return Ended(
        status="queued again" if ended["JobState"] == "PENDING" else status,
        last_line=last_line(output, run_dir),
        on_disk=files,
        next_command=goes_on(log.read_text()[len(output) :]),
        wrong="; ".join(text for text, is_so in faults.items() if is_so),
    )


def _left_of(job: str) -> list[psutil.Process]:
    """Return the processes of the job's Ray and script that are still alive after 30 s."""
    marks = (f"/tmp/ray-{os.getuid()}-{job}-", f"/job{int(job):05d}/slurm_script")
    commands = ((it, " ".join(it.info["cmdline"] or ())) for it in psutil.process_iter(["cmdline"]))
    processes = [it for it, command in commands if any(mark in command for mark in marks)]
    return psutil.wait_procs(processes, timeout=30)[1]


def end_ray_jobs(harness: Harness, dice: random.Random) -> Iterator[tuple[str, Ended]]:
    """Yield the endings of Ray jobs, submitted to a cluster with a dashboard and stopped during a step."""
    folders = {name: harness.folder / name for name in ("jobs_head_only", "jobs_home")}
    for folder in folders.values():
        folder.mkdir()
    with two_hosts(cpus=2, head_only=folders["jobs_head_only"], home=folders["jobs_home"]) as hosts:
        for number, (what, notice) in enumerate(RAY_JOBS.items()):
            run_dir = harness.folder / f"ray_ending_{number}"
            job = _submit(harness, hosts, run_dir, f"job_{number}", notice=notice)
            while steps_done(run_dir) < _AT and job.poll() is None:
                time.sleep(0.02)
            time.sleep(dice.uniform(0, 1))
            _ray_job(hosts, "stop", f"job_{number}")
            harness.finish(job)
            status = _ray_job(hosts, "status", f"job_{number}")
            output, files = harness.screen(run_dir).read_text(), on_disk(run_dir)
            again = harness.finish(_submit(harness, hosts, run_dir, f"job_{number}_again", notice=notice))
            faults = {
                status: "was stopped" not in status,
                "a traceback": re.search(r"Traceback|\^\^\^", output) is not None,
                f"the next command ended with {again}": again != 0,
            }
            yield (
                what,
                Ended(
                    status="STOPPED",
                    last_line=last_line(output, run_dir),
                    on_disk=files,
                    next_command=goes_on(harness.screen(run_dir).read_text()[len(output) :]),
                    wrong="; ".join(text for text, is_so in faults.items() if is_so),
                ),
            )


def _submit(harness: Harness, hosts: Hosts, run_dir: Path, name: str, *, notice: bool) -> subprocess.Popen[bytes]:
    """Submit a run with so many steps that it outlasts the start of Ray's command."""
    settings = (f"run.dir={run_dir}", f"run.cache_dir={harness.folder / 'cache'}", f"cluster.address={hosts.address}")
    with harness.screen(run_dir).open("ab") as screen:
        return subprocess.Popen(
            [*hosts.job(f"--submission-id={name}", notice=notice), *SMALL, *SETTINGS, "train.steps=60", *settings],
            stdout=screen,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | hosts.environment,
            start_new_session=True,
        )


def _ray_job(hosts: Hosts, *words: str) -> str:
    done = subprocess.run(
        hosts.on("head", "ray", "job", words[0], f"--address={hosts.dashboard}", *words[1:]),
        capture_output=True,
        text=True,
        env=os.environ | hosts.environment,
        timeout=300,
        check=False,
    )
    return done.stdout + done.stderr

"""A private Slurm on this machine: a controller and two nodes in a folder, and jobs whose time runs out."""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.drills.ground import SMALL, Ground, Outcome

ROOT = Path(__file__).resolve().parents[2]
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_SETTINGS = """\
ClusterName=drill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str | None:
    """What is missing here."""
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"Slurm is not here ({', '.join(missing)}): apt-get install slurm-wlm munge" if missing else None


class Slurm:
    """Commands to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }

    def tell(self, *command: str, cwd: Path = ROOT) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *options: str, settings: Sequence[str], log: Path) -> str:
        """The job's number."""
        own = ("--parsable", "--gpus-per-node=0", f"--output={log}")
        return self.tell("sbatch", *own, *options, "launch/slurm.sbatch", *settings).strip()

    def state(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.tell("scontrol", "show", "job", "--oneliner", job)))

    def wait(self, job: str, limit_s: float) -> dict[str, str]:
        """Until it is over; what is queued again is not."""
        until = time.monotonic() + limit_s
        while (found := self.state(job))["JobState"] in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED"):
            if time.monotonic() > until:
                self.tell("scancel", job)
                raise AssertionError(f"job {job} is {found['JobState']} after {limit_s:.0f} s")
            if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":  # Slurm lets two minutes go by
                self.tell("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(1)
        return found


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Up, with two idle nodes; nothing of it is left at the end."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    ports = random.sample(range(20000, 30000), 3)
    host = os.uname().nodename
    (folder / "slurm.conf").write_text(_SETTINGS.format(folder=folder, host=host, ports=ports))
    here = Slurm(folder)
    files = (f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed")
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}", *files],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            with (folder / f"{len(started)}_{command[0]}.screen").open("wb") as screen:
                started.append(subprocess.Popen(command, env=here.environment, stdout=screen, stderr=subprocess.STDOUT))
            time.sleep(0.5)
        until = time.monotonic() + 60
        while here.tell("sinfo", "--noheader", "--format=%t %D").split() != ["idle", "2"]:
            assert time.monotonic() < until, here.tell("sinfo", "--list-reasons")
            time.sleep(0.5)
        yield here
    finally:
        for daemon in reversed(started):
            below = psutil.Process(daemon.pid).children(recursive=True)
            daemon.terminate()
            for process in [*psutil.wait_procs(below, 20)[1]]:
                process.kill()
            daemon.wait(20)


def let_time_run_out(ground: Ground) -> list[Outcome]:
    """On one node and on two: the limit strikes at random moments, and the job that is queued again ends the run."""
    dice = random.Random(ground.seed)
    with slurm(ground.folder / "slurm") as here:
        return [one_job(ground, here, number, 1 + number % 2, dice.randint(30, 70)) for number in range(ground.times)]


def one_job(ground: Ground, here: Slurm, number: int, nodes: int, before_s: int) -> Outcome:
    """Three minutes at a time, warned `before_s` seconds before the end; held against the run that was left in peace.

    Slurm may warn up to a minute earlier.
    """
    run_dir, log = ground.folder / f"slurm_{number}", ground.folder / f"slurm_{number}.txt"
    own = (f"run.dir={run_dir}", f"run.cache_dir={ground.folder / 'cache'}", f"train.steps={ground.steps}")
    limit = ("--time=3", f"--signal=B:USR1@{before_s}", f"--nodes={nodes}")
    job = here.submit(*limit, settings=(*SMALL, "train.checkpoint_every=0", *own), log=log)
    ended = here.wait(job, 3600)
    struck = log.read_text().count("time is nearly up")
    wrong = "" if ended["JobState"] == "COMPLETED" else f"job {job} is {ended['JobState']}, see {log}"
    discarded = run_dir / "metrics.discarded.jsonl"
    return Outcome(
        fault=f"time limit on {nodes} nodes, {struck} times",
        number=number,
        noticed_after_s=float("nan"),
        recovered_after_s=float("nan"),
        steps_lost=discarded.read_text().count("\n") if discarded.exists() else 0,
        samples_masked=0,
        wrong=wrong or ground.differences(run_dir, ground.peaceful) or ("" if struck else "the limit never struck"),
    )

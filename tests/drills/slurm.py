"""A private Slurm on this machine: a controller and two nodes in a folder, and jobs whose time runs out."""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.drills.faults import steps_done
from tests.drills.ground import APART, SMALL, Ground, Outcome

ROOT = Path(__file__).resolve().parents[2]
_MINUTES = 60  # of a job
_OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_SETTINGS = """\
ClusterName=drill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={sockets}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={sockets}/spool-%n
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
BatchStartTimeout=120
MessageTimeout=60
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

    def until(self, job: str, done: Callable[[dict[str, str]], bool], limit_s: float) -> dict[str, str]:
        """The job's record once `done` holds; raises when the job ends before, or after `limit_s`."""
        end = time.monotonic() + limit_s
        while not done(found := self.state(job)):
            if time.monotonic() > end or found["JobState"] in _OVER:
                self.tell("scancel", job)
                logs = sorted(self.folder.glob("slurm*.log"))
                told = [line for log in logs for line in (f"{log.name}:", *log.read_text().splitlines()[-20:])]
                raise AssertionError("\n".join((f"after {limit_s:.0f} s job {job} is {found}", *told)))
            time.sleep(0.5)
        return found

    def wait(self, job: str, limit_s: float) -> dict[str, str]:
        """Until it is over."""
        return self.until(job, lambda found: found["JobState"] in _OVER, limit_s)

    def strike(self, job: str) -> None:
        """Shorten the limit to a minute or two, warn the job at once (Slurm looks every 30 s), and start it again."""
        ran = self.state(job)["RunTime"]
        hours, minutes, _ = map(int, ran.split(":"))
        self.tell("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
        self.tell("scancel", "--batch", "--signal=USR1", job)
        self.until(job, lambda found: found["JobState"] == "PENDING" and found["Reason"] == "BeginTime", 240)
        # Slurm itself waits two minutes before it starts a requeued job.
        self.tell("scontrol", "update", f"JobId={job}", "StartTime=now", f"TimeLimit={_MINUTES}")


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Up, with two idle nodes; nothing of it is left at the end."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    # The path of a Unix socket has room for 107 characters: a test's own folder is too deep for these.
    sockets = Path(tempfile.mkdtemp(prefix="slurm"))
    sockets.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    ports = random.sample(range(20000, 30000), 3)
    host = os.uname().nodename
    (folder / "slurm.conf").write_text(_SETTINGS.format(folder=folder, sockets=sockets, host=host, ports=ports))
    here = Slurm(folder)
    files = (f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed")
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={sockets}/munge.socket", f"--key-file={key}", *files],
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
        shutil.rmtree(sockets)


def let_time_run_out(ground: Ground) -> list[Outcome]:
    """On one node and on two: the limit strikes at random moments, and the job that is queued again ends the run."""
    dice = random.Random(ground.seed)
    with slurm(ground.folder / "slurm") as here:
        return [one_job(ground, here, nodes, max(1, ground.times // 2), dice) for nodes in (1, 2)]


def one_job(ground: Ground, here: Slurm, nodes: int, times: int, dice: random.Random) -> Outcome:
    """Runs one job, requeues it `times` times, and compares its steps with the undisturbed run."""
    run_dir, log = ground.folder / f"slurm_{nodes}", ground.folder / f"slurm_{nodes}.txt"
    own = (f"run.dir={run_dir}", f"run.cache_dir={ground.folder / 'cache'}", f"train.steps={ground.steps}")
    options = (f"--time={_MINUTES}", "--signal=B:USR1@1", f"--nodes={nodes}")
    job = here.submit(*options, settings=(*SMALL, "train.checkpoint_every=0", *own), log=log)
    for number in range(times):
        due = 2 * APART * number + 2
        here.until(job, lambda _, due=due: steps_done(run_dir) >= due, 240)
        time.sleep(dice.uniform(0, 1))
        here.strike(job)
    ended = here.wait(job, 600)
    wrong = "" if ended["JobState"] == "COMPLETED" else f"job {job} is {ended['JobState']}, see {log}"
    discarded = run_dir / "metrics.discarded.jsonl"
    return Outcome(
        fault=f"time limit on {nodes} nodes, {times} times",
        number=nodes,
        noticed_after_s=float("nan"),
        recovered_after_s=float("nan"),
        steps_lost=discarded.read_text().count("\n") if discarded.exists() else 0,
        samples_masked=0,
        wrong=wrong or ground.differences(run_dir, ground.peaceful),
    )

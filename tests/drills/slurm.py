"""A private Slurm of two nodes, each in its own network namespace, and jobs that reach their time limit."""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from tests.drills.faults import steps_done
from tests.drills.harness import APART, SMALL, Harness, Outcome
from tests.drills.hosts import cabled, missing_namespaces

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 60  # time limit of a job
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_SETTINGS = """\
ClusterName=drill
SlurmctldHost={host}({addresses[0]})
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
NodeName=n1 NodeHostname={host} NodeAddr={addresses[0]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr={addresses[1]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_slurm() -> str | None:
    """The reason why this machine cannot run a private Slurm, or None."""
    if reason := missing_namespaces():
        return reason
    missing = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge" if missing else None


class Slurm:
    """A running Slurm; its commands run on the first node."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder, self.nodes = folder, nodes
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }

    def on(self, node: int, *command: str) -> list[str]:
        """Return the command to run on a node; `ip netns exec` would hide the control groups, which slurmd needs."""
        mount = f'mount --bind "{self.folder / "hosts"}" /etc/hosts && exec "$@"'
        return [
            "nsenter",
            f"--net=/run/netns/{self.nodes[node]}",
            "unshare",
            "--mount",
            "sh",
            "-c",
            mount,
            "sh",
            *command,
        ]

    def run(self, *command: str) -> str:
        done = subprocess.run(
            self.on(0, *command),
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *options: str, settings: Sequence[str], log: Path) -> str:
        """Submit a run; return the job's id."""
        fixed = ("--parsable", "--gpus-per-node=0", f"--output={log}")
        return self.run("sbatch", *fixed, *options, "launch/slurm.sbatch", *settings).strip()

    def state(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def until(self, job: str, done: Callable[[dict[str, str]], bool], limit_s: float) -> dict[str, str]:
        """Return the job's record once `done` holds; raise if the job ends before, or after `limit_s`."""
        end = time.monotonic() + limit_s
        while not done(found := self.state(job)):
            if time.monotonic() > end or found["JobState"] in OVER:
                self.run("scancel", job)
                logs = sorted(self.folder.glob("slurm*.log"))
                shown = [line for log in logs for line in (f"{log.name}:", *log.read_text().splitlines()[-20:])]
                raise AssertionError("\n".join((f"after {limit_s:.0f} s job {job} is {found}", *shown)))
            time.sleep(0.5)
        return found

    def wait(self, job: str, limit_s: float) -> dict[str, str]:
        """Return the job's record once it is over."""
        return self.until(job, lambda found: found["JobState"] in OVER, limit_s)

    def run_out(self, job: str) -> None:
        """Shorten the job's limit to a minute or two and send the warning at once: Slurm checks only every 30 s."""
        ran = self.state(job)["RunTime"]
        hours, minutes, _ = map(int, ran.split(":"))
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
        self.run("scancel", "--batch", "--signal=USR1", job)

    def cut_power(self, job: str) -> None:
        """Kill all processes of the first node but munged and slurmctld, and mark the node as down."""
        spared = {self.daemons[name].pid for name in ("munged", "slurmctld")}
        for pid in map(int, subprocess.check_output(["ip", "netns", "pids", self.nodes[0]]).split()):
            if pid not in spared:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=power")
        for folder in Path("/tmp").glob(f"ray-{os.getuid()}-{job}-*"):
            shutil.rmtree(folder)

    def start_again(self, job: str) -> None:
        """Start a requeued job at once: Slurm itself waits two minutes."""
        self.until(job, lambda found: found["JobState"] == "PENDING" and found["Reason"] == "BeginTime", 240)
        # slurmd compares times in whole seconds: a start within the second of the job's end has a revoked credential.
        time.sleep(2)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now", f"TimeLimit={MINUTES}")


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start a Slurm with two idle nodes; stop and remove all of it at the end."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    # The path of a Unix socket has at most 107 characters: the folder of a test is too deep.
    sockets = Path(tempfile.mkdtemp(prefix="slurm"))
    sockets.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    number = uuid.uuid4().int
    nodes = [f"{name}{number % 10**8:08d}" for name in ("n1-", "n2-")]
    addresses = [f"10.{128 + number % 64}.0.{end}" for end in (1, 2)]
    host = os.uname().nodename
    (folder / "slurm.conf").write_text(_SETTINGS.format(folder=folder, sockets=sockets, host=host, addresses=addresses))
    # As on Debian and Ubuntu: the hostname resolves to an address that no other host can reach.
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host}\n")
    cluster = Slurm(folder, nodes)
    munge = [f"--socket={sockets}/munge.socket", f"--key-file={key}"]
    munge += [f"--{kind}-file={folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
    commands = {
        "munged": cluster.on(0, "munged", "--foreground", "--force", *munge),
        "slurmctld": cluster.on(0, "slurmctld", "-D", "-c"),
        "n1": cluster.on(0, "slurmd", "-D", "-N", "n1"),
        "n2": cluster.on(1, "slurmd", "-D", "-N", "n2"),
    }
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, sockets)
        stack.enter_context(cabled(dict(zip(nodes, addresses, strict=True))))
        stack.callback(_end, cluster.daemons)
        for name, command in commands.items():
            with (folder / f"{name}.screen").open("wb") as screen:
                cluster.daemons[name] = subprocess.Popen(
                    command, env=cluster.environment, stdout=screen, stderr=subprocess.STDOUT
                )
            time.sleep(0.5)
        until = time.monotonic() + 60
        while cluster.run("sinfo", "--noheader", "--format=%t %D").split() != ["idle", "2"]:
            assert time.monotonic() < until, cluster.run("sinfo", "--list-reasons")
            time.sleep(0.5)
        yield cluster


def _end(daemons: Mapping[str, subprocess.Popen[bytes]]) -> None:
    for daemon in reversed(daemons.values()):
        if daemon.poll() is not None:
            continue
        children = psutil.Process(daemon.pid).children(recursive=True)
        daemon.terminate()
        for process in psutil.wait_procs(children, 20)[1]:
            process.kill()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:  # slurmctld waits for a node that is down
            daemon.kill()
            daemon.wait()


def let_time_run_out(harness: Harness) -> list[Outcome]:
    """Run jobs on one and on two nodes into their time limit at random moments; the requeued jobs finish the run."""
    dice = random.Random(harness.seed)
    with slurm(harness.folder / "slurm") as cluster:
        return [one_job(harness, cluster, nodes, max(1, harness.times // 2), dice) for nodes in (1, 2)]


def one_job(harness: Harness, cluster: Slurm, nodes: int, times: int, dice: random.Random) -> Outcome:
    """Run one job, let its time run out `times` times, and compare its steps with the baseline."""
    run_dir, log = harness.folder / f"slurm_{nodes}", harness.folder / f"slurm_{nodes}.txt"
    settings = (f"run.dir={run_dir}", f"run.cache_dir={harness.folder / 'cache'}", f"train.steps={harness.steps}")
    options = (f"--time={MINUTES}", "--signal=B:USR1@1", f"--nodes={nodes}")
    job = cluster.submit(*options, settings=(*SMALL, "train.checkpoint_every=0", *settings), log=log)
    for number in range(times):
        due = 2 * APART * number + 2
        cluster.until(job, lambda _, due=due: steps_done(run_dir) >= due, 240)
        time.sleep(dice.uniform(0, 1))
        cluster.run_out(job)
        cluster.start_again(job)
    ended = cluster.wait(job, 600)
    wrong = "" if ended["JobState"] == "COMPLETED" else f"job {job} is {ended['JobState']}, see {log}"
    discarded = run_dir / "metrics.discarded.jsonl"
    return Outcome(
        fault=f"time limit on {nodes} nodes, {times} times",
        number=nodes,
        noticed_after_s=float("nan"),
        recovered_after_s=float("nan"),
        steps_lost=discarded.read_text().count("\n") if discarded.exists() else 0,
        samples_masked=0,
        wrong=wrong or harness.differences(run_dir, harness.baseline),
    )

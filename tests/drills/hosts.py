"""Two hosts on one machine: network namespaces with a cable between them, and a Ray node in each.

Their addresses and the commands that start them are those of docs/cluster.md.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

RAY = Path(sys.executable).with_name("ray")
_PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
# Detect a dead node within seconds instead of half a minute, and end the processes of a disconnected node soon.
_QUICK = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def missing_namespaces() -> str | None:
    """The reason why this machine cannot have network namespaces, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    probe = f"othink_{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return f"network namespaces cannot be made: {made.stderr.strip()}" if made.returncode else None


def documented(start: str) -> list[str]:
    """Return the words of the command in docs/cluster.md that starts with `start`."""
    [line] = [line for line in _PAGE.read_text().splitlines() if line.startswith(start)]
    return shlex.split(line, comments=True)


class Hosts:
    """Two hosts, `head` and `worker`; the worker's cable can be pulled."""

    bring_worker: Callable[[], None]
    """Starts the worker's Ray, also again after it was lost."""

    def __init__(self, mark: str) -> None:
        self.names = {role: f"{role[0]}{mark}" for role in ("head", "worker")}
        self.addresses = {"head": "192.0.2.10", "worker": "192.0.2.11"}
        self.address = documented("ray start --address=")[-1].partition("=")[2]
        self.dashboard = documented("export RAY_AUTH_MODE=token RAY_ADDRESS=")[-1].partition("=")[2]
        # As docs/ and the README advise on a shared network.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
        # Jobs start the `python` on the PATH of their node.
        self.environment = _QUICK | token | {"PATH": f"{RAY.parent}:{os.environ['PATH']}"}

    def on(self, host: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *command]

    def job(self, *options: str, notice: bool) -> list[str]:
        """Return the command that submits the checkout in the working directory, without settings.

        With `notice` a stopped job has the time of launch/job.yaml to end, as docs/cluster.md advises.
        """
        submit = documented("ray job submit")
        words = submit[: submit.index("othink_ray.main") + 1]
        if not notice:
            at = words.index("--runtime-env")
            del words[at : at + 2]
        return self.on("head", "env", f"RAY_ADDRESS={self.dashboard}", *words[:3], *options, *words[3:])

    def cable(self, state: str) -> None:
        """Set the worker's cable `up` or `down`."""
        _ip("-n", self.names["worker"], "link", "set", "eth", state)


@contextmanager
def cabled(addresses: Mapping[str, str]) -> Iterator[None]:
    """Make two network namespaces by name, connected by a cable with these addresses at its ends."""
    with ExitStack() as stack:
        for name in addresses:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        one, other = addresses
        _ip("link", "add", "eth", "netns", one, "type", "veth", "peer", "name", "eth", "netns", other)
        for name, address in addresses.items():
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth", "up")
        yield


@contextmanager
def two_hosts(cpus: int, head_only: Path, home: Path) -> Iterator[Hosts]:
    """Start a head and a worker with `cpus` CPUs each; the worker sees the folder `head_only` empty."""
    hosts = Hosts(f"{uuid.uuid4().int % 10**8:08d}")
    hosts.environment["HOME"] = str(home)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True)))
        stack.enter_context(cabled({name: hosts.addresses[host] for host, name in hosts.names.items()}))
        options = (
            "--disable-usage-stats",
            "--block",
            "--num-cpus",
            str(cpus),
            "--object-store-memory",
            str(200 * 2**20),
        )
        _start(stack, hosts, "head", scratch, *documented("ray start --head")[2:], *options)
        # Each `ip netns exec` has separate mounts. Two nodes in one folder would delete each other's files, and a
        # driver that sees the head's processes takes the head for its node. `wait` reaps orphans there.
        mounts = "".join(f'mount -t tmpfs none "{folder}" && ' for folder in (head_only, scratch))
        hide = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", f'{mounts} "$@" & wait', "sh")
        hosts.bring_worker = partial(
            _start, stack, hosts, "worker", scratch, *documented("ray start --address=")[2:], *options, before=hide
        )
        hosts.bring_worker()
        yield hosts


def _start(
    stack: ExitStack, hosts: Hosts, host: str, scratch: Path, *arguments: str, before: tuple[str, ...] = ()
) -> None:
    options = (f"--node-ip-address={hosts.addresses[host]}", *((f"--temp-dir={scratch}",) if host == "head" else ()))
    log = scratch / f"{host}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            hosts.on(host, *before, str(RAY), "start", *options, *arguments),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | hosts.environment,
            start_new_session=True,
        )
    stack.callback(_end, process)
    deadline = time.monotonic() + 60
    while b"Ray runtime started" not in log.read_bytes():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)

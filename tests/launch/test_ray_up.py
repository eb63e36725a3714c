"""`ray up`, `ray exec` and `ray down` with launch/ray_up.yaml, on two hosts with real SSH servers."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.drills.hosts import cabled, missing_namespaces
from tests.e2e.conftest import SMALL
from tests.e2e.test_interrupt import wait_until

ROOT = Path(__file__).resolve().parents[2]
_VENV = Path(sys.prefix)
_PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync")
_MISSING = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_namespaces() is not None, reason=str(missing_namespaces())),
    pytest.mark.skipif(bool(_MISSING), reason=f"{', '.join(_MISSING)}: apt-get install openssh-server rsync"),
    pytest.mark.timeout(600),
]


@dataclass(frozen=True)
class Site:
    """Two hosts with SSH servers, and the environment of the client that reaches them."""

    names: list[str]
    servers: list[subprocess.Popen[bytes]]
    file: Path
    environment: dict[str, str]

    def ray(self, *words: str) -> str:
        """Run a `ray` command in the first host's network and the checkout; return its output."""
        command = ("ip", "netns", "exec", self.names[0], str(_VENV / "bin" / "ray"), *words)
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            umask=0o077,
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        return output

    def log(self) -> str:
        """Return the end of the logs of the head's autoscaler."""
        shell = psutil.Process(self.servers[0].pid).children()[0]
        logs = Path(f"/proc/{shell.pid}/root/tmp/ray").glob("session_2*/logs/monitor.*")
        return "\n".join(log.read_text()[-3000:] for log in sorted(logs))

    def raylets(self) -> int:
        """Count the raylets on the hosts."""
        pids = {child.pid for server in self.servers for child in psutil.Process(server.pid).children(recursive=True)}
        processes = psutil.process_iter(["name"])
        return sum(process.pid in pids for process in processes if process.info["name"] == "raylet")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    number = uuid.uuid4().int
    names = [f"{role}{number % 10**8:08d}" for role in ("up1-", "up2-")]
    addresses = [f"10.{192 + number % 32}.0.{end}" for end in (1, 2)]
    key, laptop = tmp_path / "key", tmp_path / "laptop"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    laptop.mkdir()
    text = (ROOT / "launch" / "ray_up.yaml").read_text()
    for original, replacement in (
        ("cluster_name: othink_ray", f"cluster_name: {names[0]}"),
        ("192.0.2.10", addresses[0]),
        ("192.0.2.11", addresses[1]),
        ("ssh_user: ubuntu", "ssh_user: root"),
        ("~/.ssh/id_ed25519", str(key)),
        (
            "cd ~/othink_ray && launch/setup_env.sh gpu",
            f"ln -sfn {_VENV} ~/othink_ray/.venv",
        ),  # a real set-up takes minutes
    ):
        assert text.count(original) >= 1
        text = text.replace(original, replacement)
    file = tmp_path / "ray_up.yaml"
    file.write_text(text)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(laptop),
        "TMPDIR": str(laptop),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with ExitStack() as stack:
        for kind in ("state", "lock"):  # files that `ray up` writes here
            stack.callback(Path(f"/tmp/ray/cluster-{names[0]}.{kind}").unlink, missing_ok=True)
        stack.enter_context(cabled(dict(zip(names, addresses, strict=True))))
        for name in names:  # Ray finds the host's address by the default route
            subprocess.run(["ip", "-n", name, "route", "add", "default", "dev", "eth"], check=True)
        servers = [_ssh_server(stack, tmp_path / name, name, key) for name in names]
        yield Site(names, servers, file, environment)


def _ssh_server(stack: ExitStack, folder: Path, name: str, key: Path) -> subprocess.Popen[bytes]:
    """Start an SSH server in that network namespace, with a private home, /tmp/ray and process namespace."""
    home, python = folder / "home", folder / "python"
    for directory in (home, python):
        directory.mkdir(parents=True)
    settings = folder / "sshd_config"
    settings.write_text(
        f"HostKey {key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\n"
    )
    for directory in (Path("/run/sshd"), Path("/tmp/ray")):
        directory.mkdir(exist_ok=True)
    # This Python may be in the home folder that the private home hides.
    mounts = (
        f"mount --bind {sys.base_prefix} {python}",
        f"mount --bind {home} {pwd.getpwuid(0).pw_dir}",
        f"mkdir -p {sys.base_prefix}",
        f"mount --bind {python} {sys.base_prefix}",
        "mount -t tmpfs none /tmp/ray",
    )
    script = " && ".join((*mounts, f"{{ /usr/sbin/sshd -D -e -f {settings} & wait; }}"))  # `wait` reaps orphans
    isolated = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script)
    server = subprocess.Popen(
        ["ip", "netns", "exec", name, *isolated], stderr=stack.enter_context((folder / "sshd.log").open("wb"))
    )
    stack.callback(server.wait, 20)
    stack.callback(server.kill)
    return server


def test_ray_up_starts_a_cluster_that_runs_and_ray_down_ends_it(site: Site, tmp_path: Path) -> None:
    site.ray("get-auth-token", "--generate")
    site.ray("up", "--yes", str(site.file))
    assert wait_until(lambda: site.raylets() == 2, 120), site.log()
    shared = (f"run.dir={tmp_path}/runs/first", f"run.cache_dir={tmp_path}/cache")
    run = ("RAY_AUTH_MODE=token .venv/bin/python -m othink_ray.main cluster.address=auto", *SMALL, "train.steps=1")
    output = site.ray("exec", str(site.file), f"cd ~/othink_ray && {' '.join((*run, *shared))}")
    assert "[R0]" in output and "done in" in output
    output = site.ray("down", "--yes", str(site.file))
    assert site.raylets() <= 1, output
    assert wait_until(lambda: site.raylets() == 0, 90), output  # the worker retries its head for a minute

"""A Ray that a run starts for itself, and who gets in."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from othink_ray.config.load import load
from othink_ray.runtime import cluster

OWNER = """
import sys
from othink_ray.config.load import load
from othink_ray.runtime.cluster import ray_session
with ray_session(load([]).cluster):
    import ray
    print(ray.get_runtime_context().gcs_address, ray._private.worker._global_node.get_session_dir_path(), flush=True)
    sys.stdin.readline()
"""
ENDING = """
import signal
from othink_ray.config.load import load
from othink_ray.runtime.cluster import ray_session
signal.signal(signal.SIGTERM, lambda *of: None)
with ray_session(load([]).cluster):
    print("up", flush=True)
print("down", flush=True)
input()
"""
STRANGER = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False)"


def test_nobody_else_gets_in_neither_by_the_network_nor_by_files() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdin and owner.stdout
        address, session = owner.stdout.readline().split()
        assert ":" in address and os.path.isdir(session)
        private = Path(session).parent.parent
        assert (stat.S_IMODE(private.stat().st_mode), private.stat().st_uid) == (0o700, os.getuid())
        if os.getuid() == 0:
            peek = subprocess.run(["ls", session], user=65534, group=65534, capture_output=True, text=True, check=False)
            assert "Permission denied" in peek.stderr
        told = subprocess.run(
            [sys.executable, "-c", STRANGER, address], env=environment, capture_output=True, text=True, timeout=120
        )
        owner.stdin.write("done\n")
        owner.stdin.close()
        assert owner.wait(60) == 0
    assert told.returncode != 0
    assert "Authentication token" in told.stderr


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of /tmp."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"ray-{os.getuid()}"


@pytest.mark.parametrize("before", [None, 0o700, 0o755, 0o1777])
def test_the_folder_of_rays_files_is_the_users_alone(before: int | None, temporary: Path) -> None:
    if before is not None:
        temporary.mkdir()
        temporary.chmod(before)
    assert cluster.private_folder() == temporary
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["link", "file", "another user's"])
def test_what_somebody_else_put_in_its_place_is_not_used(kind: str, temporary: Path) -> None:
    if kind == "link":
        (temporary.parent / "elsewhere").mkdir()
        temporary.symlink_to(temporary.parent / "elsewhere")
    elif kind == "file":
        temporary.touch()
    elif os.getuid() == 0:
        temporary.mkdir()
        os.chown(temporary, 65534, 65534)
    else:
        pytest.skip("giving a folder to another user needs root")
    found = cluster.private_folder()
    assert found.parent == temporary.parent and found != temporary
    assert stat.S_IMODE(found.lstat().st_mode) == 0o700 and found.lstat().st_uid == os.getuid()


@pytest.mark.parametrize(
    ("mode", "token", "environment", "told"),
    [
        ("token", 0o644, {}, True),
        ("token", 0o640, {}, True),
        ("token", 0o600, {}, False),
        ("token", None, {}, False),
        ("disabled", 0o644, {}, False),
        ("token", 0o644, {"RAY_AUTH_TOKEN": "own"}, False),  # the file is not used
        ("token", 0o644, {"RAY_AUTH_TOKEN_PATH": "{}/elsewhere"}, True),
    ],
)
def test_a_token_that_others_can_read_is_closed_and_told(
    mode: str,
    token: int | None,
    environment: dict[str, str],
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {name: value.format(tmp_path) for name, value in environment.items()}
    file = Path(own.get("RAY_AUTH_TOKEN_PATH", tmp_path / ".ray" / "auth_token"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (own | {"RAY_AUTH_MODE": mode, "HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    if token is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("secret")
        file.chmod(token)
    said = cluster.close_token_file()
    assert (said is not None) == told
    if told:
        assert said is not None and str(file) in said and "run code as you" in said
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert cluster.close_token_file() is None


def test_rays_answer_to_sigterm_does_not_take_the_place_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(Exception):
        pass

    def end(number: int, frame: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        with cluster._restore_sigterm_handler():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is end
        with pytest.raises(Ended), cluster._restore_sigterm_handler():
            sys.exit(15)  # as Ray does while it starts
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_sigterm_while_ray_ends_or_later_has_the_runs_answer() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        assert run.stdin and run.stdout
        assert run.stdout.readline() == b"up\n"
        time.sleep(random.uniform(0.0, 1.0))
        run.send_signal(signal.SIGTERM)
        said = run.stdout.readline()
        run.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        run.communicate(b"\n", timeout=60)
    assert (said, run.returncode) == (b"down\n", 0)


def test_machines_are_the_nodes_that_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0, "memory": 1e9}
    nodes = [
        {"NodeManagerHostname": "first", "Resources": large, "Alive": True},
        {"NodeManagerHostname": "gone", "Resources": large, "Alive": False},
        {"NodeManagerHostname": "plain", "Resources": {"CPU": 4.0}, "Alive": True},
        {"NodeManagerHostname": "empty", "Resources": {}, "Alive": True},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert cluster.machines() == [
        {"host": "first", "cpus": 64.0, "gpus": 8.0, "gpu_names": ["H100"]},
        {"host": "plain", "cpus": 4.0, "gpus": 0, "gpu_names": []},
        {"host": "empty", "cpus": 0, "gpus": 0, "gpu_names": []},
    ]


@pytest.mark.parametrize(
    ("address", "before", "loaded", "locked"),
    [
        (None, {}, False, True),
        ("auto", {}, False, False),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, False, False),
        (None, {"RAY_AUTH_MODE": "disabled"}, False, False),
        (None, {}, True, False),  # too late: Ray has read it
    ],
)
def test_a_ray_that_starts_here_is_locked_unless_somebody_else_chose(
    address: str | None, before: dict[str, str], loaded: bool, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, settings = dict(before), replace(load([]).cluster, address=address)
    monkeypatch.setattr(cluster, "os", SimpleNamespace(environ=environment))
    monkeypatch.setattr(cluster, "sys", SimpleNamespace(modules={"ray": ray} if loaded else {}))
    cluster.prepare(settings)
    assert ("RAY_AUTH_TOKEN" in environment, environment.get("RAY_AUTH_MODE") == "token") == (locked, locked)
    assert environment.items() >= before.items()


def test_this_ray_knows_the_settings_that_it_is_given() -> None:
    own = Path(ray.__file__).parent
    readers = [own / "core/src/ray/raylet/raylet", *own.glob("_private/*.py")]
    known = [reader.read_bytes() for reader in readers]
    unknown = [name for name in cluster._OF_OUR_OWN if not any(name.encode() in text for text in known)]
    assert not unknown

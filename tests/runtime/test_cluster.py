"""Ray started by a run: access control, signal handlers and settings."""

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
signal.signal(signal.SIGTERM, lambda *arguments: None)
with ray_session(load([]).cluster):
    print("up", flush=True)
print("down", flush=True)
input()
"""
STRANGER = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False)"


@pytest.mark.slow
def test_no_other_user_gets_in_by_network_or_files() -> None:
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
        refused = subprocess.run(
            [sys.executable, "-c", STRANGER, address], env=environment, capture_output=True, text=True, timeout=120
        )
        owner.stdin.write("done\n")
        owner.stdin.close()
        assert owner.wait(60) == 0
    assert refused.returncode != 0
    assert "Authentication token" in refused.stderr


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace /tmp by a folder of the test; return the private folder's path below it."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"ray-{os.getuid()}"


@pytest.mark.parametrize("before", [None, 0o700, 0o755, 0o1777])
def test_rays_session_folder_is_private_to_the_user(before: int | None, temporary: Path) -> None:
    if before is not None:
        temporary.mkdir()
        temporary.chmod(before)
    assert cluster.private_folder() == temporary
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["link", "file", "another user's"])
def test_a_path_taken_by_another_user_is_not_used(kind: str, temporary: Path) -> None:
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
    ("mode", "token", "environment", "noticed"),
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
def test_a_readable_token_file_is_closed_with_a_notice(
    mode: str,
    token: int | None,
    environment: dict[str, str],
    noticed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {name: value.format(tmp_path) for name, value in environment.items()}
    file = Path(settings.get("RAY_AUTH_TOKEN_PATH", tmp_path / ".ray" / "auth_token"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (settings | {"RAY_AUTH_MODE": mode, "HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    if token is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("secret")
        file.chmod(token)
    notice = cluster.close_token_file()
    assert (notice is not None) == noticed
    if noticed:
        assert notice is not None and str(file) in notice and "run code as you" in notice
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert cluster.close_token_file() is None


def test_ray_init_does_not_replace_the_sigterm_handler(monkeypatch: pytest.MonkeyPatch) -> None:
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
            sys.exit(15)  # as Ray's handler does during startup
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_sigterm_during_or_after_ray_shutdown_reaches_the_run() -> None:
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


def test_machines_lists_live_nodes_only(monkeypatch: pytest.MonkeyPatch) -> None:
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
    ("address", "before", "loaded", "secured"),
    [
        (None, {}, False, True),
        ("auto", {}, False, False),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, False, False),
        (None, {"RAY_AUTH_MODE": "disabled"}, False, False),
        (None, {}, True, False),  # too late: Ray has read the environment
    ],
)
def test_a_local_ray_requires_a_token_unless_configured(
    address: str | None, before: dict[str, str], loaded: bool, secured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, settings = dict(before), replace(load([]).cluster, address=address)
    monkeypatch.setattr(cluster, "os", SimpleNamespace(environ=environment))
    monkeypatch.setattr(cluster, "sys", SimpleNamespace(modules={"ray": ray} if loaded else {}))
    cluster.set_ray_environment(settings)
    assert ("RAY_AUTH_TOKEN" in environment, environment.get("RAY_AUTH_MODE") == "token") == (secured, secured)
    assert environment.items() >= before.items()


def test_the_installed_ray_knows_all_local_settings() -> None:
    package = Path(ray.__file__).parent
    readers = [package / "core/src/ray/raylet/raylet", *package.glob("_private/*.py")]
    known = [reader.read_bytes() for reader in readers]
    unknown = [name for name in cluster._LOCAL_RAY_SETTINGS if not any(name.encode() in text for text in known)]
    assert not unknown

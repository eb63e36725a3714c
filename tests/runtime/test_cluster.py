"""A Ray that a run starts for itself, and who gets in."""

from __future__ import annotations

import os
import subprocess
import sys
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
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
"""
STRANGER = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False)"


def test_nobody_else_gets_in() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdin and owner.stdout
        address = owner.stdout.readline().strip()
        assert ":" in address
        told = subprocess.run(
            [sys.executable, "-c", STRANGER, address], env=environment, capture_output=True, text=True, timeout=120
        )
        owner.stdin.write("done\n")
        owner.stdin.close()
        assert owner.wait(60) == 0
    assert told.returncode != 0
    assert "Authentication token" in told.stderr


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

"""A Ray that a run starts for itself, and who gets in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ray

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


def test_this_ray_knows_the_settings_that_it_is_given() -> None:
    own = Path(ray.__file__).parent
    readers = [own / "core/src/ray/raylet/raylet", *own.glob("_private/*.py")]
    known = [reader.read_bytes() for reader in readers]
    unknown = [name for name in cluster._OF_OUR_OWN if not any(name.encode() in text for text in known)]
    assert not unknown

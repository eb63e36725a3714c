"""Data files shipped in PyPI wheels: downloaded once, cached, and read in place without installing the package.

One of them is the easy-VQA data set: 5,000 images of one colored shape, 48,248 questions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from othink_ray.config.schema import FilesConfig

_TIMEOUT_S = 900
_KINDS = {  # data.files.subset of easy-VQA -> kinds of questions
    "yes_no": {"yes_no"},
    "shape": {"shape"},
    "colour": {"colour"},
    "open": {"shape", "colour"},
    None: {"yes_no", "shape", "colour"},
}


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


class EasyVQATable:
    """Questions of one split by row number, in the package's order; images are read from the wheel.

    Subset `open` has the questions about a `shape` or a `colour`, `yes_no` the yes/no questions, null all of them. The
    wording alone gives away most `yes_no` answers, so accuracy on `open` is what shows whether a model sees the image.
    """

    columns: Sequence[str] = ("image", "question", "answer", "id")

    def __init__(self, files: FilesConfig) -> None:
        self._wheel = ZipFile(fetch_wheel(files.path))
        self._folder = f"easy_vqa/data/{files.split}"
        rows = json.loads(self._wheel.read(f"{self._folder}/questions.json"))
        kinds = _KINDS[files.subset]
        self._rows = [(number, *row) for number, row in enumerate(rows) if _kind(row[1]) in kinds]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        number, question, answer, image = self._rows[index]
        encoded = self._wheel.read(f"{self._folder}/images/{image}.png")
        return {"image": encoded, "question": question, "answer": answer, "id": f"{number:05d}"}

    def column(self, name: str) -> list[Any]:
        """Return all values of a column; images are read only for `image`."""
        if name == "image":
            return [self.row(index)["image"] for index in range(len(self))]
        fields = {"question": 1, "answer": 2}
        return [row[fields[name]] if name in fields else f"{row[0]:05d}" for row in self._rows]


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"

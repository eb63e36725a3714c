"""The easy-VQA data set as its PyPI package ships it: 5,000 images of one coloured shape, 48,248 questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from zipfile import ZipFile

from othink_ray.config.schema import FilesConfig
from othink_ray.data.wheels import fetch_wheel

_KINDS = {
    "yes_no": {"yes_no"},
    "shape": {"shape"},
    "colour": {"colour"},
    "open": {"shape", "colour"},
    None: {"yes_no", "shape", "colour"},
}


class EasyVQATable:
    """The questions of one split by row number, in the order of the package; images are read from the wheel.

    Subset `open` asks for a `shape` or a `colour`, `yes_no` for yes or no; null is all of them. What is asked tells
    most answers of `yes_no`, so accuracy on `open` is the one that shows whether a model sees.
    """

    columns: Sequence[str] = ("image", "question", "answer", "id")

    def __init__(self, files: FilesConfig) -> None:
        self._wheel = ZipFile(fetch_wheel(files.path))
        self._folder = f"easy_vqa/data/{files.split}"
        rows = json.loads(self._wheel.read(f"{self._folder}/questions.json"))
        numbered = enumerate(rows)
        wanted = _KINDS[files.subset]
        self._rows = [(number, *row) for number, row in numbered if _kind(row[1]) in wanted]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        number, question, answer, image = self._rows[index]
        encoded = self._wheel.read(f"{self._folder}/images/{image}.png")
        return {"image": encoded, "question": question, "answer": answer, "id": f"{number:05d}"}

    def column(self, name: str) -> list[Any]:
        """Every value of a column; the images are read for `image` alone."""
        if name == "image":
            return [self.row(index)["image"] for index in range(len(self))]
        values = {"question": 1, "answer": 2}
        return [row[values[name]] if name in values else f"{row[0]:05d}" for row in self._rows]


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"

"""The easy-VQA data set from its PyPI package: 5,000 images of one colored shape, 48,248 questions."""

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

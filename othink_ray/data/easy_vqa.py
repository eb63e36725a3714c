"""The easy-VQA data set as its PyPI package ships it: 5,000 images of one coloured shape, 48,248 questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from zipfile import ZipFile

from othink_ray.config.schema import FilesConfig
from othink_ray.data.wheels import fetch_wheel

_YES_NO = ("yes", "no")


class EasyVQATable:
    """The questions of one split by row number, in the order of the package; images are read from the wheel.

    Subset `open` asks for a colour or a shape, `yes_no` for yes or no; null is all of them. What is asked tells most
    answers of `yes_no`, so accuracy on `open` is the one that shows whether a model sees.
    """

    columns: Sequence[str] = ("image", "question", "answer", "id")

    def __init__(self, files: FilesConfig) -> None:
        self._wheel = ZipFile(fetch_wheel(files.path))
        self._folder = f"easy_vqa/data/{files.split}"
        rows = json.loads(self._wheel.read(f"{self._folder}/questions.json"))
        numbered = enumerate(rows)
        self._rows = [(number, *row) for number, row in numbered if _belongs(row[1], files.subset)]

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


def _belongs(answer: str, subset: str | None) -> bool:
    return subset is None or (answer in _YES_NO) == (subset == "yes_no")

"""Small data sets on disk in the layouts that users have; each row has a distinct image."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from othink_ray.config.load import load
from othink_ray.config.schema import DataConfig, FilesConfig

ROWS = 6


def picture(number: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 28), (10 * number, 80, 160)).save(buffer, format=format)
    return buffer.getvalue()


def question(number: int) -> str:
    return f"How many items are in picture {number}?"


def solution(number: int) -> str:
    return f"<answer> {number} </answer>"


def train_columns(images: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the training columns of R1-V."""
    numbers = range(len(images))
    return {
        "image": list(images),
        "problem": [question(number) for number in numbers],
        "solution": [solution(number) for number in numbers],
    }


def write_parquet(file: Path, images: Sequence[Any], **more: Sequence[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(train_columns(images) | {name: list(column) for name, column in more.items()}), file)
    return file


def write_jsonl(file: Path, rows: Sequence[Any]) -> Path:
    """Write one row per line; a row that is a string is written verbatim."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def write_r1v_test(folder: Path, rows: int = ROWS) -> Path:
    """Write R1-V's test layout: a JSONL file and the images it refers to."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(rows):
        (folder / "images" / f"{number}.png").write_bytes(picture(number))
    return write_jsonl(
        folder / "test.jsonl",
        [
            {"image_path": f"./images/{number}.png", "question": question(number), "ground_truth": number}
            for number in range(rows)
        ],
    )


@cache
def _template() -> DataConfig:
    return load(["data=custom"]).data


def custom_data(train: str | Path = ".", test: str | Path = ".", **train_files: Any) -> DataConfig:
    """Return the config of data=custom with these paths; further keywords change the training files."""
    data = _template()
    assert data.train.files is not None and data.test.files is not None
    test_part = replace(data.test, files=replace(data.test.files, path=str(test)))
    return with_files(replace(data, test=test_part), path=str(train), **train_files)


def with_files(data: DataConfig, **changes: Any) -> DataConfig:
    """Return the config with changed training files; `source` and `size` change the part, column roles the columns."""
    files: FilesConfig | None = data.train.files
    assert files is not None
    columns = {name: changes.pop(name) for name in ("image", "question", "answer", "id") if name in changes}
    part = {name: changes.pop(name) for name in ("source", "size") if name in changes}
    files = replace(files, columns=replace(files.columns, **columns), **changes)
    return replace(data, train=replace(data.train, files=files, **part))

"""Answered questions on disk, one line each, so that an evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from othink_ray.config.schema import Config
from othink_ray.driver.checkpoint import ResumeError
from othink_ray.driver.evaluate import Exam
from othink_ray.whole_file import write_whole


class Answers:
    """The answers of one model to one exam: a first line that says to what they belong, then a line a question."""

    def __init__(self, file: Path, belongs_to: str, *, resume: bool) -> None:
        self.file = file
        self.rows: dict[str, Mapping[str, Any]] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if resume and file.is_file():
            self._read(belongs_to)
        else:
            self._write(belongs_to, [])

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self.rows |= {row["id"]: row for row in rows}

    def _read(self, belongs_to: str) -> None:
        """The lines so far; one that was torn when the evaluation stopped is asked again."""
        first, *lines = self.file.read_text(encoding="utf-8", errors="replace").split("\n")
        whole = [row for row in map(_parsed, lines) if row is not None]
        head = _parsed(first)
        stopped_at_once = head is None and not whole
        if head != {"belongs_to": belongs_to} and not stopped_at_once:
            raise ResumeError(
                f"{self.file} was answered by another model, or under other settings: take another run.dir, or set "
                "run.resume=never to ask again"
            )
        self.rows = {row["id"]: row for row in whole}
        self._write(belongs_to, whole)

    def _write(self, belongs_to: str, rows: Sequence[Mapping[str, Any]]) -> None:
        write_whole(self.file, "".join(json.dumps(row) + "\n" for row in ({"belongs_to": belongs_to}, *rows)))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def belongs_to(config: Config, model: str, exam: Exam) -> str:
    """A digest of all that shapes the answers; a folder of weights counts with its files' sizes and times."""
    weights = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(model).glob("*.safetensors")
    )
    questions = [
        (
            *(prompt.id, [message.text for message in prompt.messages], prompt.answer),
            [hashlib.sha256(image).hexdigest() for image in prompt.images],
        )
        for prompt in exam.prompts
    ]
    rollout = asdict(config.rollout)
    sampling = {name: rollout[name] for name in ("engine", "temperature", "max_tokens", "max_model_len")}
    pixels = (config.model.min_pixels, config.model.max_pixels, config.model.dtype)
    shaped: list[Any] = [model, weights, questions, sampling, pixels, config.algo.reward.without_tag]
    shaped += [config.eval.samples, config.train.seed]
    return hashlib.sha256(json.dumps(shaped, sort_keys=True).encode()).hexdigest()[:16]

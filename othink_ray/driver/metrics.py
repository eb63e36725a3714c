"""The run's folder: what is written while a run goes on, so that nothing is lost when it stops."""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from othink_ray.config.schema import WandbConfig
from othink_ray.driver.step_lines import StepLines
from othink_ray.driver.tracking import Tracker, open_tracker
from othink_ray.types import Group, ScoredGroup
from othink_ray.whole_file import write_whole

THUMBNAIL_PX = 256

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class RunRecords:
    """Writes the files of one run that grow with it and those that say what it is, and mirrors them to wandb.

    config.yaml and environment.json at the start, metrics.jsonl and samples.jsonl as it goes, summary.json at the end.

    A step's line is written when the step is done, so the line of step s says "after s steps"; on resume the lines
    above `resume_step` (all of them for a fresh start) move to `*.discarded.jsonl`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb: WandbConfig,
        config_yaml: str,
        environment: Mapping[str, Any],
        tell: Callable[[str], None],
        resume_step: int | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._wandb = wandb
        self._config_yaml = config_yaml
        self._environment = environment
        self._keep_up_to = -1 if resume_step is None else resume_step
        self._last_step = self._keep_up_to
        self._tell = tell
        self._metrics: StepLines
        self._samples: StepLines
        self._tracker: Tracker

    def __enter__(self) -> Self:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(self._run_dir / "config.yaml", self._config_yaml)
        write_whole(self._run_dir / "environment.json", json.dumps(jsonable(self._environment), indent=2) + "\n")
        self._metrics = StepLines(self._run_dir / "metrics.jsonl", self._keep_up_to, self._tell)
        self._samples = StepLines(self._run_dir / "samples.jsonl", self._keep_up_to, self._tell)
        resumed = self._keep_up_to >= 0
        self._tracker = open_tracker(self._run_dir, self._wandb, self._config_yaml, self._environment, resumed=resumed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._samples.close()
        self._tracker.close(failed=kind is not None)

    def log(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Append the one line of `step` and give back its numbers; in the file NaN and infinity are null."""
        assert step > self._last_step, f"step {step} is already in metrics.jsonl (last line: step {self._last_step})"
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        line = {"step": step, "time/unix_s": round(time.time(), 3), **numbers}
        self._metrics.append(_json(line))
        self._last_step = step
        self._tracker.log(step, numbers)
        return line

    def sample(self, step: int, scored: ScoredGroup, advantages: NDArray[np.float64]) -> None:
        """Append one group with its images as thumbnails; `advantages` has one value per answer, length G."""
        record = sample_record(step, scored, advantages)
        self._samples.append(_json(record))
        self._tracker.sample(step, record)

    def summary(self, values: Mapping[str, object]) -> None:
        """Write summary.json as a whole: a reader sees the old file or the new one, never half of it."""
        write_whole(self._run_dir / "summary.json", json.dumps(jsonable(values), indent=2) + "\n")


def _number(name: str, value: object) -> float:
    if _is_number(value):
        return float(value)
    raise ValueError(
        f"metric {name!r} is {value!r} ({type(value).__name__}): a metric is one number; "
        "turn it into a float before logging it"
    )


def _is_number(value: object) -> TypeGuard[Real]:
    return isinstance(value, Real) and not isinstance(value, bool)


def sample_record(step: int, scored: ScoredGroup, advantages: NDArray[np.float64]) -> dict[str, Any]:
    group = scored.group
    assert len(advantages) == len(group.completions), "one advantage per answer"
    return {
        "step": step,
        "prompt_id": group.prompt.id,
        "task": group.prompt.task,
        "question": question_text(group),
        "answer": group.prompt.answer,
        "images": [thumbnail_uri(image) for image in group.prompt.images],
        "version": group.version,
        "completions": [
            {
                "text": completion.text,
                "finish": completion.finish,
                "tokens": len(completion.token_ids),
                "reward": scored.rewards[i],
                "parts": {name: part[i] for name, part in scored.parts.items()},
                "advantage": advantages[i],
                "valid": scored.valid[i],
            }
            for i, completion in enumerate(group.completions)
        ],
    }


def question_text(group: Group) -> str:
    """What the user asked, all turns."""
    return "\n".join(message.text for message in group.prompt.messages if message.role == "user")


def thumbnail_uri(image: bytes) -> str:
    """A compressed image as a data URI of at most 256 x 256 px, in whichever of PNG and JPEG is smaller."""
    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGBA")
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    encoded: list[tuple[str, bytes]] = []
    for kind in ("png", "jpeg"):
        buffer = io.BytesIO()
        flat.save(buffer, format=kind, optimize=True, quality=85)
        encoded.append((kind, buffer.getvalue()))
    kind, data = min(encoded, key=lambda pair: len(pair[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def jsonable(value: object) -> Json:
    """Plain JSON with null where a number is not finite, so that every JSON reader takes it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise ValueError(
        f"{value!r} ({type(value).__name__}) cannot go into a run's records: use numbers, text, lists, mappings"
    )


def _json(record: Mapping[str, object]) -> str:
    # ASCII only: a model may write half a surrogate pair, or a character that some readers take for a line end.
    return json.dumps(jsonable(record), allow_nan=False)

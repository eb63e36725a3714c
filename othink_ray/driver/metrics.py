"""JSONL files of a run, a line a step: without gap or double even where it stops or its disk is full for a while."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from othink_ray.atomic_write import atomic_write
from othink_ray.config.schema import WandbConfig
from othink_ray.driver.loop import Step, teaches
from othink_ray.driver.trackers import Tracker, open_tracker
from othink_ray.types import Group, ScoredGroup

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_MOST_WAITING = 1000  # lines; those of samples.jsonl hold images


class StepLines:
    """Appends whole lines or none: what finds no room waits for it in memory."""

    def __init__(self, path: Path, last_kept_step: int, tell: Callable[[str], None]) -> None:
        """The file goes on after `last_kept_step`; later and torn lines are set aside in `*.discarded.jsonl`."""
        self._path, self._tell = path, tell
        _cut_after(path, last_kept_step)
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._waiting: deque[bytes] = deque()

    def append(self, line: str) -> None:
        waited = len(self._waiting)
        self._waiting.append(line.encode() + b"\n")
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self._file.truncate(self._size)
            if error.errno not in _NO_ROOM or waited >= _MOST_WAITING:
                raise
            if not waited:
                self._tell(f"{self._path.name} has no room on the disk: its lines wait in memory until there is some")
            return
        if waited:
            self._tell(f"{self._path.name} is written again, lines that waited first ({waited})")

    def _write(self, line: bytes) -> None:
        written = 0
        while written < len(line):
            written += self._file.write(line[written:])
        self._size += written

    def close(self) -> None:
        self._file.close()


def _cut_after(path: Path, last_kept_step: int) -> None:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.split("\n") if line]
    discarded = [line for line in lines if _step_of(line) > last_kept_step]
    if discarded:
        with path.with_name(f"{path.stem}.discarded.jsonl").open("a", encoding="utf-8") as aside:
            aside.writelines(line + "\n" for line in discarded)
    kept = "".join(line + "\n" for line in lines if _step_of(line) <= last_kept_step)
    if kept != text:
        atomic_write(path, kept)


def _step_of(line: str) -> float:
    """The step of a JSONL line; infinity for a torn one, which is beyond every step."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else math.inf


# Which layer of grading decided how many answers of the step.
_GRADED = {
    "rules": "reward/graded_by_rules",
    "symbolic": "reward/graded_symbolically",
    "timeout": "reward/grader_timeouts",
    "crash": "reward/grader_crashes",
    "untagged": "reward/untagged",
}


def taught_measures(step: Step) -> dict[str, float]:
    """The metrics of one step of supervised training: what has no meaning for worked answers is left out."""
    lengths = [len(answer.token_ids) for one in step.scored for answer in one.group.completions]
    seconds = sum(step.times.values())
    return {
        "loss": step.stats.loss,
        "entropy": step.stats.entropy,
        "grad_norm": step.stats.grad_norm,
        "lr": step.stats.lr,
        "tokens/completion_mean": float(np.mean(lengths)),
        "vision/encodes": float(step.stats.vision_encodes),
        "throughput/samples_per_s": len(lengths) / seconds,
        "throughput/tokens_per_s": float(sum(lengths)) / seconds,
        "time/step_s": seconds,
    } | {f"time/{name}_s": lap for name, lap in step.times.items()}


def measures(step: Step) -> dict[str, float]:
    """The metrics of one step. Rewards, lengths and groups are those of all that was asked, trained or not.

    Means of rewards are over valid answers; a masked answer counts only in `groups/masked`.
    """
    asked = step.requested
    valid = np.concatenate([one.valid for one in asked])
    answers = [completion for one in asked for completion in one.group.completions]
    lengths = np.array([len(answer.token_ids) for answer in answers])
    seconds = sum(step.times.values())
    found = {
        "reward/mean": _mean(np.concatenate([one.rewards for one in asked]), valid),
        "kl/beta": step.beta,
        "kl/mean": step.stats.kl_mean,
        "loss": step.stats.loss,
        "audit/logp_gap_mean": step.audit.gap_mean,
        "audit/logp_gap_max": step.audit.gap_max,
        "audit/tolerance": step.audit.tolerance,
        "audit/verified_weights": float(step.audit.verified),
        "push/mb": step.audit.sent_bytes / 2**20,
        "sampler/logp_gap_mean": step.stats.logp_gap_mean,
        "sampler/logp_gap_max": step.stats.logp_gap_max,
        "sampler/staleness": float(np.mean([step.step - one.group.version for one in step.scored])),
        "ratio/raw_mean": step.stats.ratio_raw_mean,
        "ratio/raw_max": step.stats.ratio_raw_max,
        "ratio/clip_frac": step.stats.ratio_clip_frac,
        "ratio/used_mean": step.stats.ratio_used_mean,
        "ratio/truncated_mean": step.stats.ratio_truncated_mean,
        "ratio/truncated_frac": step.stats.ratio_truncated_frac,
        "ratio/masked_frac": step.stats.ratio_masked_frac,
        "ratio/sequence_raw_mean": step.stats.ratio_sequence_raw_mean,
        "ratio/sequence_truncated_mean": step.stats.ratio_sequence_truncated_mean,
        "ratio/sequence_truncated_frac": step.stats.ratio_sequence_truncated_frac,
        "entropy": step.stats.entropy,
        "grad_norm": step.stats.grad_norm,
        "lr": step.stats.lr,
        "tokens/completion_mean": float(lengths.mean()),
        "tokens/cut_frac": float(np.mean([answer.finish == "length" for answer in answers])),
        "groups/constant_frac": float(np.mean([not teaches(one) for one in asked])),
        "groups/asked": float(len(asked)),
        "groups/masked": float((~valid).sum()),
        "rollout/image_encodes": float(sum(one.group.image_encodes for one in asked)),
        "vision/encodes": float(step.stats.vision_encodes),
        "throughput/samples_per_s": len(answers) / seconds,
        "throughput/tokens_per_s": float(lengths.sum()) / seconds,
        "time/step_s": seconds,
        "time/hidden_s": step.hidden_s,
    }
    for layer, name in _GRADED.items():
        found[name] = float(sum(one.graded.get(layer, 0) for one in asked))
    for part in sorted({name for one in asked for name in one.parts}):
        scored = [one for one in asked if part in one.parts]
        values = np.concatenate([one.parts[part] for one in scored])
        found[f"reward/{part}"] = _mean(values, np.concatenate([one.valid for one in scored]))
    return found | {f"time/{name}_s": lap for name, lap in step.times.items()}


def _mean(values: np.ndarray, valid: np.ndarray) -> float:
    return float(values[valid].mean()) if valid.any() else float("nan")


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
        atomic_write(self._run_dir / "config.yaml", self._config_yaml)
        atomic_write(self._run_dir / "environment.json", json.dumps(jsonable(self._environment), indent=2) + "\n")
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
        atomic_write(self._run_dir / "summary.json", json.dumps(jsonable(values), indent=2) + "\n")


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

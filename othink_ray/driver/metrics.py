"""Metrics of a step, and the files of a run: config, metrics, samples and summary.

The JSONL files have no missing, repeated or torn line, also after a resume or a disk that was full for a while.
"""

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
from othink_ray.driver.loop import StepRecord, has_signal
from othink_ray.driver.sft import SFTStepRecord
from othink_ray.driver.trackers import Tracker, open_tracker
from othink_ray.types import Group, ScoredGroup

THUMBNAIL_PX = 256
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAX_BUFFERED = 1000  # lines; a line of samples.jsonl holds images
_GRADED = {  # grading layer -> number of answers that it decided
    "rules": "reward/graded_by_rules",
    "symbolic": "reward/graded_symbolically",
    "timeout": "reward/grader_timeouts",
    "crash": "reward/grader_crashes",
    "untagged": "reward/untagged",
}

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class StepLines:
    """Appends complete lines to a JSONL file; while the disk is full, lines are buffered in memory."""

    def __init__(self, path: Path, last_kept_step: int, log: Callable[[str], None]) -> None:
        """Continue the file after `last_kept_step`; later and torn lines move to `*.discarded.jsonl`."""
        self._path, self._log = path, log
        _cut_after(path, last_kept_step)
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._buffer: deque[bytes] = deque()

    def append(self, line: str) -> None:
        buffered = len(self._buffer)
        self._buffer.append(line.encode() + b"\n")
        try:
            while self._buffer:
                self._write(self._buffer[0])
                self._buffer.popleft()
        except OSError as error:
            self._file.truncate(self._size)
            if error.errno not in _DISK_FULL or buffered >= _MAX_BUFFERED:
                raise
            if not buffered:
                self._log(f"{self._path.name}: no space left on the disk; buffering its lines in memory until there is")
            return
        if buffered:
            self._log(f"{self._path.name}: written again, starting with {buffered} buffered line(s)")

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
        with path.with_name(f"{path.stem}.discarded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in discarded)
    kept = "".join(line + "\n" for line in lines if _step_of(line) <= last_kept_step)
    if kept != text:
        atomic_write(path, kept)


def _step_of(line: str) -> float:
    """Return the step of a JSONL line; infinity for a torn one, so that it counts as later than any step."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else math.inf


def sft_metrics(step: SFTStepRecord) -> dict[str, float]:
    """Return the metrics of one SFT step."""
    lengths = [len(answer.token_ids) for group in step.demonstrations for answer in group.completions]
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


def step_metrics(step: StepRecord) -> dict[str, float]:
    """Return the metrics of one step; rewards, lengths and groups cover all requested groups, trained or not.

    Mean rewards are over valid answers; lengths and throughput include the masked ones, which `groups/masked` counts.
    """
    requested = step.requested
    valid = np.concatenate([scored.valid for scored in requested])
    answers = [completion for scored in requested for completion in scored.group.completions]
    lengths = np.array([len(answer.token_ids) for answer in answers])
    seconds = sum(step.times.values())
    metrics = {
        "reward/mean": _mean(np.concatenate([scored.rewards for scored in requested]), valid),
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
        "sampler/staleness": float(np.mean([step.step - scored.group.version for scored in step.scored])),
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
        "groups/constant_frac": float(np.mean([not has_signal(scored) for scored in requested])),
        "groups/asked": float(len(requested)),
        "groups/masked": float((~valid).sum()),
        "rollout/image_encodes": float(sum(scored.group.image_encodes for scored in requested)),
        "vision/encodes": float(step.stats.vision_encodes),
        "throughput/samples_per_s": len(answers) / seconds,
        "throughput/tokens_per_s": float(lengths.sum()) / seconds,
        "time/step_s": seconds,
        "time/hidden_s": step.hidden_s,
    }
    for layer, name in _GRADED.items():
        metrics[name] = float(sum(scored.graded.get(layer, 0) for scored in requested))
    for part in sorted({name for scored in requested for name in scored.parts}):
        graded = [scored for scored in requested if part in scored.parts]
        values = np.concatenate([scored.parts[part] for scored in graded])
        metrics[f"reward/{part}"] = _mean(values, np.concatenate([scored.valid for scored in graded]))
    return metrics | {f"time/{name}_s": lap for name, lap in step.times.items()}


def _mean(values: np.ndarray, valid: np.ndarray) -> float:
    return float(values[valid].mean()) if valid.any() else float("nan")


class RunRecords:
    """Writes the records of one run and sends them to wandb if `wandb.mode` is not off.

    config.yaml and environment.json at the start, metrics.jsonl and samples.jsonl after each step, summary.json at the
    end. On resume, lines of steps after `resume_step` (all lines on a fresh start) move to `*.discarded.jsonl`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb: WandbConfig,
        config_yaml: str,
        environment: Mapping[str, Any],
        log: Callable[[str], None],
        resume_step: int | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._wandb = wandb
        self._config_yaml = config_yaml
        self._environment = environment
        self._keep_up_to = -1 if resume_step is None else resume_step
        self._last_step = self._keep_up_to
        self._log = log
        self._metrics: StepLines
        self._samples: StepLines
        self._tracker: Tracker | None = None

    def __enter__(self) -> Self:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(self._run_dir / "config.yaml", self._config_yaml)
        atomic_write(self._run_dir / "environment.json", json.dumps(jsonable(self._environment), indent=2) + "\n")
        self._metrics = StepLines(self._run_dir / "metrics.jsonl", self._keep_up_to, self._log)
        self._samples = StepLines(self._run_dir / "samples.jsonl", self._keep_up_to, self._log)
        resumed = self._keep_up_to >= 0
        self._tracker = open_tracker(self._run_dir, self._wandb, self._config_yaml, self._environment, resumed=resumed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._samples.close()
        if self._tracker is not None:
            self._tracker.close(failed=kind is not None)

    def log(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Append the line of `step` and return its numbers; in the file NaN and infinity are null."""
        assert step > self._last_step, f"step {step} is already in metrics.jsonl (last line: step {self._last_step})"
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        line = {"step": step, "time/unix_s": round(time.time(), 3), **numbers}
        self._metrics.append(_json(line))
        self._last_step = step
        if self._tracker is not None:
            self._tracker.log(step, numbers)
        return line

    def sample(self, step: int, scored: ScoredGroup, advantages: NDArray[np.float64]) -> None:
        """Append one group with its images as thumbnails; `advantages` has one value per answer, length G."""
        record = sample_record(step, scored, advantages)
        self._samples.append(_json(record))
        if self._tracker is not None:
            self._tracker.sample(step, record)

    def summary(self, values: Mapping[str, object]) -> None:
        """Write summary.json atomically."""
        atomic_write(self._run_dir / "summary.json", json.dumps(jsonable(values), indent=2) + "\n")


def _number(name: str, value: object) -> float:
    if _is_number(value):
        return float(value)
    raise ValueError(
        f"metric {name!r} is {value!r} ({type(value).__name__}): must be one number; "
        "convert it to a float before logging it"
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
    """Return the text of all user turns."""
    return "\n".join(message.text for message in group.prompt.messages if message.role == "user")


def thumbnail_uri(image: bytes) -> str:
    """Return a compressed image as a data URI of at most 256 x 256 pixels, as PNG or JPEG, the smaller of the two."""
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
    """Convert to strict JSON types; numbers that are not finite become null."""
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
        f"{value!r} ({type(value).__name__}) cannot be written to the records: use numbers, strings, lists, mappings"
    )


def _json(record: Mapping[str, object]) -> str:
    # ASCII only: a model may write a lone surrogate, or a character that some readers treat as a line break.
    return json.dumps(jsonable(record), allow_nan=False)

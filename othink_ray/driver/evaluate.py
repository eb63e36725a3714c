"""Evaluation on held-out questions: accuracy with its interval, mean@k and pass@k; mode=eval over several models."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from othink_ray.atomic_write import atomic_write
from othink_ray.config.load import data_named, to_yaml
from othink_ray.config.model_rules import model_folder
from othink_ray.config.schema import Config
from othink_ray.core.intervals import wilson
from othink_ray.data import BadRow, LengthFilter, Source, SourceError, open_source
from othink_ray.data.prompts import with_gray_images
from othink_ray.driver.build import length_filter, open_eval_workers, open_sft_session
from othink_ray.driver.checkpoint import ResumeError
from othink_ray.driver.console import Console
from othink_ray.driver.metrics import question_text, thumbnail_uri
from othink_ray.driver.run_dir import environment
from othink_ray.driver.warm_start import base_model
from othink_ray.runtime.monitoring import Incidents
from othink_ray.runtime.worker_group import EvalWorkers
from othink_ray.types import Prompt, ScoredGroup

IMAGES_KEPT = 12  # number of questions of each eval set that keep thumbnails, for the report


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    """The held-out questions of one data set, and its rows that cannot be used."""

    name: str
    prompts: Sequence[Prompt]
    bad_rows: Sequence[BadRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Result of one greedy pass over an eval set; `lo` and `hi` are the 95 % confidence interval of the accuracy."""

    accuracy: float
    lo: float
    hi: float
    format: float
    n: int
    tokens_mean: float


def eval_sets(config: Config, length_filter: LengthFilter) -> list[EvalSet]:
    """Return the eval sets of the training data and of eval.also; data.blind adds a copy with gray images to each."""
    result = []
    for data in (config.data, *(data_named(name) for name in config.eval.also)):
        good, bad = held_out_prompts(open_source(data, "test"), config.eval.questions, data.on_bad_row, length_filter)
        result.append(EvalSet(name=data.name, prompts=good, bad_rows=bad))
        if data.blind:
            blind = [with_gray_images(prompt) for prompt in good]
            result.append(EvalSet(name=f"{data.name}-blind", prompts=blind, bad_rows=[]))
    return result


def graded(scored: ScoredGroup) -> list[dict[str, Any]]:
    """Return each answer of a group as plain values; an answer whose grading failed counts as wrong."""
    return [
        {
            "text": answer.text,
            "accuracy": float(scored.parts["accuracy"][index]) if scored.valid[index] else 0.0,
            "format": float(scored.parts["format"][index]) if scored.valid[index] else 0.0,
            "tokens": len(answer.token_ids),
            "finish": answer.finish,
        }
        for index, answer in enumerate(scored.group.completions)
    ]


def summarize(answers: Iterable[dict[str, Any]]) -> Evaluation:
    """Return accuracy, interval, format and mean length over one `graded` answer per question."""
    rows = list(answers)
    correct = [row["accuracy"] for row in rows]
    lo, hi = wilson(sum(correct), len(correct))
    return Evaluation(
        accuracy=float(np.mean(correct)),
        lo=lo,
        hi=hi,
        format=float(np.mean([row["format"] for row in rows])),
        n=len(rows),
        tokens_mean=float(np.mean([row["tokens"] for row in rows])),
    )


def held_out_prompts(
    source: Source, count: int | None, on_bad_row: str, length_filter: LengthFilter | None = None
) -> tuple[list[Prompt], list[BadRow]]:
    """Return prompts of the first `count` good rows (None: all; fewer if the data ends), and the skipped bad rows."""
    good: list[Prompt] = []
    bad: list[BadRow] = []
    for index in range(len(source)):
        if len(good) == count:
            break
        try:
            prompt = source.prompt(index)
            if length_filter is not None:
                length_filter(prompt)
        except BadRow as row:
            if on_bad_row == "stop":
                raise
            bad.append(row)
        else:
            good.append(prompt)
    if not good:
        raise SourceError(f"all {len(source)} held-out rows are bad; the first: {bad[0]}; check data.test")
    return good, bad


def pass_at(k: int, correct: int, sampled: int) -> float:
    """Return pass@k: the chance that k of the `sampled` answers, drawn without replacement, include a correct one."""
    return 1.0 - math.comb(sampled - correct, k) / math.comb(sampled, k)


class AnswerFile:
    """JSONL file of one model's answers to one eval set: a fingerprint of the settings, then one line per question."""

    def __init__(self, file: Path, fingerprint: str, *, resume: bool) -> None:
        self.file = file
        self.rows: dict[str, Mapping[str, Any]] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if resume and file.is_file():
            self._read(fingerprint)
        else:
            self._write(fingerprint, [])

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self.rows |= {row["id"]: row for row in rows}

    def _read(self, fingerprint: str) -> None:
        """Load the complete lines; a line cut off when the evaluation stopped is dropped, and its question repeated."""
        first, *lines = self.file.read_text(encoding="utf-8", errors="replace").split("\n")
        complete = [row for row in map(_parsed, lines) if row is not None]
        head = _parsed(first)
        empty = head is None and not complete
        if head != {"belongs_to": fingerprint} and not empty:
            raise ResumeError(
                f"{self.file} holds answers of another model or of other settings: set another run.dir, or set "
                "run.resume=never to evaluate again"
            )
        self.rows = {row["id"]: row for row in complete}
        self._write(fingerprint, complete)

    def _write(self, fingerprint: str, rows: Sequence[Mapping[str, Any]]) -> None:
        atomic_write(self.file, "".join(json.dumps(row) + "\n" for row in ({"belongs_to": fingerprint}, *rows)))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def fingerprint_of(config: Config, model: str, eval_set: EvalSet) -> str:
    """Return a digest of everything that shapes the answers; weight files count by name, size and date."""
    weights = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(model).glob("*.safetensors")
    )
    questions = [
        (
            *(prompt.id, [message.text for message in prompt.messages], prompt.answer),
            [hashlib.sha256(image).hexdigest() for image in prompt.images],
        )
        for prompt in eval_set.prompts
    ]
    rollout = asdict(config.rollout)
    sampling = {name: rollout[name] for name in ("engine", "temperature", "max_tokens", "max_model_len")}
    pixels = (config.model.min_pixels, config.model.max_pixels, config.model.dtype)
    parts: list[Any] = [model, weights, questions, sampling, pixels, config.algo.reward.without_tag]
    parts += [config.eval.samples, config.train.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def evaluate_models(
    config: Config, run_dir: Path, console: Console, write_report: Callable[[Path], Path], started: float
) -> None:
    """Evaluate each model on each eval set on a running Ray, except questions that an earlier start answered.

    evaluation.json is rewritten after each eval set.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / "metrics.jsonl").is_file():
        raise ResumeError(f"run.dir = {run_dir}: holds a training run; set another run.dir for the evaluation")
    atomic_write(run_dir / "config.yaml", to_yaml(config))
    atomic_write(run_dir / "environment.json", json.dumps(environment(), indent=2) + "\n")
    results: list[dict[str, Any]] = []
    models = [model_folder(path) for path in config.eval.models]
    for number, model in enumerate(models or [base_model(config, console, open_sft_session)]):
        label = config.eval.models[number] if models else config.model.path or f"{config.model.name} base"
        folder = Path("answers") / _folder_of(label)
        for eval_set, rows in _answered(config, model, run_dir / folder, console):
            cell = {"model": label, "data": eval_set.name, "answers": str(folder / f"{eval_set.name}.jsonl")}
            results.append(cell | _result(rows, eval_set, config.eval.samples))
            _show(console, results[-1])
            _write(run_dir, config, results, seconds=time.monotonic() - started)
    console.matrix(results)
    console.say(f"report: {write_report(run_dir)}")
    console.say(f"questions and answers: {run_dir / 'answers'}")


def _answered(
    config: Config, model: str, folder: Path, console: Console
) -> Iterator[tuple[EvalSet, list[dict[str, Any]]]]:
    """Yield each eval set with its answers in question order; load engines only if a question is unanswered."""
    found = eval_sets(config, length_filter(config, model))
    incidents = Incidents(config.faults.max_restarts, console.say)
    resume = config.run.resume != "never"
    files = [
        AnswerFile(folder / f"{eval_set.name}.jsonl", fingerprint_of(config, model, eval_set), resume=resume)
        for eval_set in found
    ]
    unanswered = any(len(file.rows) < len(eval_set.prompts) for eval_set, file in zip(found, files, strict=True))
    with ExitStack() as stack:
        if unanswered:
            with console.phase(f"loading {model}"):
                workers = stack.enter_context(open_eval_workers(config, model, incidents, console.say))
        for eval_set, file in zip(found, files, strict=True):
            for row in eval_set.bad_rows:
                console.say(f"dropped row {row.row_id}: {row.text}")
            todo = [prompt for prompt in eval_set.prompts if prompt.id not in file.rows]
            if todo:
                with console.phase(f"evaluating {len(todo)} questions of {eval_set.name}"):
                    _answer(config, workers, eval_set, todo, file, console)
            yield eval_set, [dict(file.rows[prompt.id]) for prompt in eval_set.prompts]


def _answer(
    config: Config,
    workers: EvalWorkers,
    eval_set: EvalSet,
    todo: Sequence[Prompt],
    file: AnswerFile,
    console: Console,
) -> None:
    """Answer the prompts in batches that fill the engines, and append each batch to the file."""
    with_images = {prompt.id for prompt in eval_set.prompts[:IMAGES_KEPT]}
    batch = max(1, config.rollout.num_actors * config.rollout.max_num_seqs // max(1, config.eval.samples))
    for start in range(0, len(todo), batch):
        prompts = todo[start : start + batch]
        greedy = {scored.group.prompt.id: scored for scored in workers.answer_greedily(prompts)}
        groups = workers.answer_freely(prompts, config.eval.samples) if config.eval.samples else []
        sampled = {scored.group.prompt.id: graded(scored) for scored in groups}
        file.append(
            [
                _row(greedy[prompt.id], sampled.get(prompt.id, []), with_images=prompt.id in with_images)
                for prompt in prompts
            ]
        )
        console.progress(start + len(prompts), len(todo))


def _row(greedy: ScoredGroup, sampled: list[dict[str, Any]], *, with_images: bool) -> dict[str, Any]:
    prompt = greedy.group.prompt
    return {
        "id": prompt.id,
        "task": prompt.task,
        "question": question_text(greedy.group),
        "answer": prompt.answer,
        "greedy": graded(greedy)[0],
        "sampled": sampled,
        "images": [thumbnail_uri(image) for image in prompt.images] if with_images else [],
    }


def _result(rows: Sequence[dict[str, Any]], eval_set: EvalSet, samples: int) -> dict[str, Any]:
    """Return the result of one model on one eval set."""
    result: dict[str, Any] = asdict(summarize(row["greedy"] for row in rows)) | {"dropped": len(eval_set.bad_rows)}
    if samples:
        correct = [sum(answer["accuracy"] for answer in row["sampled"]) for row in rows]
        powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
        result["mean_at"] = {str(samples): float(np.mean(correct)) / samples}
        result["pass_at"] = {
            str(k): float(np.mean([pass_at(k, int(count), samples) for count in correct])) for k in [*powers, samples]
        }
        result["sampled_format"] = float(np.mean([answer["format"] for row in rows for answer in row["sampled"]]))
    return result


def _show(console: Console, result: dict[str, Any]) -> None:
    text = (
        f"{result['model']}, {result['data']}: accuracy {100 * result['accuracy']:.1f} % "
        f"(95 % interval {100 * result['lo']:.1f} to {100 * result['hi']:.1f}), format {100 * result['format']:.1f} %, "
        f"{result['n']} questions"
    )
    for name in ("mean_at", "pass_at"):
        text += "".join(f", {name[:4]}@{k} {100 * share:.1f} %" for k, share in result.get(name, {}).items())
    console.say(text)


def _write(run_dir: Path, config: Config, results: Sequence[dict[str, Any]], seconds: float) -> None:
    content = {"engine": config.rollout.engine, "samples": config.eval.samples, "seconds": seconds, "results": results}
    atomic_write(run_dir / "evaluation.json", json.dumps(content, indent=2) + "\n")


def _folder_of(label: str) -> str:
    """Return a folder name that is readable and unique to the label."""
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    readable = re.sub(r"[^\w.-]+", "-", label).strip("-")[-60:]
    return f"{readable}-{digest}"

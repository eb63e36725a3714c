"""Held-out questions, and what the answers to them say: accuracy, its interval, mean@k and pass@k."""

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
from othink_ray.data.prompts import with_grey_images
from othink_ray.driver.build import length_filter, open_eval_workers, open_sft_workers
from othink_ray.driver.checkpoint import ResumeError
from othink_ray.driver.console import Console
from othink_ray.driver.metrics import question_text, thumbnail_uri
from othink_ray.driver.run_dir import environment
from othink_ray.driver.warm_start import base_model
from othink_ray.runtime.monitoring import Incidents
from othink_ray.runtime.worker_group import EvalWorkers
from othink_ray.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    """The held-out questions of one data set, and those of its rows that cannot be asked."""

    name: str
    prompts: Sequence[Prompt]
    bad_rows: Sequence[BadRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One pass over the held-out questions; `lo` and `hi` bound the accuracy with 95 % confidence."""

    accuracy: float
    lo: float
    hi: float
    format: float
    n: int
    tokens_mean: float


def eval_sets(config: Config, length_filter: LengthFilter) -> list[EvalSet]:
    """The run's own data set first, then those of eval.also; each with its blind twin where data.blind asks for one."""
    found = []
    for data in (config.data, *(data_named(name) for name in config.eval.also)):
        good, bad = held_out_prompts(open_source(data, "test"), config.eval.questions, data.on_bad_row, length_filter)
        found.append(EvalSet(name=data.name, prompts=good, bad_rows=bad))
        if data.blind:
            unseen = [with_grey_images(prompt) for prompt in good]
            found.append(EvalSet(name=f"{data.name}-blind", prompts=unseen, bad_rows=[]))
    return found


def graded(scored: ScoredGroup) -> list[dict[str, Any]]:
    """Each answer of a group as plain values; one whose scoring failed counts as wrong."""
    return [
        {
            "text": answer.text,
            "accuracy": float(scored.parts["accuracy"][place]) if scored.valid[place] else 0.0,
            "format": float(scored.parts["format"][place]) if scored.valid[place] else 0.0,
            "tokens": len(answer.token_ids),
            "finish": answer.finish,
        }
        for place, answer in enumerate(scored.group.completions)
    ]


def summarise(answers: Iterable[dict[str, Any]]) -> Evaluation:
    """Of one greedy answer a question, as `graded` gives them."""
    rows = list(answers)
    right = [row["accuracy"] for row in rows]
    lo, hi = wilson(sum(right), len(right))
    return Evaluation(
        accuracy=float(np.mean(right)),
        lo=lo,
        hi=hi,
        format=float(np.mean([row["format"] for row in rows])),
        n=len(rows),
        tokens_mean=float(np.mean([row["tokens"] for row in rows])),
    )


def held_out_prompts(
    source: Source, count: int | None, on_bad_row: str, length_filter: LengthFilter | None = None
) -> tuple[list[Prompt], list[BadRow]]:
    """The first `count` good rows (None: all), fewer where there are no more, and the bad ones among them."""
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
        raise SourceError(f"all {len(source)} held-out rows are bad, the first one: {bad[0]}; check data.test")
    return good, bad


def pass_at(k: int, right: int, sampled: int) -> float:
    """The chance that at least one of k answers is right, drawn without repeats from `sampled` of which so many are."""
    return 1.0 - math.comb(sampled - right, k) / math.comb(sampled, k)


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
        atomic_write(self.file, "".join(json.dumps(row) + "\n" for row in ({"belongs_to": belongs_to}, *rows)))


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def belongs_to(config: Config, model: str, exam: EvalSet) -> str:
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


WITH_PICTURE = 12  # so many questions of an exam keep a small picture of their images, for the report


def evaluate_models(
    config: Config, run_dir: Path, console: Console, write_report: Callable[[Path], Path], started: float
) -> None:
    """On a Ray that is up: asks what is not answered yet; evaluation.json grows by one model and exam at a time."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / "metrics.jsonl").is_file():
        raise ResumeError(f"{run_dir} holds a training run: give the evaluation a folder of its own, run.dir=…")
    atomic_write(run_dir / "config.yaml", to_yaml(config))
    atomic_write(run_dir / "environment.json", json.dumps(environment(), indent=2) + "\n")
    results: list[dict[str, Any]] = []
    models = [model_folder(path) for path in config.eval.models]
    for number, model in enumerate(models or [base_model(config, console, open_sft_workers)]):
        label = config.eval.models[number] if models else config.model.path or f"{config.model.name} base"
        folder = Path("answers") / _folder_of(label)
        for exam, rows in _answered(config, model, run_dir / folder, console):
            cell = {"model": label, "data": exam.name, "answers": str(folder / f"{exam.name}.jsonl")}
            results.append(cell | _result(rows, exam, config.eval.samples))
            _show(console, results[-1])
            _write(run_dir, config, results, seconds=time.monotonic() - started)
    console.matrix(results)
    console.say(f"report: {write_report(run_dir)}")
    console.say(f"all questions with their answers: {run_dir / 'answers'}")


def _answered(
    config: Config, model: str, folder: Path, console: Console
) -> Iterator[tuple[EvalSet, list[dict[str, Any]]]]:
    """Each exam with its answers, in the order of its questions; engines are loaded only if one has questions left."""
    found = eval_sets(config, length_filter(config, model))
    incidents = Incidents(config.faults.max_restarts, console.say)
    resume = config.run.resume != "never"
    kept = [Answers(folder / f"{exam.name}.jsonl", belongs_to(config, model, exam), resume=resume) for exam in found]
    open_questions = any(len(answers.rows) < len(exam.prompts) for exam, answers in zip(found, kept, strict=True))
    with ExitStack() as stack:
        if open_questions:
            with console.phase(f"loading {model}"):
                team = stack.enter_context(open_eval_workers(config, model, incidents, console.say))
        for exam, answers in zip(found, kept, strict=True):
            for row in exam.bad_rows:
                console.say(f"dropped row {row.row_id}: {row.reason}")
            todo = [prompt for prompt in exam.prompts if prompt.id not in answers.rows]
            if todo:
                with console.phase(f"asking {len(todo)} questions of {exam.name}"):
                    _ask(config, team, exam, todo, answers, console)
            yield exam, [dict(answers.rows[prompt.id]) for prompt in exam.prompts]


def _ask(
    config: Config, team: EvalWorkers, exam: EvalSet, todo: Sequence[Prompt], answers: Answers, console: Console
) -> None:
    pictured = {prompt.id for prompt in exam.prompts[:WITH_PICTURE]}
    batch = max(1, config.rollout.num_actors * config.rollout.max_num_seqs // max(1, config.eval.samples))
    for start in range(0, len(todo), batch):
        prompts = todo[start : start + batch]
        greedy = {one.group.prompt.id: one for one in team.answer_greedily(prompts)}
        freely = team.answer_freely(prompts, config.eval.samples) if config.eval.samples else []
        sampled = {one.group.prompt.id: graded(one) for one in freely}
        answers.append([_row(greedy[one.id], sampled.get(one.id, []), pictured=one.id in pictured) for one in prompts])
        console.progress(start + len(prompts), len(todo))


def _row(greedy: ScoredGroup, sampled: list[dict[str, Any]], *, pictured: bool) -> dict[str, Any]:
    prompt = greedy.group.prompt
    return {
        "id": prompt.id,
        "task": prompt.task,
        "question": question_text(greedy.group),
        "answer": prompt.answer,
        "greedy": graded(greedy)[0],
        "sampled": sampled,
        "images": [thumbnail_uri(image) for image in prompt.images] if pictured else [],
    }


def _result(rows: Sequence[dict[str, Any]], exam: EvalSet, samples: int) -> dict[str, Any]:
    """One cell of the matrix."""
    result: dict[str, Any] = asdict(summarise(row["greedy"] for row in rows)) | {"dropped": len(exam.bad_rows)}
    if samples:
        right = [sum(answer["accuracy"] for answer in row["sampled"]) for row in rows]
        powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
        result["mean_at"] = {str(samples): float(np.mean(right)) / samples}
        result["pass_at"] = {
            str(k): float(np.mean([pass_at(k, int(count), samples) for count in right])) for k in [*powers, samples]
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
    whole = {"engine": config.rollout.engine, "samples": config.eval.samples, "seconds": seconds, "results": results}
    atomic_write(run_dir / "evaluation.json", json.dumps(whole, indent=2) + "\n")


def _folder_of(label: str) -> str:
    """A name that still tells which model it was, and no other model has."""
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    readable = re.sub(r"[^\w.-]+", "-", label).strip("-")[-60:]
    return f"{readable}-{digest}"

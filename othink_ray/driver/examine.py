"""mode=eval: every model answers every exam; a matrix of models and tasks, and a line for each question."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from othink_ray.config.load import to_yaml
from othink_ray.config.model_rules import model_folder
from othink_ray.config.schema import Config
from othink_ray.driver.answers import Answers, belongs_to
from othink_ray.driver.build import open_classroom, open_examiners, screen
from othink_ray.driver.checkpoint import ResumeError
from othink_ray.driver.console import Console
from othink_ray.driver.environment import environment
from othink_ray.driver.evaluate import Exam, exams, graded, pass_at, summarise
from othink_ray.driver.metrics import question_text, thumbnail_uri
from othink_ray.driver.warm_start import base_model
from othink_ray.runtime.incidents import Incidents
from othink_ray.runtime.team import Examiners
from othink_ray.types import Prompt, ScoredGroup
from othink_ray.whole_file import write_whole

WITH_PICTURE = 12  # so many questions of an exam keep a small picture of their images, for the report


def examine(
    config: Config, run_dir: Path, console: Console, write_report: Callable[[Path], Path], started: float
) -> None:
    """On a Ray that is up: asks what is not answered yet; evaluation.json grows by one model and exam at a time."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / "metrics.jsonl").is_file():
        raise ResumeError(f"{run_dir} holds a training run: give the evaluation a folder of its own, run.dir=…")
    write_whole(run_dir / "config.yaml", to_yaml(config))
    write_whole(run_dir / "environment.json", json.dumps(environment(), indent=2) + "\n")
    results: list[dict[str, Any]] = []
    models = [model_folder(path) for path in config.eval.models]
    for number, model in enumerate(models or [base_model(config, console, open_classroom)]):
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
) -> Iterator[tuple[Exam, list[dict[str, Any]]]]:
    """Each exam with its answers, in the order of its questions; engines are loaded only if one has questions left."""
    found = exams(config, screen(config, model))
    incidents = Incidents(config.faults.max_restarts, console.say)
    resume = config.run.resume != "never"
    kept = [Answers(folder / f"{exam.name}.jsonl", belongs_to(config, model, exam), resume=resume) for exam in found]
    open_questions = any(len(answers.rows) < len(exam.prompts) for exam, answers in zip(found, kept, strict=True))
    with ExitStack() as stack:
        if open_questions:
            with console.phase(f"loading {model}"):
                team = stack.enter_context(open_examiners(config, model, incidents, console.say))
        for exam, answers in zip(found, kept, strict=True):
            for row in exam.bad_rows:
                console.say(f"dropped row {row.row_id}: {row.reason}")
            todo = [prompt for prompt in exam.prompts if prompt.id not in answers.rows]
            if todo:
                with console.phase(f"asking {len(todo)} questions of {exam.name}"):
                    _ask(config, team, exam, todo, answers, console)
            yield exam, [dict(answers.rows[prompt.id]) for prompt in exam.prompts]


def _ask(
    config: Config, team: Examiners, exam: Exam, todo: Sequence[Prompt], answers: Answers, console: Console
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


def _result(rows: Sequence[dict[str, Any]], exam: Exam, samples: int) -> dict[str, Any]:
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
    write_whole(run_dir / "evaluation.json", json.dumps(whole, indent=2) + "\n")


def _folder_of(label: str) -> str:
    """A name that still tells which model it was, and no other model has."""
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    readable = re.sub(r"[^\w.-]+", "-", label).strip("-")[-60:]
    return f"{readable}-{digest}"

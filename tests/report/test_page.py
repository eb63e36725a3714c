"""A run's page: its content, its safety against hostile text, and runs in any state."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from othink_ray.report import write_report

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
CONFIG = """
train: {steps: 200, seed: 7}
algo: {name: grpo_d}
model: {name: tiny}
data: {name: counting}
weights: {bucket_mb: 64}
"""
SUMMARY: dict[str, Any] = {
    "before": {"accuracy": 0.46, "lo": 0.392, "hi": 0.529, "format": 0.88, "n": 200, "tokens_mean": 24.1},
    "after": {"accuracy": 0.66, "lo": 0.592, "hi": 0.722, "format": 1.0, "n": 200, "tokens_mean": 23.0},
    "steps": 200,
    "seconds": 372.4,
    "audit_gap_max": 1.6e-5,
    "dropped": [["row-17", "image cannot be decoded"]],
    "model": "tiny",
    "data": "counting",
    "algo": "grpo_d",
    "seed": 7,
}
ENVIRONMENT: dict[str, Any] = {
    "command": "python -m othink_ray.main train.steps=200",
    "host": "head",
    "machines": [
        {"host": "head", "cpus": 16.0, "gpus": 0, "gpu_names": []},
        {"host": "worker", "cpus": 64.0, "gpus": 8.0, "gpu_names": ["H200"]},
    ],
    "git": {"commit": "0123abcd", "dirty": True},
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
}
CHARTS = [
    "Reward in training",
    "Held-out accuracy",
    "KL weight and KL",
    "Policy ratio and clipping",
    "Entropy and answer length",
    "Audit gap: engines against learner, nats",
    "Seconds per step",
    "Throughput",
    "Groups whose answers all score the same",
]


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "time/unix_s": 1_760_000_000.0 + step,
        "reward/mean": 1.5,
        "reward/accuracy": 0.5,
        "reward/format": 1.0,
        "kl/beta": 0.04,
        "kl/mean": 0.001 * step,
        "audit/logp_gap_mean": 1e-7,
        "audit/logp_gap_max": 1e-6,
        "audit/tolerance": 1e-5 * step,
        "ratio/raw_mean": 1.0,
        "ratio/raw_max": 1.1,
        "ratio/clip_frac": 0.01,
        "entropy": 0.4,
        "tokens/completion_mean": 23.0,
        "groups/constant_frac": 0.25,
        "time/step_s": 1.7,
        "time/generate_s": 0.9,
        "time/score_s": 0.1,
        "time/update_s": 0.5,
        "time/push_s": 0.1,
        "throughput/samples_per_s": 75.0,
    }


def sample(step: int, *, text: str = "<think> x </think><answer> 3 </answer>", **changes: Any) -> dict[str, Any]:
    answer = {"text": text, "finish": "stop", "tokens": 9, "parts": {"accuracy": 1.0}, "valid": True}
    return {
        "step": step,
        "prompt_id": f"q{step}",
        "task": "counting",
        "question": "How many?",
        "answer": "3",
        "images": [PIXEL],
        "version": step,
        "completions": [
            {**answer, "reward": 2.0, "advantage": 1.0},
            {**answer, "reward": 1.0, "advantage": -1.0},
        ],
        **changes,
    }


def write_run(
    folder: Path,
    *,
    rows: Iterable[Mapping[str, Any]] = (),
    samples: Iterable[Mapping[str, Any]] = (),
    summary: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in samples))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


class Page(HTMLParser):
    """Parsed page: every tag with its attributes, and all text outside the style sheet."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._in_style = False
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))


def test_a_finished_run_shows_accuracy_before_and_after_training(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, rows=map(row, range(1, 201)), samples=[sample(1)], summary=SUMMARY))
    for fact in ("46.0 %", "66.0 %", "+20.0 points", "39.2 – 52.9", "59.2 – 72.2", "grpo_d · tiny · counting"):
        assert fact in page.text
    for fact in (
        "6 min 12 s",
        "88.0 → 100.0 %",
        "24.1 → 23.0 tokens",
        "1.6e-05 nats",
        "9 October 2025",
    ):
        assert fact in page.text
    assert "not finished" not in page.text


def test_the_footer_shows_versions_machines_commit_and_command(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, rows=[row(1)], environment=ENVIRONMENT))
    for fact in (
        *("python 3.11.2", "torch 2.13.0", "commit 0123abcd, with uncommitted changes"),
        *("started on head", "head: 16 CPUs", "worker: 64 CPUs, 8 GPUs H200"),
        "python -m othink_ray.main train.steps=200",
    ):
        assert fact in page.text
    page = page_of(write_run(tmp_path, rows=[row(1)], environment=ENVIRONMENT | {"git": None}))
    assert "commit unknown" in page.text


def test_every_chart_is_drawn(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, rows=map(row, range(1, 201)), summary=SUMMARY))
    labels = [label.removesuffix(" against training step") for label in page.attributes("aria-label")]
    assert [label for label in labels if label in CHARTS and label != "Held-out accuracy"] == [
        title for title in CHARTS if title != "Held-out accuracy"
    ]
    assert "Held-out accuracy against training step" in page.attributes("aria-label")


def test_the_page_loads_nothing_from_outside(tmp_path: Path) -> None:
    external = sample(2, images=["https://example.org/x.png", PIXEL])
    page = page_of(write_run(tmp_path, rows=[row(1), row(2)], samples=[sample(1), external], summary=SUMMARY))
    assert page.attributes("src") == [PIXEL, PIXEL]
    assert not page.attributes("href")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"url\(|@import|//[a-z]", page.html)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.attributes("content")


@pytest.mark.parametrize("attack", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}"])
def test_text_from_models_and_data_is_escaped(tmp_path: Path, attack: str) -> None:
    hostile = sample(1, text=attack, question=attack, answer=attack, prompt_id=attack)
    summary = {**SUMMARY, "model": attack, "dropped": [[attack, attack]]}
    environment = {**ENVIRONMENT, "versions": {attack: attack}, "command": attack, "host": attack}
    page = page_of(write_run(tmp_path, rows=[row(1)], samples=[hostile], summary=summary, environment=environment))
    assert not {tag for tag, _ in page.tags} & {"script"}
    assert page.attributes("src") == [PIXEL]
    assert not page.attributes("onerror")
    assert page.text.count(attack) >= 9
    assert "49" not in page.text.split("Answers, early and late")[1]


def test_an_unfinished_run_with_a_partial_last_line_is_marked(tmp_path: Path) -> None:
    write_run(tmp_path, rows=[row(1), {**row(2), "eval/accuracy": 0.55}, row(3)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/me')
    page = page_of(tmp_path)
    assert "not finished: step 3 of 200" in page.text
    assert "55.0 %" in page.text
    assert "latest evaluation, step 2" in page.text
    assert "1 unreadable line was skipped" in page.text


def test_a_run_of_one_step_has_a_dot_in_every_line_chart(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, rows=[row(1)], samples=[sample(1)]))
    assert sum(tag == "circle" for tag, _ in page.tags) == 3 + 2 + 3 + 2 + 2 + 1 + 1
    assert "only · step 1" in page.text


def test_a_run_without_any_log_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    page = page_of(tmp_path)
    assert "not finished: step 0 of 200" in page.text
    assert not any("svg" in tag for tag, _ in page.tags)


def test_a_folder_without_a_run_raises_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.yaml does not exist: a report needs a run's folder"):
        write_report(tmp_path)


def test_non_finite_values_are_gaps_not_errors(tmp_path: Path) -> None:
    unscored = sample(1)
    unscored["completions"][0] |= {"reward": None, "advantage": None, "parts": {"accuracy": None}}
    broken = {**SUMMARY, "audit_gap_max": None, "after": {**SUMMARY["after"], "accuracy": None}}
    rows = [row(1), {**row(2), "kl/mean": None}, row(3)]
    page = page_of(write_run(tmp_path, rows=rows, samples=[unscored], summary=broken))
    assert "46.0 %" in page.text
    assert "66.0 %" not in page.text
    assert "nan" not in page.text.lower()
    assert not [style for style in page.attributes("style") if "nan" in style]


def test_first_middle_and_last_sampled_steps_are_shown(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, rows=[row(1)], samples=[sample(step) for step in (1, 20, 40, 60, 80)]))
    shown = re.findall(r"(\w+) · step (\d+)", page.text)
    assert shown == [("early", "1"), ("midway", "40"), ("late", "80")]


def test_a_group_with_different_rewards_is_preferred(tmp_path: Path) -> None:
    same = sample(1, prompt_id="all-equal")
    for answer in same["completions"]:
        answer["reward"] = 1.0
    page = page_of(write_run(tmp_path, rows=[row(1)], samples=[same, sample(1, prompt_id="mixed")]))
    assert "mixed" in page.text
    assert "all-equal" not in page.text


def test_masked_and_truncated_answers_are_marked(tmp_path: Path) -> None:
    marked = sample(1)
    marked["completions"][0] |= {"valid": False}
    marked["completions"][1] |= {"finish": "length"}
    page = page_of(write_run(tmp_path, rows=[row(1)], samples=[marked]))
    assert "not scored, masked" in page.text
    assert "9 tokens, cut off" in page.text


def test_advantage_bars_point_left_if_negative_else_right(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, rows=[row(1)], samples=[sample(1)]))
    bars = [attributes for _, attributes in page.tags if (attributes.get("class") or "").startswith("fill")]
    fills = [(bar["class"], bar["style"]) for bar in bars]
    assert fills == [("fill plus", "left:50.0%;width:50.0%"), ("fill minus", "left:0.0%;width:50.0%")]


def test_dropped_rows_and_the_configuration_are_shown(tmp_path: Path) -> None:
    many = [[f"row-{i}", "no answer"] for i in range(130)]
    page = page_of(write_run(tmp_path, rows=[row(1)], summary={**SUMMARY, "dropped": many}))
    assert "row-99 no answer and 30 more" in page.text
    assert "bucket_mb: 64" in page.text


def test_incidents_are_shown_and_partial_records_are_skipped(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, rows=[row(1)])
    incidents = [json.dumps({"unix_s": 1.7e9 + at, "text": f"actor {at} <died>"}) for at in range(2)]
    (tmp_path / "incidents.jsonl").write_text("\n".join([*incidents, '{"unix_s": 17']))
    page = page_of(run_dir)
    assert "Incidents 2" in page.text
    assert "14 Nov 22:13:21 UTC" in page.text and "actor 1 <died>" in page.text


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    rows = [{**row(step), "entropy": 1 + math.sin(step / 50)} for step in range(1, 5001)]
    write_run(tmp_path, rows=rows)
    assert write_report(tmp_path).stat().st_size < 400_000


def test_writing_again_replaces_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, rows=[row(1)])
    first = write_report(tmp_path).read_text()
    write_run(tmp_path, rows=[row(1), row(2)])
    assert write_report(tmp_path).read_text() != first
    assert sorted(path.name for path in tmp_path.glob("report*")) == ["report.html"]

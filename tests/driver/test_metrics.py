"""The records of a run: metrics.jsonl, samples.jsonl, summary.json and wandb."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from othink_ray.config.schema import WandbConfig
from othink_ray.driver.metrics import RunRecords
from othink_ray.types import Completion, Group, Message, Prompt, ScoredGroup

OFF = WandbConfig(mode="off", project="test", samples_every=2)
OFFLINE = WandbConfig(mode="offline", project="test", samples_every=2)
ENVIRONMENT = {"versions": {"ray": "2.60.0"}, "git": {"commit": "0123abcd", "dirty": True}}


def open_records(run_dir: Path, *, wandb: WandbConfig = OFF, resume_step: int | None = None) -> RunRecords:
    return RunRecords(
        run_dir,
        wandb=wandb,
        config_yaml="train:\n  steps: 3\n",
        environment=ENVIRONMENT,
        log=pytest.fail,
        resume_step=resume_step,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def encoded(picture: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


def decode_image(data_uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_uri.partition(",")[2])))


def scored_group(image: bytes | None = None) -> ScoredGroup:
    prompt = Prompt(
        id="q7",
        messages=(Message(role="system", text="Be brief."), Message(role="user", text="How many?", images=1)),
        images=(image if image is not None else encoded(Image.new("RGB", (84, 84), "red")),),
        answer="3",
        task="counting",
    )
    answers = tuple(
        Completion(
            token_ids=np.arange(length, dtype=np.int64),
            sampler_logprobs=np.zeros(length, dtype=np.float32),
            text=f"<answer> {length} </answer>",
            finish="stop",
        )
        for length in (3, 5)
    )
    group = Group(prompt=prompt, prompt_token_ids=np.arange(4, dtype=np.int64), completions=answers, version=2)
    return ScoredGroup(
        group=group,
        rewards=np.array([2.0, 1.0]),
        parts={"accuracy": np.array([1.0, 0.0]), "format": np.array([1.0, 1.0])},
        valid=np.array([True, False]),
    )


def test_every_step_is_one_line_readable_before_the_run_ends(tmp_path: Path) -> None:
    with open_records(tmp_path) as run:
        run.log(1, {"reward/mean": 0.5})
        run.log(2, {"reward/mean": np.float64(0.75), "eval/accuracy": 1})
        written = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written] == [1, 2]
    assert written[1]["reward/mean"] == 0.75
    assert written[1]["eval/accuracy"] == 1.0
    assert "eval/accuracy" not in written[0]


def test_config_and_environment_are_written_at_the_start(tmp_path: Path) -> None:
    with open_records(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / "config.yaml").read_text() == "train:\n  steps: 3\n"
        assert json.loads((tmp_path / "new" / "run" / "environment.json").read_text()) == ENVIRONMENT


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    with open_records(tmp_path) as run:
        numbers = run.log(1, {"kl/mean": math.nan, "ratio/raw_max": math.inf, "entropy": 0.0})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line.keys() == numbers.keys()
    assert (line["kl/mean"], line["ratio/raw_max"], line["entropy"]) == (None, None, 0.0)


@pytest.mark.parametrize("value", ["0.5", True, None, np.array([0.5]), [1.0]])
def test_a_metric_that_is_not_a_number_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    with open_records(tmp_path) as run, pytest.raises(ValueError, match=r"'reward/mean'.*one number"):
        run.log(1, {"reward/mean": value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_step_cannot_be_logged_twice(tmp_path: Path) -> None:
    with open_records(tmp_path) as run:
        run.log(4, {"entropy": 1.0})
        with pytest.raises(AssertionError, match="step 4"):
            run.log(4, {"entropy": 1.0})


def test_resuming_discards_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    with open_records(tmp_path) as run:
        for step in (1, 2, 3, 4):
            run.log(step, {"entropy": float(step)})
            run.sample(step, scored_group(), np.array([1.0, -1.0]))
    with open_records(tmp_path, resume_step=2) as run:
        run.log(3, {"entropy": 30.0})
    assert [(line["step"], line["entropy"]) for line in lines(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 30)]
    assert steps(tmp_path / "metrics.discarded.jsonl") == [3, 4]
    assert steps(tmp_path / "samples.jsonl") == [1, 2]
    assert steps(tmp_path / "samples.discarded.jsonl") == [3, 4]


def test_resuming_after_a_torn_line_starts_a_new_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "entropy": 1.0}\n{"step": 2, "entr')
    with open_records(tmp_path, resume_step=1) as run:
        run.log(2, {"entropy": 2.0})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == '{"step": 2, "entr\n'


def test_a_last_line_without_a_newline_gets_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "entropy": 1.0}')
    with open_records(tmp_path, resume_step=1) as run:
        run.log(2, {"entropy": 2.0})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_fresh_start_keeps_old_lines_as_discarded(tmp_path: Path) -> None:
    for _ in range(2):
        with open_records(tmp_path) as run:
            run.log(1, {"entropy": 1.0})
    assert steps(tmp_path / "metrics.jsonl") == [1]
    assert steps(tmp_path / "metrics.discarded.jsonl") == [1]


def test_a_sample_holds_all_answers_with_their_rewards(tmp_path: Path) -> None:
    with open_records(tmp_path) as run:
        run.sample(3, scored_group(), np.array([0.7, -0.7]))
    (sample,) = lines(tmp_path / "samples.jsonl")
    assert {key: sample[key] for key in ("step", "prompt_id", "task", "question", "answer", "version")} == {
        "step": 3,
        "prompt_id": "q7",
        "task": "counting",
        "question": "How many?",
        "answer": "3",
        "version": 2,
    }
    assert sample["completions"][1] == {
        "text": "<answer> 5 </answer>",
        "finish": "stop",
        "tokens": 5,
        "reward": 1.0,
        "parts": {"accuracy": 0.0, "format": 1.0},
        "advantage": -0.7,
        "valid": False,
    }


def test_any_text_of_a_model_stays_on_one_line(tmp_path: Path) -> None:
    scored = scored_group()
    text = "a\nb\u2028c\x85d\x1b[31m\ud800 é"
    odd = dataclasses.replace(scored.group.completions[0], text=text)
    group = dataclasses.replace(scored.group, completions=(odd, odd))
    with open_records(tmp_path) as run:
        run.sample(1, dataclasses.replace(scored, group=group), np.zeros(2))
    (sample,) = lines(tmp_path / "samples.jsonl")
    assert sample["completions"][0]["text"] == text


def test_thumbnails_keep_their_shape_and_fit_256_pixels(tmp_path: Path) -> None:
    wide = encoded(Image.effect_noise((1024, 512), 60).convert("RGB"), "jpeg")
    with open_records(tmp_path) as run:
        run.sample(1, scored_group(wide), np.zeros(2))
        run.sample(2, scored_group(), np.zeros(2))
    large, small = lines(tmp_path / "samples.jsonl")
    assert decode_image(large["images"][0]).size == (256, 128)
    assert decode_image(small["images"][0]).size == (84, 84)
    assert small["images"][0].startswith("data:image/png;base64,")


def test_transparent_pixels_are_shown_on_white(tmp_path: Path) -> None:
    with open_records(tmp_path) as run:
        run.sample(1, scored_group(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))), np.zeros(2))
    (sample,) = lines(tmp_path / "samples.jsonl")
    assert decode_image(sample["images"][0]).convert("RGB").getpixel((4, 4)) == (255, 255, 255)


def test_the_summary_is_strict_json_and_leaves_no_part_file(tmp_path: Path) -> None:
    with open_records(tmp_path) as run:
        run.summary({"steps": np.int64(3), "audit_gap_max": math.nan, "report": tmp_path / "report.html"})
        run.summary({"steps": 4, "audit_gap_max": math.nan, "dropped": [("q1", "no image")]})
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == {"steps": 4, "audit_gap_max": None, "dropped": [["q1", "no image"]]}
    assert "NaN" not in text
    assert not list(tmp_path.glob("*.part"))


def test_an_unwritable_summary_keeps_the_old_one(tmp_path: Path) -> None:
    with open_records(tmp_path) as run:
        run.summary({"steps": 3})
        with pytest.raises(ValueError, match="object"):
            run.summary({"steps": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3}


def test_offline_wandb_keeps_its_run_in_the_run_folder(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with open_records(tmp_path, wandb=OFFLINE) as run:
            run.log(1, {"entropy": 1.0, "kl/mean": math.nan})
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    assert b"entropy" in content
    assert b"0123abcd" in content


def test_wandb_gets_tables_of_samples_with_their_images(tmp_path: Path) -> None:
    with open_records(tmp_path, wandb=OFFLINE) as run:
        for step in range(3):
            run.log(step, {"entropy": 1.0})
            run.sample(step, scored_group(encoded(Image.new("RGB", (1024, 512), (step, 0, 0)))), np.array([1.0, -1.0]))
    staged = [file.read_bytes() for file in (tmp_path / "wandb" / "data" / "artifacts" / "staging").iterdir()]
    images = {hashlib.sha256(content).hexdigest() for content in staged if content.startswith(b"\x89PNG")}
    tables = [json.loads(content) for content in {file for file in staged if file.startswith(b'{"_type": "table"')}]
    rows = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    assert sorted([row["step"] for row in rows]) == [0, 0, 1, 1, 2, 2]
    assert sorted(len(table["data"]) for table in tables) == [2, 4]
    assert {(row["completion"], row["reward"], row["advantage"]) for row in rows} == {
        ("<answer> 3 </answer>", 2.0, 1.0),
        ("<answer> 5 </answer>", 1.0, -1.0),
    }
    assert {row["image"]["sha256"] for row in rows} == images
    assert {(row["image"]["width"], row["image"]["height"]) for row in rows} == {(256, 128)}


def test_a_failing_wandb_warns_and_the_run_continues(tmp_path: Path) -> None:
    broken = dataclasses.replace(OFFLINE, project="no/such?project#name")
    with (
        pytest.warns(RuntimeWarning, match=r"wandb stopped.*the run continues"),
        open_records(tmp_path, wandb=broken) as run,
    ):
        run.log(1, {"entropy": 1.0})
    assert steps(tmp_path / "metrics.jsonl") == [1]

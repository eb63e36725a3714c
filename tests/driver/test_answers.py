"""Answered questions on disk: kept, torn, and those of another model."""

from __future__ import annotations

from pathlib import Path

import pytest

from othink_ray.config.load import load
from othink_ray.driver.checkpoint import ResumeError
from othink_ray.driver.evaluate import Answers, belongs_to, eval_sets

CONFIG = load(["eval.questions=2"])
[EXAM] = eval_sets(CONFIG, lambda prompt: None)


def test_what_was_answered_is_there_again_and_a_torn_line_is_not(tmp_path: Path) -> None:
    file = tmp_path / "answers" / "a.jsonl"
    Answers(file, "x", resume=False).append([{"id": "p1"}, {"id": "p2"}])
    with file.open("a") as torn:
        torn.write('{"id": "p3", "gre')
    kept = Answers(file, "x", resume=True)
    assert set(kept.rows) == {"p1", "p2"}
    kept.append([{"id": "p3"}])
    assert list(Answers(file, "x", resume=True).rows) == ["p1", "p2", "p3"]


def test_answers_to_something_else_are_refused_with_a_way_out(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    Answers(file, "x", resume=False).append([{"id": "p1"}])
    with pytest.raises(ResumeError, match=r"other settings: take another run\.dir, or set run\.resume=never"):
        Answers(file, "y", resume=True)
    assert Answers(file, "y", resume=False).rows == {}


@pytest.mark.parametrize("override", ["eval.samples=4", "train.seed=1", "rollout.max_tokens=16", "rollout.engine=hf"])
def test_whatever_shapes_an_answer_makes_it_another_evaluation(override: str) -> None:
    changed = load(["eval.questions=2", override])
    assert belongs_to(changed, "model", EXAM) != belongs_to(CONFIG, "model", EXAM)


def test_so_do_new_weights_in_the_same_folder(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = belongs_to(CONFIG, str(tmp_path), EXAM)
    weights.write_bytes(b"22")
    assert belongs_to(CONFIG, str(tmp_path), EXAM) != before


def test_how_many_engines_answer_does_not_matter() -> None:
    changed = load(["eval.questions=2", "rollout.num_actors=2"])
    assert belongs_to(changed, "model", EXAM) == belongs_to(CONFIG, "model", EXAM)

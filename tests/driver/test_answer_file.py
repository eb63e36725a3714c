"""Files of answers: resumed, torn, and of another model or other settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from othink_ray.config.load import load
from othink_ray.driver.checkpoint import ResumeError
from othink_ray.driver.evaluate import AnswerFile, eval_sets, fingerprint_of

CONFIG = load(["eval.questions=2"])
[EVAL_SET] = eval_sets(CONFIG, lambda prompt: None)


def test_resume_keeps_complete_answers_and_drops_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "answers" / "a.jsonl"
    AnswerFile(file, "x", resume=False).append([{"id": "p1"}, {"id": "p2"}])
    with file.open("a") as torn:
        torn.write('{"id": "p3", "gre')
    kept = AnswerFile(file, "x", resume=True)
    assert set(kept.rows) == {"p1", "p2"}
    kept.append([{"id": "p3"}])
    assert list(AnswerFile(file, "x", resume=True).rows) == ["p1", "p2", "p3"]


def test_answers_of_other_settings_are_refused_with_a_remedy(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    AnswerFile(file, "x", resume=False).append([{"id": "p1"}])
    with pytest.raises(ResumeError, match=r"other settings: set another run\.dir, or set run\.resume=never"):
        AnswerFile(file, "y", resume=True)
    assert AnswerFile(file, "y", resume=False).rows == {}


@pytest.mark.parametrize("override", ["eval.samples=4", "train.seed=1", "rollout.max_tokens=16", "rollout.engine=hf"])
def test_settings_that_shape_answers_change_the_fingerprint(override: str) -> None:
    changed = load(["eval.questions=2", override])
    assert fingerprint_of(changed, "model", EVAL_SET) != fingerprint_of(CONFIG, "model", EVAL_SET)


def test_new_weights_in_the_folder_change_the_fingerprint(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = fingerprint_of(CONFIG, str(tmp_path), EVAL_SET)
    weights.write_bytes(b"22")
    assert fingerprint_of(CONFIG, str(tmp_path), EVAL_SET) != before


def test_the_number_of_engines_keeps_the_fingerprint() -> None:
    changed = load(["eval.questions=2", "rollout.num_actors=2"])
    assert fingerprint_of(changed, "model", EVAL_SET) == fingerprint_of(CONFIG, "model", EVAL_SET)

"""Eval sets and the grading of their answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from othink_ray.config.load import load
from othink_ray.data import BadRow, SourceError, open_source
from othink_ray.data.prompts import decode_image, image_size
from othink_ray.driver.evaluate import eval_sets, graded, held_out_prompts, pass_at, summarize
from othink_ray.types import Completion, Group, Prompt, ScoredGroup
from tests.engines.samples import picture


class EveryThirdIsBad:
    """The built-in test questions; every third row is bad."""

    def __init__(self) -> None:
        self.source = open_source(load([]).data, "test")

    def __len__(self) -> int:
        return len(self.source)

    def prompt(self, index: int) -> Prompt:
        if index % 3 == 0:
            raise BadRow(f"row-{index}", "the question is empty", "fill it in")
        return self.source.prompt(index)


def test_bad_rows_are_reported_and_replaced_by_later_rows() -> None:
    prompts, bad = held_out_prompts(EveryThirdIsBad(), 4, "drop")
    assert len(prompts) == 4
    assert [row.row_id for row in bad] == ["row-0", "row-3"]


def test_on_bad_row_stop_raises_the_first_bad_row() -> None:
    with pytest.raises(BadRow, match="row-0"):
        held_out_prompts(EveryThirdIsBad(), 4, "stop")


def test_a_short_source_returns_all_its_good_rows() -> None:
    prompts, _ = held_out_prompts(EveryThirdIsBad(), 10_000, "drop")
    assert len(prompts) == 256 - 86


def test_rows_over_the_length_limit_are_bad_rows() -> None:
    def too_long(prompt: Prompt) -> None:
        if not prompt.id.endswith("4"):
            raise BadRow(prompt.id, "too long", "cut it")

    source = open_source(load([]).data, "test")
    prompts, bad = held_out_prompts(source, 2, "drop", too_long)
    assert [prompt.id for prompt in prompts] == ["scenes/test/000004", "scenes/test/000014"]
    assert len(bad) == 13

    def never(prompt: Prompt) -> None:
        raise BadRow(prompt.id, "too long", "cut it")

    with pytest.raises(SourceError, match=r"all 256 held-out rows are bad; the first: row scenes/test/0+: too"):
        held_out_prompts(source, 2, "drop", never)


@pytest.mark.parametrize(("sampled", "correct"), [(1, 0), (1, 1), (4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_answer(sampled: int, correct: int) -> None:
    answers = [index < correct for index in range(sampled)]
    for k in range(1, sampled + 1):
        draws = list(itertools.combinations(answers, k))
        assert pass_at(k, correct, sampled) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_an_answer_whose_grading_failed_counts_as_wrong() -> None:
    prompt = open_source(load([]).data, "test").prompt(0)
    answer = Completion(token_ids=np.arange(2), sampler_logprobs=np.zeros(2, np.float32), text="?", finish="stop")
    group = Group(prompt=prompt, prompt_token_ids=np.arange(2), completions=(answer,), version=0)
    masked = ScoredGroup(group=group, rewards=np.zeros(1), parts={}, valid=np.array([False]))
    assert [(row["accuracy"], row["format"]) for row in graded(masked)] == [(0.0, 0.0)]
    assert summarize(graded(masked)).accuracy == 0.0


def test_eval_questions_limits_the_eval_set(tmp_path: Path) -> None:
    rows = [{"image_path": "one.png", "question": f"Question {n}?", "ground_truth": str(n)} for n in range(754)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.png").write_bytes(picture(56, 56, seed=0))
    geoqa = [
        *("data=geoqa", f"data.test.files.path={tmp_path / 'test.jsonl'}", f"data.test.files.image_root={tmp_path}"),
        "mode=eval",
    ]
    for overrides, count in (([], 754), (["eval.questions=256"], 256), (["eval.questions=1000"], 754)):
        [eval_set] = eval_sets(load([*geoqa, *overrides]), lambda prompt: None)
        assert len(eval_set.prompts) == count
    [demo] = eval_sets(load([]), lambda prompt: None)
    assert len(demo.prompts) == 256


def test_the_training_data_comes_first_among_the_eval_sets() -> None:
    config = load(["eval.also=[geometry]", "eval.questions=3"])
    found = eval_sets(config, lambda prompt: None)
    assert [eval_set.name for eval_set in found] == ["counting", "geometry"]
    assert [{prompt.task for prompt in eval_set.prompts} for eval_set in found] == [{"counting"}, {"geometry"}]


def test_data_blind_adds_an_eval_set_with_gray_images() -> None:
    plain, blind, other = eval_sets(
        load(["data.blind=true", "eval.questions=4", "eval.also=[geometry]"]), lambda _: None
    )
    assert [eval_set.name for eval_set in (plain, blind, other)] == ["counting", "counting-blind", "geometry"]
    for shown, hidden in zip(plain.prompts, blind.prompts, strict=True):
        assert (hidden.id, hidden.messages, hidden.answer) == (shown.id, shown.messages, shown.answer)
        assert [image_size(image) for image in hidden.images] == [image_size(image) for image in shown.images]
        for image in hidden.images:
            assert len(set(np.asarray(decode_image(image)).flatten())) == 1

"""The format reward: tag order, robustness and speed on any text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from othink_ray.rewards import format_reward

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = st.lists(st.sampled_from([*TAGS, " ", "\n", "3", "\0", "\ud800"]), max_size=9).map("".join)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("<think> I count 3 items. </think><answer> 3 </answer>", 1),
        ("<think>a</think> <answer>3</answer>", 1),
        ("<think>a</think>\n\n<answer>3</answer>", 1),
        ("  <think>a</think><answer>3</answer>\n", 1),
        ("<think>a\nb\nc</think><answer>3\n</answer>", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>1 < 2 > 0 </ think></think><answer>3</answer>", 1),
        ("<think>a\0b</think><answer>\ud800</answer>", 1),
        ("", 0),
        ("3", 0),
        ("<answer>3</answer>", 0),
        ("<think>a</think>", 0),
        ("<think>a</think>3", 0),
        ("<think>a<answer>3</answer>", 0),
        ("a</think><answer>3</answer>", 0),
        ("<think>a</think><answer>3", 0),
        ("<think>a</think>3</answer>", 0),
        ("<answer>3</answer><think>a</think>", 0),
        ("so <think>a</think><answer>3</answer>", 0),
        ("<think>a</think> so <answer>3</answer>", 0),
        ("<think>a</think><answer>3</answer> done", 0),
        ("<think>a</think><answer>3</answer><answer>3</answer>", 0),
        ("<think>a</think><think>b</think><answer>3</answer>", 0),
        ("<think>a<think>b</think></think><answer>3</answer>", 0),
        ("<think>a<answer>3</answer></think>", 0),
        ("<think>a</think><answer><answer>3</answer></answer>", 0),
        ("<think><answer>3</think></answer>", 0),
        ("<think>a</think><answer><think>3</answer>", 0),
        ("</think><think><answer>3</answer>", 0),
        ("<think>a</think></answer>3<answer>", 0),
        ("<Think>a</Think><Answer>3</Answer>", 0),
        ("<think >a</think><answer>3</answer>", 0),
        ("<think>a</think>\0<answer>3</answer>", 0),
        ("<think>a</think><answer>3</answer><|im_end|>", 0),
    ],
)
def test_verdicts_on_texts(text: str, verdict: int) -> None:
    assert format_reward(text) == verdict


@given(st.text(st.characters(categories=None)) | PIECES)
@settings(max_examples=500, deadline=None)
def test_any_text_gets_a_verdict_and_1_needs_tags_in_order(text: str) -> None:
    verdict = format_reward(text)
    assert verdict in (0.0, 1.0)
    if verdict:
        positions = [text.index(tag) for tag in TAGS]
        assert positions == sorted(positions)
        assert [text.count(tag) for tag in TAGS] == [1, 1, 1, 1]


@given(PIECES, PIECES)
@settings(max_examples=300, deadline=None)
def test_tags_around_any_content_without_tags_score_1(thought: str, answer: str) -> None:
    text = f"<think>{thought}</think>\n<answer>{answer}</answer>"
    assert format_reward(text) == float(not any(tag in thought + "|" + answer for tag in TAGS))


@pytest.mark.parametrize("piece", ["<think>", "<think></think>", "<", "</think><answer>", " ", "\n", "\0", "<think>a "])
def test_a_megabyte_of_any_text_is_scored_within_a_second(piece: str) -> None:
    text = piece * (10**6 // len(piece))
    started = time.perf_counter()
    assert format_reward(text) == 0.0
    assert format_reward("<think>a</think>" + text + "<answer>3</answer>") == float(not text.strip())
    assert time.perf_counter() - started < 1

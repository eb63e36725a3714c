"""The answer inside <answer>…</answer>."""

from __future__ import annotations

import pytest

from othink_ray.rewards.parse import answer_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>3</answer>", "3"),
        ("<think>x</think><answer> 3 </answer>", " 3 "),
        ("<answer></answer>", ""),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>1</answer> and <answer>2", "1"),
        ("<answer>1 <answer>2</answer></answer>", "2"),
        ("<answer>1</answer></answer>", "1"),
        ("</answer><answer>", None),
        ("<answer>3", None),
        ("3</answer>", None),
        ("<Answer>3</Answer>", None),
        ("< answer>3</answer>", None),
        ("", None),
    ],
)
def test_the_last_complete_answer_counts(text: str, expected: str | None) -> None:
    assert answer_text(text) == expected

"""The rule-based accuracy reward: verdicts, tag handling, robustness and speed on any text."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import othink_ray.rewards
from othink_ray.rewards import accuracy

ANY_TEXT = st.text(st.characters(categories=None)) | st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "3", "/", "e", ".", ",", "\0", "\ud800", " ", "°"])
).map("".join)
# Fragments of answers. Any combination must state one number or none.
PHRASES = st.lists(
    st.sampled_from(
        "1 2 3 12 0.5 1/2 -1 three twenty one hundred half quarters ninths million and or not no is are = == ( ) [ ] , "
        "; : . ? ! ~ + - * / ^ $ ° ' \" ** x ∠A B \\sqrt{ } \\boxed{ \\pi cm m^2 of the in total left cubes red there "
        "It The answer exactly about less than at least per each yes".split()
    ),
    max_size=9,
).map(" ".join)

STATED = [  # text inside <answer>, true answer, verdict
    ("3", "3", 1),
    (" 3 ", "3", 1),
    ("\n3\n", "3", 1),
    ("3.0", "3", 1),
    ("3.", "3", 1),
    ("3..", "3", 0),
    ("+3", "3", 1),
    ("-3", "3", 0),
    ("-3", "-3", 1),
    ("\u22123", "-3", 1),
    ("- 3", "-3", 1),
    ("--3", "-3", 0),
    ("-0", "0", 1),
    ("03", "3", 1),
    ("3", "<answer> 3 </answer>", 1),
    ("4", "<answer> 3 </answer>", 0),
    ("3", "three", 1),
    ("three", "3", 1),
    ("Three", "3", 1),
    ("-three", "3", 0),
    ("-three", "-3", 0),
    ("+three", "3", 0),
    ("ZERO", "0", 1),
    ("twenty", "20", 1),
    ("twenty-one", "21", 1),
    ("twenty one", "20", 0),
    ("three items", "3", 1),
    ("3 items", "3", 1),
    ("3 items.", "3", 1),
    ("3 red items", "3", 1),
    ("3items", "3", 1),
    ("3 or 4", "3", 0),
    ("3 or 4", "4", 0),
    ("3, 4", "3", 0),
    ("3 4", "3", 0),
    ("3 or", "3", 0),
    ("about 3", "3", 0),
    ("The answer is 3", "3", 1),
    ("x = 3", "3", 1),
    ("3!", "3", 0),
    ("(3)", "3", 1),
    ("70", "70°", 1),
    ("70°", "70", 1),
    ("70.0", "70°", 1),
    ("70 °", "70", 1),
    ("70 degrees", "70°", 1),
    ("71°", "70°", 0),
    ("5cm", "5", 1),
    ("5 m", "5", 1),
    ("50%", "50", 1),
    ("50 percent", "50%", 1),
    ("50%", "0.5", 1),
    ("3x", "3", 0),
    ("2pi", "2", 0),
    ("2 pi", "2", 0),
    ("3 dozen", "3", 0),
    ("3 hundred", "3", 0),
    ("one half", "1", 0),
    ("3 squared", "3", 0),
    ("3rd", "3", 0),
    ("1,234", "1234", 1),
    ("1234", "1,234", 1),
    ("12,345,678.5", "12345678.5", 1),
    ("1,23", "123", 0),
    ("1234,567", "1234567", 0),
    ("0,123", "123", 0),
    ("3,0", "3", 0),
    ("3/4", "0.75", 1),
    ("3 / 4", "3/4", 1),
    ("6/8", "3/4", 1),
    ("-3/4", "-0.75", 1),
    ("6/2", "3", 1),
    ("3/0", "3", 0),
    ("0/0", "0", 0),
    ("1/2/3", "1/6", 1),
    (".5", "0.5", 1),
    ("0.333", "1/3", 0),
    ("2.9999999999999999999", "3", 0),
    ("3e2", "300", 1),
    ("3E+2", "300", 1),
    ("30e-1", "3", 1),
    ("3e", "3", 0),
    ("1e999999999", "3", 0),
    ("0x3", "3", 0),
    ("0b11", "3", 0),
    ("1_000", "1000", 0),
    ("nan", "3", 0),
    ("NaN", "0", 0),
    ("inf", "3", 0),
    ("-infinity", "3", 0),
    ("None", "0", 0),
    ("", "3", 0),
    (" ", "3", 0),
    (".", "0", 0),
    ("3\0", "3", 0),
    ("\u0663", "3", 0),
    ("\uff13", "3", 1),
    ("3\u00b2", "3", 0),
    ("\u2462", "3", 0),
    ("3\u00a0items", "3", 1),
    ("\ud8003", "3", 0),
    ("B", "B", 1),
    (" B ", "B", 1),
    ("b", "B", 1),
    ("C", "B", 0),
    (r"2\sqrt{3}", r"2\sqrt{3}", 1),
    (r"2\sqrt{5}", r"2\sqrt{3}", 0),
    ("2", r"2\sqrt{3}", 0),
    ("", "", 0),
    ("", "<answer></answer>", 0),
]


@pytest.mark.parametrize(("stated", "answer", "verdict"), STATED)
def test_verdicts_on_stated_answers(stated: str, answer: str, verdict: int) -> None:
    assert accuracy(f"<think> hm </think><answer>{stated}</answer>", answer) == verdict


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        ("<answer>3</answer>", "3", 1),
        ("<think> 3 </think>", "3", 0),
        ("3", "3", 0),
        ("", "3", 0),
        ("<answer>3", "3", 0),
        ("3</answer>", "3", 0),
        ("<answer>4</answer><answer>3</answer>", "3", 1),
        ("<answer>3</answer><answer>4</answer>", "3", 0),
        ("<answer>1 2 3 4 5 6</answer>", "3", 0),
        ("<answer>1<answer>3</answer></answer>", "3", 1),
        ("<think><answer>4</answer> no</think><answer>3</answer>", "3", 1),
        ("<ANSWER>3</ANSWER>", "3", 0),
    ],
)
def test_only_the_last_answer_in_its_tags_is_graded(text: str, answer: str, verdict: int) -> None:
    assert accuracy(text, answer) == verdict


def test_the_package_exports_functions_not_modules() -> None:
    assert othink_ray.rewards.accuracy("<answer>3</answer>", "3") == 1.0
    assert othink_ray.rewards.format_reward("3") == 0.0


@given(ANY_TEXT | PHRASES, ANY_TEXT | PHRASES)
@settings(max_examples=500, deadline=None)
def test_any_text_gets_a_verdict(text: str, answer: str) -> None:
    assert accuracy(text, answer) in (0.0, 1.0)
    assert accuracy(f"<answer>{text}</answer>", answer) in (0.0, 1.0)


@given(PHRASES)
@example("3 is one")
@settings(max_examples=400, deadline=None)
def test_no_answer_is_right_for_two_numbers(stated: str) -> None:
    """Otherwise an answer could earn a reward by stating several numbers."""
    numbers = ["0", "1", "2", "3", "12", "20", "21", "100", "1/2", "1/9", "-1", "2000000"]
    assert sum(accuracy(f"<answer>{stated}</answer>", number) for number in numbers) <= 1


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_every_nonempty_truth_matches_itself(answer: str) -> None:
    if not any(tag in answer for tag in ("<answer>", "</answer>")):
        assert accuracy(f"<answer>{answer}</answer>", answer) == float(bool(answer.split()))


@pytest.mark.parametrize(
    "piece", ["<answer>", "</answer>", "<answer>3", "<answer>3</answer>", "3", "3 ", "\0", " ", "1,"]
)
def test_a_megabyte_of_any_text_is_graded_within_a_second(piece: str) -> None:
    text = piece * (10**6 // len(piece))
    started = time.perf_counter()
    verdicts = {accuracy(text, "3"), accuracy(f"<answer>{text}</answer>", "B"), accuracy(f"<answer>{text}", text)}
    assert time.perf_counter() - started < 1
    assert verdicts <= {0.0, 1.0}

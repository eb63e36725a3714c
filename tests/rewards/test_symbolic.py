"""Hostile answers against the real grading process: each is over in its time and counted, and nothing stays behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from othink_ray.rewards import Grader, accuracy, format_reward
from othink_ray.rewards.sandbox import GradingFailed, SymbolicProcess
from tests.rewards.conftest import REWARD, living

CPU_S = 0.5
CLOCK_S = 10 * CPU_S + 5  # on a crowded machine half a second of computing may take this long


def nested(depth: int, inner: str) -> str:
    for level in range(depth):
        inner = f"\\sqrt{{{level}+{inner}}}"
    return inner


BOMBS = [  # too much computing for the process, whatever the machine
    ("9^{9^{9^{9}}}", "5"),
    ("99999999!", "5"),
    ("\\prod_{n=1}^{99999999} n", "x+1"),
    ("(x+y+z)^{99}", "(x+y)^2"),
]
HOSTILE = [  # inside <answer>
    "while True: pass",
    "9**9**9**9",
    "__import__('os').abort()",
    nested(20, "x"),
    nested(5000, "x"),
    nested(12, "\\sqrt[3]{2}"),
    "1" * 10**7,
    "x+" * (5 * 10**6),
    "\0" * 100,
    "3\0",
    "\0x+1",
    "\ud800x+1",
    "{" * 10**5,
    "}" * 10**5,
    "(" * 250,
    "{" * 120 + "}" * 120,
    "\\frac{" * 40,
    "\\text{" * 40 + "}" * 40,
    "$" * 250,
    "**" * 120,
    "a" * 255 + "!",
    "1," * 127,
    " " * 10**6 + "x+1 or",
    "so " * 80 + "x",
    "the answer is " * 18 + "x",
    "angle " * 40 + "=1",
    "\\left(" * 40,
    "x_" * 120,
    "x^{" * 60 + "}" * 60,
    "!" * 200 + "x",
    "1\n[2, 3]\n",
    "x\n\"]\n[",
    "<answer>" * 10**5,
]  # fmt: skip
SCRIPTS = (  # "three" and the digit 3, in the digits of their own where there are some
    "٣ ثلاثة|۳ سه|३ तीन|৩ তিন|੩ ਤਿੰਨ|૩ ત્રણ|୩ ତିନି|௩ மூன்று|౩ మూడు|೩ ಮೂರು|൩ മൂന്ന്|๓ สาม|໓ ສາມ|༣ གསུམ|၃ သုံး|៣ បី|"
    "᠓ ᠭᠤᠷᠪᠠ|三|さん|셋|שלוש|სამი|երեք|τρία|три|ሦስት|ᏦᎢ|සූන"
).split("|")


@pytest.fixture(scope="module")
def hurried() -> Iterator[Grader]:
    with Grader(replace(REWARD, answer_cpu_s=CPU_S)) as grader:
        assert grader.accuracy("<answer>x+1</answer>", "1+x") == 1.0  # it runs
        yield grader


@pytest.mark.parametrize("stated", HOSTILE, ids=lambda text: repr(text[:16]))
@pytest.mark.parametrize("truth", ["3", "x+1"])
def test_a_hostile_answer_is_wrong_in_its_time_and_counted(stated: str, truth: str, hurried: Grader) -> None:
    before, started = hurried.counts.copy(), time.perf_counter()
    text = f"<think></think><answer>{stated}</answer>"
    assert hurried.accuracy(text, truth) == 0.0
    assert time.perf_counter() - started < CLOCK_S
    assert (hurried.counts - before).total() == 1
    assert accuracy(text, truth) == 0.0
    assert format_reward(text) in (0.0, 1.0)


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "<think>", "3 ", "\0", "\\sqrt{"])
@pytest.mark.parametrize("policy", ["strict", "whole_text", "last_number"])
def test_ten_megabytes_without_an_answer_cost_no_time(piece: str, policy: str) -> None:
    started = time.perf_counter()
    with Grader(replace(REWARD, without_tag=policy)) as grader:
        grader.accuracy(piece * (10**7 // len(piece)), "4")
        assert grader.counts.total() == 1
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("word", SCRIPTS)
def test_every_script_gets_a_verdict_from_the_rules(word: str, hurried: Grader) -> None:
    before = hurried.counts.copy()
    assert hurried.accuracy(f"<answer>{word}</answer>", "3") == 0.0
    assert hurried.accuracy(f"<answer> {word} </answer>", word) == 1.0
    assert hurried.counts - before == {"rules": 2}


def test_there_are_twenty_scripts_that_are_not_latin() -> None:
    assert len(SCRIPTS) >= 20
    assert not any(character.isascii() and character.isalnum() for word in SCRIPTS for character in word)


def test_each_bomb_is_killed_in_its_time_and_counted_and_the_next_answer_is_graded(hurried: Grader) -> None:
    for stated, truth in BOMBS:
        before, started = hurried.counts.copy(), time.perf_counter()
        assert hurried.accuracy(f"<answer>{stated}</answer>", truth) == 0.0
        assert time.perf_counter() - started < CLOCK_S
        assert hurried.counts - before == {"timeout": 1}
    assert hurried.accuracy("<answer>y+1</answer>", "1+y") == 1.0


def test_a_bomb_that_was_met_before_costs_nothing_more(hurried: Grader) -> None:
    stated, truth = BOMBS[0]
    hurried.accuracy(f"<answer>{stated}</answer>", truth)
    before, started = hurried.counts.copy(), time.perf_counter()
    assert hurried.accuracy(f"<answer>{stated}</answer>", truth) == 0.0
    assert time.perf_counter() - started < 0.1
    assert hurried.counts - before == {"timeout": 1}


def test_an_answer_that_needs_too_much_memory_is_not_right_and_the_next_is_graded() -> None:
    with SymbolicProcess(answer_cpu_s=20, memory_mb=128) as process:
        assert process.equal("x+1", "(x+2^{2^{31}})x") in ("wrong", "crash")
        assert process.equal("x+1", "1+x") == "right"
        assert process.pid is not None
        assert resource.prlimit(process.pid, resource.RLIMIT_AS) == (128 * 2**20,) * 2


def test_an_answer_whose_process_is_killed_from_outside_is_a_crash_and_the_next_is_graded() -> None:
    with SymbolicProcess(answer_cpu_s=20, memory_mb=1024) as process:
        assert process.equal("x+1", "1+x") == "right"
        pid = process.pid
        assert pid is not None

        def kill_the_child() -> None:
            while not (children := [other for other in living(pid) if other != pid]):
                time.sleep(0.01)
            os.kill(children[0], signal.SIGKILL)

        with ThreadPoolExecutor() as pool:
            killed = pool.submit(kill_the_child)
            assert process.equal("5", "9^{9^{9^{9}}}") == "crash"
            killed.result()
        assert process.equal("x+1", "1+x") == "right"
        assert process.pid == pid


def test_nothing_runs_before_it_is_needed_or_after_it_is_closed() -> None:
    grader = Grader(REWARD)
    process = grader.symbolic
    grader.accuracy("<answer>3</answer>", "3")
    assert process.pid is None
    grader.accuracy("<answer>x+1</answer>", "1+x")
    pid = process.pid
    assert pid is not None and living(pid) == [pid]
    grader.close()
    assert living(pid) == []


def test_a_process_that_stands_still_is_killed_by_the_clock() -> None:
    with SymbolicProcess(answer_cpu_s=0.05, memory_mb=1024) as process:
        process.equal("x+1", "1+x")
        pid = process.pid
        assert pid is not None
        os.killpg(pid, signal.SIGSTOP)
        started = time.perf_counter()
        assert process.equal("x+1", "2+x") == "timeout"
        assert time.perf_counter() - started < 5
        assert living(pid) == []


def test_a_process_that_was_ended_from_outside_is_replaced() -> None:
    with SymbolicProcess(answer_cpu_s=20, memory_mb=1024) as process:
        process.equal("x+1", "1+x")
        pid = process.pid
        assert pid is not None
        os.killpg(pid, signal.SIGKILL)
        while living(pid):
            time.sleep(0.01)
        assert process.equal("x+1", "1+x") == "right"
        assert process.pid != pid


def test_a_bomb_outlives_its_killed_owner_by_no_more_than_its_time() -> None:
    program = (
        "from othink_ray.rewards.sandbox import SymbolicProcess\n"
        "process = SymbolicProcess(answer_cpu_s=1, memory_mb=1024)\n"
        "process.equal('x+1', '1+x')\n"
        "print(process.pid, flush=True)\n"
        "process.equal('5', '9^{9^{9^{9}}}')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        session = int(owner.stdout.readline())
        owner.kill()
    deadline = time.monotonic() + CLOCK_S + 10
    while living(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert living(session) == []


def test_an_installation_without_math_verify_is_said_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('sympy is gone')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        SymbolicProcess(answer_cpu_s=1, memory_mb=1024) as process,
        pytest.raises(GradingFailed, match=r"did not start: ImportError: sympy is gone\. Is math-verify installed"),
    ):
        process.equal("x+1", "1+x")

"""Hostile answers against the real grading process: each ends within its limit, is counted, and leaves no process."""

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
from othink_ray.rewards.base import GradingFailed
from othink_ray.rewards.grader import SymbolicProcess
from tests.rewards.conftest import REWARD, live_processes

CPU_S = 0.5
CLOCK_S = 10 * CPU_S + 5  # wall-clock limit: on a busy machine half a second of CPU time may take this long


def nested(depth: int, inner: str) -> str:
    for level in range(depth):
        inner = f"\\sqrt{{{level}+{inner}}}"
    return inner


BOMBS = [  # exceed the CPU limit on any machine
    ("9^{9^{9^{9}}}", "5"),
    ("99999999!", "5"),
    ("\\prod_{n=1}^{99999999} n", "x+1"),
    ("(x+y+z)^{99}", "(x+y)^2"),
]
HOSTILE = [  # text inside <answer>
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
SCRIPTS = (  # "three" and, where the script has digits, the digit 3
    "٣ ثلاثة|۳ سه|३ तीन|৩ তিন|੩ ਤਿੰਨ|૩ ત્રણ|୩ ତିନି|௩ மூன்று|౩ మూడు|೩ ಮೂರು|൩ മൂന്ന്|๓ สาม|໓ ສາມ|༣ གསུམ|၃ သုံး|៣ បី|"
    "᠓ ᠭᠤᠷᠪᠠ|三|さん|셋|שלוש|სამი|երեք|τρία|три|ሦስት|ᏦᎢ|සූන"
).split("|")


@pytest.fixture(scope="module")
def quick_grader() -> Iterator[Grader]:
    with Grader(replace(REWARD, answer_cpu_s=CPU_S)) as grader:
        assert grader.accuracy("<answer>x+1</answer>", "1+x") == 1.0  # starts the process
        yield grader


@pytest.mark.parametrize("stated", HOSTILE, ids=lambda text: repr(text[:16]))
@pytest.mark.parametrize("truth", ["3", "x+1"])
def test_a_hostile_answer_is_wrong_within_its_limit(stated: str, truth: str, quick_grader: Grader) -> None:
    before, started = quick_grader.counts.copy(), time.perf_counter()
    text = f"<think></think><answer>{stated}</answer>"
    assert quick_grader.accuracy(text, truth) == 0.0
    assert time.perf_counter() - started < CLOCK_S
    assert (quick_grader.counts - before).total() == 1
    assert accuracy(text, truth) == 0.0
    assert format_reward(text) in (0.0, 1.0)


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "<think>", "3 ", "\0", "\\sqrt{"])
@pytest.mark.parametrize("policy", ["strict", "whole_text", "last_number"])
def test_ten_megabytes_without_an_answer_are_graded_quickly(piece: str, policy: str) -> None:
    started = time.perf_counter()
    with Grader(replace(REWARD, without_tag=policy)) as grader:
        grader.accuracy(piece * (10**7 // len(piece)), "4")
        assert grader.counts.total() == 1
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("word", SCRIPTS)
def test_every_script_is_decided_by_the_rules(word: str, quick_grader: Grader) -> None:
    before = quick_grader.counts.copy()
    assert quick_grader.accuracy(f"<answer>{word}</answer>", "3") == 0.0
    assert quick_grader.accuracy(f"<answer> {word} </answer>", word) == 1.0
    assert quick_grader.counts - before == {"rules": 2}


def test_at_least_twenty_non_latin_scripts_are_covered() -> None:
    assert len(SCRIPTS) >= 20
    assert not any(character.isascii() and character.isalnum() for word in SCRIPTS for character in word)


def test_bombs_time_out_and_the_next_answer_is_graded(quick_grader: Grader) -> None:
    for stated, truth in BOMBS:
        before, started = quick_grader.counts.copy(), time.perf_counter()
        assert quick_grader.accuracy(f"<answer>{stated}</answer>", truth) == 0.0
        assert time.perf_counter() - started < CLOCK_S
        assert quick_grader.counts - before == {"timeout": 1}
    assert quick_grader.accuracy("<answer>y+1</answer>", "1+y") == 1.0


def test_a_repeated_bomb_is_answered_from_the_cache(quick_grader: Grader) -> None:
    stated, truth = BOMBS[0]
    quick_grader.accuracy(f"<answer>{stated}</answer>", truth)
    before, started = quick_grader.counts.copy(), time.perf_counter()
    assert quick_grader.accuracy(f"<answer>{stated}</answer>", truth) == 0.0
    assert time.perf_counter() - started < 0.1
    assert quick_grader.counts - before == {"timeout": 1}


def test_an_answer_over_the_memory_limit_is_not_right() -> None:
    with SymbolicProcess(answer_cpu_s=20, memory_mb=128) as process:
        assert process.equal("x+1", "(x+2^{2^{31}})x") in ("wrong", "crash")
        assert process.equal("x+1", "1+x") == "right"
        assert process.pid is not None
        assert resource.prlimit(process.pid, resource.RLIMIT_AS) == (128 * 2**20,) * 2


def test_a_child_killed_from_outside_is_a_crash() -> None:
    with SymbolicProcess(answer_cpu_s=20, memory_mb=1024) as process:
        assert process.equal("x+1", "1+x") == "right"
        pid = process.pid
        assert pid is not None

        def kill_the_child() -> None:
            while not (children := [other for other in live_processes(pid) if other != pid]):
                time.sleep(0.01)
            os.kill(children[0], signal.SIGKILL)

        with ThreadPoolExecutor() as pool:
            killed = pool.submit(kill_the_child)
            assert process.equal("5", "9^{9^{9^{9}}}") == "crash"
            killed.result()
        assert process.equal("x+1", "1+x") == "right"
        assert process.pid == pid


def test_the_process_runs_only_from_first_use_to_close() -> None:
    grader = Grader(REWARD)
    process = grader.symbolic
    grader.accuracy("<answer>3</answer>", "3")
    assert process.pid is None
    grader.accuracy("<answer>x+1</answer>", "1+x")
    pid = process.pid
    assert pid is not None and live_processes(pid) == [pid]
    grader.close()
    assert live_processes(pid) == []


def test_a_stopped_process_is_killed_at_the_wall_clock_limit() -> None:
    with SymbolicProcess(answer_cpu_s=0.05, memory_mb=1024) as process:
        process.equal("x+1", "1+x")
        pid = process.pid
        assert pid is not None
        os.killpg(pid, signal.SIGSTOP)
        started = time.perf_counter()
        assert process.equal("x+1", "2+x") == "timeout"
        assert time.perf_counter() - started < 5
        assert live_processes(pid) == []


def test_a_process_killed_from_outside_is_restarted() -> None:
    with SymbolicProcess(answer_cpu_s=20, memory_mb=1024) as process:
        process.equal("x+1", "1+x")
        pid = process.pid
        assert pid is not None
        os.killpg(pid, signal.SIGKILL)
        while live_processes(pid):
            time.sleep(0.01)
        assert process.equal("x+1", "1+x") == "right"
        assert process.pid != pid


def test_a_bomb_outlives_its_killed_owner_by_its_limit_at_most() -> None:
    program = (
        "from othink_ray.rewards.grader import SymbolicProcess\n"
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
    while live_processes(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert live_processes(session) == []


def test_a_missing_math_verify_is_reported_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('sympy is gone')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        SymbolicProcess(answer_cpu_s=1, memory_mb=1024) as process,
        pytest.raises(GradingFailed, match=r"did not start: ImportError: sympy is gone\. Is math-verify installed"),
    ):
        process.equal("x+1", "1+x")

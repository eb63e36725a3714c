"""The accuracy reward R_acc of Eq. 1: rules decide most answers, math-verify in a separate process the rest.

The process can be killed: some expressions take forever to evaluate.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

from othink_ray.config.schema import RewardConfig
from othink_ray.rewards.base import GradingFailed
from othink_ray.rewards.numbers import closed_form, parse_quantity, same_quantity
from othink_ray.rewards.parse import answer_text, is_expression, may_be_number, plain, stated_text
from othink_ray.rewards.text import parse_choice, same_words, split_items, stated_in
from othink_ray.types import Completion, Prompt

MAX_CHARS = 256  # longer answers are compared as plain strings
_CACHE_SIZE = 1024  # symbolic verdicts kept: the answers of a group often repeat, and so do prompts
_START_TIMEOUT_S = 120  # importing sympy takes about a second, and much longer on an overloaded machine
_WALL_PER_CPU = 10  # wall-clock limit as a multiple of an answer's CPU limit; past it the whole process is killed

SymbolicVerdict: TypeAlias = Literal["right", "wrong", "timeout", "crash"]
_VERDICTS: dict[bytes, SymbolicVerdict] = {b"1": "right", b"0": "wrong", b"t": "timeout", b"c": "crash"}


def accuracy(text: str, answer: str) -> float:
    """Return 1.0 if the rules prove that the completion's answer equals the true one, else 0.0.

    Only the text inside `<answer>…</answer>` is graded. The true answer is plain (3) or tagged.
    Answers that the rules cannot decide (`compare` returns None: variables, functions, sets) count as wrong here;
    `Grader` passes them to math-verify in a process that can be killed.
    """
    stated = stated_text(text)
    return float(stated is not None and compare(stated, true_text(answer)) is True)


def true_text(answer: str) -> str:
    """Return the true answer without its <answer> tag, if it has one."""
    tagged = answer_text(answer)
    return answer if tagged is None else tagged


def compare(stated: str, truth: str) -> bool | None:
    """Return whether two answers agree, or None if the rules cannot decide.

    Numbers are compared by exact value (see `parse_quantity`); choices by letter, and also by value if both have one;
    words by `same_words`; multiple answers (45° or 135°) in any order. Equal texts agree. A sentence is compared by the
    answer it states about its subject.
    """
    if len(stated) > MAX_CHARS or len(truth) > MAX_CHARS:
        stated, truth = stated.strip(), truth.strip()
        if len(stated) > MAX_CHARS or len(truth) > MAX_CHARS:
            return stated == truth
    return _compare(stated, truth)


@lru_cache(maxsize=4096)
def _compare(stated: str, truth: str) -> bool | None:
    stated_words, true_words = stated.split(), truth.split()
    if not stated_words or not true_words:
        return False
    if stated_words == true_words:
        return True
    both = (*stated_words, *true_words)
    if len(stated_words) == len(true_words) == 1 and all(word.isascii() and word.isdigit() for word in both):
        return int(stated_words[0]) == int(true_words[0])  # fast path for counting: 10x faster than the rules below
    plain_stated, plain_truth = plain(stated), plain(truth)
    verdict = _compare_plain(plain_stated, plain_truth)
    if verdict is False and (inner := stated_in(plain_stated)) is not None:
        return _compare_plain(plain(inner), plain_truth) is True
    return verdict


def _compare_plain(stated: str, truth: str) -> bool | None:
    choice, true_choice = parse_choice(stated), parse_choice(truth)
    if true_choice is not None and true_choice.letter.isupper():
        if choice is None:
            return bool(true_choice.rest) and _compare_plain(stated, true_choice.rest)
        if choice.letter.upper() != true_choice.letter:
            return False
        return not (choice.rest and true_choice.rest) or _compare_plain(choice.rest, true_choice.rest)
    if choice is not None and choice.rest:
        stated = choice.rest
    value, true_value = parse_quantity(stated), parse_quantity(truth)
    if value is not None and true_value is not None:
        return same_quantity(value, true_value)
    if true_value is not None:
        return None if is_expression(stated) and may_be_number(stated) else False
    if is_expression(truth):
        return None if is_expression(stated) or closed_form(stated) is not None else False
    if len(items := split_items(truth)) > 1:
        return _same_items(split_items(stated), items)
    return same_words(stated, truth)


def _same_items(stated: list[str], truth: list[str]) -> bool:
    """Return whether each of multiple answers (45° or 135°) is stated exactly once, in any order, and nothing else."""
    unmatched = list(truth)
    for item in stated:
        match = next((true_item for true_item in unmatched if _compare_plain(item, true_item) is True), None)
        if match is None:
            return False
        unmatched.remove(match)
    return not unmatched


class Grader:
    """Accuracy reward by rules, then math-verify; `counts` holds the number of answers by how they were graded.

    An answer that exceeds the time or memory limit of math-verify is wrong, not masked: it was not proven right, and
    the policy must not learn that an expression too costly to evaluate avoids a reward of 0.
    """

    def __init__(self, reward: RewardConfig) -> None:
        self.without_tag = reward.without_tag
        self.counts: Counter[str] = Counter()
        self.symbolic = SymbolicProcess(answer_cpu_s=reward.answer_cpu_s, memory_mb=reward.memory_mb)
        self._cache: OrderedDict[tuple[str, str], SymbolicVerdict] = OrderedDict()

    def __call__(self, prompt: Prompt, completion: Completion) -> float:
        return self.accuracy(completion.text, prompt.answer)

    def accuracy(self, text: str, answer: str) -> float:
        """Return 1.0 or 0.0; never raise on the text."""
        stated = stated_text(text, self.without_tag)
        if stated is None:
            self.counts["untagged"] += 1
            return 0.0
        truth = true_text(answer)
        verdict = compare(stated, truth)
        if verdict is not None:
            self.counts["rules"] += 1
            return float(verdict)
        symbolic = self._compare_symbolically(plain(stated.strip()), plain(truth.strip()))
        self.counts["symbolic" if symbolic in ("right", "wrong") else symbolic] += 1
        return float(symbolic == "right")

    def _compare_symbolically(self, stated: str, truth: str) -> SymbolicVerdict:
        key = (stated, truth)
        if key not in self._cache:
            self._cache[key] = self.symbolic.equal(truth, stated)
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return self._cache[key]

    def close(self) -> None:
        self.symbolic.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SymbolicProcess:
    """math-verify behind a pipe, started on the first call; not thread-safe."""

    worker = Path(__file__).with_name("sandbox_worker.py")  # the script that the process runs

    def __init__(self, *, answer_cpu_s: float, memory_mb: int) -> None:
        self.answer_cpu_s, self.memory_mb = answer_cpu_s, memory_mb
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the grading process, or None while it is not running."""
        return self._process.pid if self._process else None

    def equal(self, truth: str, stated: str) -> SymbolicVerdict:
        """Return the verdict on one answer after at most `answer_cpu_s` of CPU time, start-up excluded.

        `crash` means that the process ended for another reason than the time limit, e.g. memory above its limit. If
        math-verify catches the MemoryError itself, the verdict is `wrong`.
        """
        line = json.dumps([truth, stated]).encode() + b"\n"
        for _ in range(2):  # retry once: a process that died while idle is restarted
            process = self._ensure_started()
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                self.close()
                continue
            reply = self._read(process, _WALL_PER_CPU * self.answer_cpu_s)
            if reply in _VERDICTS:
                return _VERDICTS[reply]
            self.close()
            return "timeout" if reply is None else "crash"
        raise GradingFailed(
            "the grading process exited twice right after it started. If memory ran out, raise algo.reward.memory_mb "
            f"(now {self.memory_mb})."
        )

    def close(self) -> None:
        """Kill the process and its child."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads its own session, so this reaches the child too
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # unflushed input of the killed process
                pipe.close()
        process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ensure_started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        with tempfile.TemporaryFile() as stderr:
            # -P keeps this folder off sys.path: its modules (numbers.py) would shadow the standard library.
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", str(self.worker), str(self.answer_cpu_s), str(self.memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # one process group to kill; Ctrl-C reaches only the main process
            )
            if self._read(process, _START_TIMEOUT_S) != b"+":
                self.close()
                stderr.seek(0)
                timed_out = f"not ready within {_START_TIMEOUT_S} s"
                last = stderr.read().decode(errors="replace").strip().splitlines()[-1:] or [timed_out]
                raise GradingFailed(
                    f"the grading process did not start: {last[0]}. Is math-verify installed? If memory ran out, "
                    f"raise algo.reward.memory_mb (now {self.memory_mb})."
                )
        return process

    @staticmethod
    def _read(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        """Read one byte; return b"" if the process ended and None on timeout."""
        assert process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                return os.read(process.stdout.fileno(), 1)
        return None

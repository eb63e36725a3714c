"""Pytest plugin: which tests `--slow` selects, and in what order their files start.

The mark `slow` is for tests that `make test` leaves to `make test-all`. CI runs them in parts of about equal length,
another one at each commit: `--slow=commit/2` is `--slow=1/2` or `--slow=2/2`, which together are all slow tests.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("durations.json")
UNKNOWN_S = 5.0  # assumed for a file that is not in the record
FAST, SLOW = "fast", "slow"
# Files that run in one process, because they share costly fixtures: whole runs, Ray with a WorkerGroup, a vLLM engine.
TOGETHER = {
    "tests/e2e/": "runs",
    "tests/runtime/": "workers",
    "tests/docs/": "workers",
    "tests/driver/test_environment.py": "workers",
    "tests/contracts/": "engine",
    "tests/weights/test_audit.py": "engine",
    "tests/engines/test_vllm_kernels.py": "engine",
    "tests/data/test_bad_inputs.py": "engine",
}

Durations = Mapping[str, Mapping[str, float]]  # file -> kind (fast, slow) -> seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Parsed value of `--slow`: whether fast tests run, and which part of the slow ones."""

    fast: bool
    part: int = 1
    parts: int = 1  # 0: no slow test

    def __str__(self) -> str:
        if not self.fast:
            return f"{self.part}/{self.parts}"
        return "all" if self.parts else "none"

    def slow_files(self, files: Iterable[str], durations: Durations) -> set[str]:
        """Return the files whose slow tests run: each file, the longest first, joins the part with the least so far."""
        totals = [0.0] * self.parts
        chosen = set()
        for file in sorted(files, key=lambda name: (-seconds(durations, name, [SLOW]), name)) if self.parts else ():
            shortest = totals.index(min(totals))
            totals[shortest] += seconds(durations, file, [SLOW])
            if shortest == self.part - 1:
                chosen.add(file)
        return chosen


def seconds(durations: Durations, file: str, kinds: Sequence[str]) -> float:
    known = durations.get(file, dict.fromkeys(kinds, UNKNOWN_S))
    return sum(known.get(kind, 0.0) for kind in kinds)


def selection_of(text: str) -> Selection:
    """Parse a value of `--slow`: all, none, K/N or commit/N."""
    if text in ("all", "none"):
        return Selection(fast=True, parts=int(text == "all"))
    found = re.fullmatch(r"(\d+|commit)/([1-9]\d*)", text)
    if not found:
        raise pytest.UsageError(f"--slow={text} must be all, none, K/N or commit/N, such as 1/2")
    parts = int(found[2])
    part = commit_number(ROOT) % parts + 1 if found[1] == "commit" else int(found[1])
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--slow={text} must name a part from 1 to {parts}")
    return Selection(fast=False, part=part, parts=parts)


def commit_number(checkout: Path) -> int:
    """Return how many commits lead to this one, or its hash as a number in a clone without history."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise pytest.UsageError(f"--slow=commit/N needs a git checkout; name a part, such as 1/2: {done.stderr}")
        return done.stdout.strip()

    if git("rev-parse", "--is-shallow-repository") == "true":
        return int(git("rev-parse", "HEAD"), 16)
    return int(git("rev-list", "--count", "HEAD"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        default="all",
        metavar="all|none|K/N|commit/N",
        help="all tests, no slow ones, or only part K of N of the slow ones (commit: K follows from the commit)",
    )
    parser.addoption("--record-durations", action="store_true", help=f"write the seconds of this run to {RECORD.name}")


def pytest_configure(config: pytest.Config) -> None:
    config.option.slow = str(selection_of(config.option.slow))  # xdist passes the resolved value to its processes


def pytest_report_header(config: pytest.Config) -> str | None:
    part = str(config.option.slow)
    return f'slow tests, part {part}; to run it again: make test-all ARGS="--slow={part}"' if "/" in part else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect by `--slow`, and put the rest in order."""
    selection, durations = selection_of(config.option.slow), recorded()
    kinds = {item.nodeid: SLOW if item.get_closest_marker(SLOW) else FAST for item in items}
    parts = selection.slow_files({file_of(name) for name, kind in kinds.items() if kind == SLOW}, durations)
    removed = [
        item
        for item in items
        if (file_of(item.nodeid) not in parts if kinds[item.nodeid] == SLOW else not selection.fast)
    ]
    if removed:
        config.hook.pytest_deselected(items=removed)
    gone = {item.nodeid for item in removed}
    run = [FAST] * selection.fast + [SLOW] * bool(selection.parts)
    items[:] = in_prompt_order([item for item in items if item.nodeid not in gone], run, durations)


def in_prompt_order(items: Sequence[pytest.Item], kinds: Sequence[str], durations: Durations) -> list[pytest.Item]:
    """Return the items with the longest units of work first, so that two processes end at about the same time."""
    totals: Counter[str] = Counter()
    for file in {file_of(item.nodeid) for item in items}:
        totals[unit_of(file)] += seconds(durations, file, kinds)

    def key(item: pytest.Item) -> tuple[float, str, float, str]:
        file = file_of(item.nodeid)
        return -totals[unit_of(file)], unit_of(file), -seconds(durations, file, kinds), file

    return sorted(items, key=key)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute units of work where `--dist loadfile` distributes files."""
    from xdist.scheduler import LoadFileScheduling

    class UnitScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(file_of(nodeid))

    return UnitScheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Repeat which part ran; on request, record the seconds of each file's fast and slow tests, fixtures included."""
    if part := pytest_report_header(config):
        terminalreporter.write_line(part)
    if not config.option.record_durations:
        return
    spent: dict[str, Counter[str]] = defaultdict(Counter)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                spent[file_of(report.nodeid)][SLOW if SLOW in report.keywords else FAST] += report.duration
    known = {file: kinds for file, kinds in recorded().items() if (ROOT / file).is_file()}
    for file, kinds in spent.items():
        known[file] = {**known.get(file, {}), **{kind: round(total, 1) for kind, total in kinds.items()}}
    lines = ",\n".join(
        f"  {json.dumps(file)}: {json.dumps(kinds, sort_keys=True)}" for file, kinds in sorted(known.items())
    )
    RECORD.write_text(f"{{\n{lines}\n}}\n")


def recorded() -> Durations:
    found: Durations = json.loads(RECORD.read_text())
    return found


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def unit_of(file: str) -> str:
    return next((unit for start, unit in TOGETHER.items() if file.startswith(start)), file)

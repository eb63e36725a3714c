"""Verdicts on a small package made by the test: how they are found, how long they hold, how they are reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.mutants.__main__ import chosen, main, report
from tests.mutants.changes import mutants
from tests.mutants.table import ROOT, TABLE, Table
from tests.mutants.trials import Trials

SOURCES = {
    "core/waits.py": "def drain(step, n):\n    while n:\n        n = step(n)\n    return n\n",
    "core/sums.py": "KEPT = dict(first=2)['first']\n\n\ndef half(n):\n    return n // KEPT\n",
    "core/signs.py": "def turned(n):\n    return -n\n",
    "engines/heavy.py": "def least(values):\n    return min(values) + values[0]\n",
}
TESTS = {
    "core/test_waits.py": "from othink_ray.core.waits import drain\n\n\n"
    "def test_drain():\n    assert drain(lambda n: n - 1, 3) == 0\n",
    "core/test_sums.py": "from othink_ray.core.sums import half\n\n\ndef test_half():\n    assert half(0) == 0\n",
    "core/test_signs.py": "from othink_ray.core.signs import turned\n\n\n"
    "def test_turned():\n    assert turned(1) == -1\n",
    "engines/test_heavy.py": "from othink_ray.engines.heavy import least\n\n\n"
    "def test_least():\n    assert least([1, 2]) == 2\n",
}
HUNG = "core/waits.py:3:9+11:delete"
UNSEEN = {  # 0 // 2 is 0 * 2, 0 and 0 // 3
    "core/sums.py:5:12+9:compute by Mult",
    "core/sums.py:5:12+9:left alone",
    "core/sums.py:1:19+1:one more",
}


def small(root: Path) -> Table:
    """Return the table of a package of three pure files and a heavy one, made with its tests if missing."""
    for folder, files in (("othink_ray", SOURCES), ("tests", TESTS)):
        for name, text in files.items():
            path = root / folder / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    (root / "tests/conftest.py").touch()
    (root / "tests/mutants").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests/mutants/fork_server.py", root / "tests/mutants")
    shutil.copy(ROOT / "pyproject.toml", root)
    explained = root / "explained.txt"
    explained.touch()
    return Table(
        root=root,
        pure={f"core/{name}.py": (f"core/test_{name}.py",) for name in ("sums", "signs", "waits")},
        heavy={"engines/heavy.py": ("engines/test_heavy.py",)},
        sample=2,
        explained=explained,
    )


@dataclass
class Result:
    """A run on the small package: its exit code, output and new lines in the file of results."""

    code: int
    screen: str
    lines: list[dict[str, Any]]

    def statuses(self, file: str) -> dict[str, tuple[str, int | None]]:
        return {one["name"]: (one["verdict"], one["status"]) for one in self.lines if one["file"] == file}


class Project:
    def __init__(self, root: Path) -> None:
        self.root, self.table, self.results = root, small(root), root / "runs" / "mutants.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> Result:
        """Run the program; return its result with only the lines that it added."""
        known = len(self.lines())
        capsys.readouterr()
        code = main(["--results", str(self.results), *arguments], self.table)
        return Result(code, capsys.readouterr().out, self.lines()[known:])


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


@pytest.mark.slow
def test_verdicts_of_a_run_over_forks_and_processes(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(project.root.parent))
    result = project.run(capsys)

    sums = result.statuses("core/sums.py")
    assert {name for name, (verdict, _) in sums.items() if verdict == "survived"} == UNSEEN
    assert sums["core/sums.py:1:8+13:drop first="] == ("killed", 2)  # the import fails
    assert sums["core/sums.py:5:12+9:right alone"] == ("killed", 1)
    assert result.statuses("core/waits.py") == {"core/waits.py:2:11+1:negate": ("killed", 1), HUNG: ("hung", None)}
    heavy = result.statuses("engines/heavy.py")
    assert len(heavy) == project.table.sample and set(heavy.values()) == {("killed", 1)}

    assert result.code == 1
    assert "    n // KEPT  ->  n * KEPT" in result.screen and "in half\n    return n // KEPT" in result.screen
    survived = sum(one["verdict"] == "survived" for one in result.lines)
    assert f"{len(result.lines) - survived} killed (1 of them hung), 0 explained, {survived} survived" in result.screen
    assert {name: project.table.source(name).read_text() for name in SOURCES} == SOURCES
    assert [path.name for path in project.root.parent.iterdir()] == ["project"]


@pytest.mark.slow
def test_waiting_for_a_busy_machine_is_not_a_hang(tmp_path: Path) -> None:
    table = small(tmp_path / "project")
    (table.root / "tests/core/test_waits.py").write_text(
        "import time\n\n\ndef test_waiting():\n    time.sleep(3)\n\n\n"
        "def test_spinning():\n    while True:\n        pass\n"
    )
    with Trials(table) as trials:
        waiting, spinning = (
            trials.status("core/waits.py", None, 2, [f"tests/core/test_waits.py::test_{what}"])
            for what in ("waiting", "spinning")
        )
    assert (waiting, spinning) == (0, None)


@pytest.mark.slow
def test_verdicts_hold_until_the_source_or_its_tests_change(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--only", "core/sums.py", "core/signs.py")
    first = project.run(capsys, *files)
    again = project.run(capsys, *files)
    assert (again.code, again.lines) == (first.code, [])
    assert f"{len(first.lines)} mutants, {len(first.lines)} of them decided before" in again.screen

    test = project.root / "tests/core/test_sums.py"
    test.write_text(test.read_text() + "    assert half(5) == 2\n")
    sharper = project.run(capsys, *files)
    assert sharper.statuses("core/sums.py").keys() == first.statuses("core/sums.py").keys()
    assert {verdict for verdict, _ in sharper.statuses("core/sums.py").values()} == {"killed"}
    assert sharper.statuses("core/signs.py") == {}

    source = project.root / "othink_ray/core/signs.py"
    source.write_text(source.read_text() + "# another line\n")
    changed = project.run(capsys, *files)
    assert changed.statuses("core/signs.py").keys() == first.statuses("core/signs.py").keys()
    assert changed.statuses("core/sums.py") == {}


@pytest.mark.slow
def test_a_run_out_of_time_is_continued_by_the_next_one(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    tests = project.root / "tests/core/test_sums.py"
    tests.write_text(tests.read_text() + "    assert half(5) == 2\n")
    late = project.run(capsys, "--only", "core/sums.py", "--budget-minutes", "0")
    assert (late.code, late.lines) == (1, [])
    assert "6 not tried" in late.screen
    on = project.run(capsys, "--only", "core/sums.py")
    assert (on.code, len(on.lines)) == (0, 6)


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_only_its_verdicts(
    way: signal.Signals, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.mutants.__main__ import main;"
        "from tests.mutants.test_mutants import small; sys.exit(main(sys.argv[2:], small(Path(sys.argv[1]))))"
    )
    files = ("--only", "core/sums.py", "core/signs.py")
    (tmp_path / "trees").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(project.root), "--results", str(project.results), "--workers", "1", *files],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "trees")},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 200
        while not project.lines() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(way)
        screen, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    before = project.lines()
    assert process.returncode == 1 and "ends with the mutants that are being tried" in screen
    assert 0 < len(before) < 7
    assert list((tmp_path / "trees").iterdir()) == []
    project.run(capsys, *files)
    after = [one["name"] for one in project.lines()]
    assert len(after) == len(set(after)) == 7


def test_tests_that_fail_without_a_mutant_stop_the_run(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (project.root / "tests/core/test_sums.py").write_text("def test_half():\n    assert 3 == 4\n")
    with pytest.raises(RuntimeError, match=r"(?s)core/sums.py fail without any mutant \(status 1\).*assert 3 == 4"):
        project.run(capsys, "--only", "core/sums.py")
    assert project.lines() == []


@pytest.mark.parametrize(("file", "limit"), [("core/waits.py", 2), ("engines/heavy.py", 10)])
def test_a_test_process_and_its_children_end_when_time_is_up(project: Project, file: str, limit: float) -> None:
    [test] = project.table.covering(file)
    (project.root / test).write_text(
        "import subprocess, time\n\n\ndef test_slow():\n    subprocess.Popen(['sleep', '200'])\n    time.sleep(200)\n"
    )
    with Trials(project.table) as trials:
        assert trials.status(file, None, limit) is None
    assert commands_with(trials.tree) == []


def commands_with(tree: Path) -> list[list[str]]:
    """Return the commands of all processes that test this tree and still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PYTHONPATH") == str(tree) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
    return found


@pytest.mark.parametrize("file", ["core/signs.py", "engines/heavy.py"])
def test_a_mutant_does_not_outlive_its_trial(project: Project, file: str) -> None:
    mutant = mutants(file, project.table.source(file).read_text())[-1]
    with Trials(project.table) as trials:
        statuses = [trials.status(file, each, 300) for each in (mutant, None, mutant)]
    assert statuses == [1, 0, 1]


def test_all_pure_mutants_and_a_seeded_sample_are_chosen(project: Project) -> None:
    table = project.table
    pure = [one.name for file in table.pure for one in mutants(file, table.source(file).read_text())]
    heavy = {one.name for one in mutants("engines/heavy.py", table.source("engines/heavy.py").read_text())}
    samples = set()
    for seed in range(10):
        names = [one.name for one in chosen(table, [], seed)]
        assert names == [one.name for one in chosen(table, [], seed)]
        assert names[: len(pure)] == pure
        assert len(names) == len(pure) + 2 and set(names[len(pure) :]) < heavy
        samples.add(frozenset(names))
    assert len(samples) > 1
    assert [one.name for one in chosen(table, ["core/waits.py"], 0)] == [pure[-2], pure[-1]]
    assert [one.name for one in chosen(table, ["core", "engines"], 0)] == [one.name for one in chosen(table, [], 0)]


def test_new_code_puts_no_other_old_mutants_into_the_sample(project: Project) -> None:
    """The next run would lack verdicts of exchanged mutants."""
    source = project.table.source("engines/heavy.py")
    for seed in range(10):
        source.write_text(SOURCES["engines/heavy.py"])
        before = {one.key for one in chosen(project.table, ["engines"], seed)}
        source.write_text("def most(values):\n    return -max(values) - 1\n\n\n" + SOURCES["engines/heavy.py"])
        assert {one.key for one in chosen(project.table, ["engines"], seed) if one.function != "most"} <= before


def test_a_name_that_is_no_file_of_the_table_is_refused(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--only", "core/klm.py", "--results", str(project.results)], project.table)
    assert refused.value.code == 2
    assert "--only core/klm.py: no such file" in capsys.readouterr().err


def test_the_report_fails_for_unexplained_or_untried_mutants(capsys: pytest.CaptureFixture[str]) -> None:
    selected = mutants("core/sums.py", "def half(n, m):\n    return n @ m\n")
    assert len(selected) == 2

    def verdicts(*found: str) -> dict[str, dict[str, Any]]:
        return {one.name: {"verdict": each, "seconds": 1.5} for one, each in zip(selected, found, strict=False)}

    assert report(selected, verdicts("killed", "hung"), {}) == 0
    assert "2 mutants: 2 killed (1 of them hung), 0 explained, 0 survived, 0 not tried; 1.5 s each" in (
        capsys.readouterr().out
    )
    assert report(selected, verdicts("killed"), {}) == 1
    assert report(selected, verdicts("killed", "survived"), {}) == 1
    assert selected[1].name in capsys.readouterr().out
    assert report(selected, verdicts("killed", "survived"), {selected[1].key: "equal"}) == 0
    assert selected[1].name not in capsys.readouterr().out
    assert report(selected, verdicts("killed", "killed"), {selected[1].key: "equal"}) == 0
    assert f"take it out of explained.txt\n    {selected[1].key}" in capsys.readouterr().out


# ---- the table of the package itself


def test_every_file_under_mutation_is_in_the_table() -> None:
    def files(*folders: str) -> set[str]:
        package = TABLE.root / "othink_ray"
        found = (path for folder in folders for path in (package / folder).rglob("*.py"))
        return {str(path.relative_to(package)) for path in found if path.name != "__init__.py"}

    assert TABLE.pure.keys() == files("core", "cpu") | {"weights.py", "driver/loop.py", "driver/async_loop.py"}
    assert TABLE.heavy.keys() == files("engines", "runtime")


def test_every_file_of_the_table_has_tests_that_exist() -> None:
    for file in (*TABLE.pure, *TABLE.heavy):
        assert TABLE.covering(file)
        assert [test for test in TABLE.covering(file) if not (TABLE.root / test).is_file()] == [], file
        assert len(set(TABLE.covering(file))) == len(TABLE.covering(file)), file


def test_a_file_without_a_line_in_the_table_is_named() -> None:
    with pytest.raises(KeyError, match=r"table\.py names no tests of core/new\.py: add a line"):
        replace(TABLE).covering("core/new.py")

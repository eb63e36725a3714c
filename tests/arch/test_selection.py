"""The selection of slow tests: every slow test is in one part, and a commit's part can be run again by its number."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.selection import Selection, commit_number, in_prompt_order, selection_of

FILES = [f"tests/test_{name}.py" for name in "abcdefghijk"]
DURATIONS = {file: {"fast": 50.0, "slow": 10.0 * (number + 1)} for number, file in enumerate(FILES)}


def test_each_slow_file_is_in_one_part() -> None:
    for parts in range(1, 14):
        chosen = [
            Selection(fast=False, part=part + 1, parts=parts).slow_files(FILES, DURATIONS) for part in range(parts)
        ]
        assert sorted(file for part in chosen for file in part) == FILES


def test_parts_take_about_equally_long() -> None:
    totals = [
        sum(DURATIONS[file]["slow"] for file in Selection(fast=False, part=part, parts=3).slow_files(FILES, DURATIONS))
        for part in (1, 2, 3)
    ]
    assert sum(totals) == 660 and max(totals) - min(totals) <= 20


def test_all_and_none_select_all_slow_files_and_none() -> None:
    assert selection_of("all").slow_files(FILES, {}) == set(FILES)
    assert selection_of("none").slow_files(FILES, {}) == set()
    assert selection_of("all").fast and selection_of("none").fast and not selection_of("1/2").fast


def test_the_longest_units_of_work_come_first() -> None:
    """Files of a folder that runs in one process count together."""
    files = ["tests/core/test_a.py", "tests/e2e/test_b.py", "tests/driver/test_c.py", "tests/e2e/test_d.py"]
    durations = dict(zip(files, ({"fast": 1, "slow": 99}, {"fast": 3}, {"fast": 5}, {"fast": 4}), strict=True))
    items = [SimpleNamespace(nodeid=f"{file}::test_{number}") for number in (1, 2) for file in files]
    ordered = in_prompt_order(items, ["fast"], durations)  # type: ignore[arg-type]
    assert [item.nodeid for item in ordered] == [
        f"{files[index]}::test_{number}" for index in (3, 1, 2, 0) for number in (1, 2)
    ]


@pytest.mark.parametrize("text", ["all", "none", "1/1", "2/3"])
def test_a_selection_is_written_as_it_is_read(text: str) -> None:
    assert str(selection_of(text)) == text


@pytest.mark.parametrize("text", ["", "some", "0/3", "4/3", "1/0", "commit", "1/3/5"])
def test_an_invalid_selection_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match=f"--slow={text} must"):
        selection_of(text)


def git(folder: Path, *words: str) -> None:
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *author, *words], check=True, capture_output=True)


def test_successive_commits_have_successive_numbers(tmp_path: Path) -> None:
    git(tmp_path, "init")
    for number in (1, 2, 3):
        git(tmp_path, "commit", "--allow-empty", "-m", "a commit")
        assert commit_number(tmp_path) == number
    git(tmp_path, "clone", "--depth=1", f"file://{tmp_path}", str(tmp_path / "shallow"))
    assert commit_number(tmp_path / "shallow") > 2**64  # from its hash


def test_a_folder_without_commits_needs_a_named_part(tmp_path: Path) -> None:
    with pytest.raises(pytest.UsageError, match="name a part"):
        commit_number(tmp_path)

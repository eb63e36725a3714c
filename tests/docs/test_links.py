"""Links, anchors, and the files and names that README.md, CONTRIBUTING.md and docs/ refer to exist. No network."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = (ROOT, ROOT / "othink_ray")  # a path in `code` starts from one of these
WRITTEN = ("runs/", "faults/", "my/")  # paths of files that a run or a reader writes


def prose(page: Path) -> str:
    """Return the page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        if "://" in target:
            continue
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_anchors_are_valid(page: Path) -> None:
    assert broken_links(page) == []


def test_a_missing_file_and_a_missing_anchor_are_broken(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title, and `code`\n[a](page.md) [b](#a-title-and-code) [c](none.md) [d](page.md#none)")
    assert broken_links(page) == ["none.md", "page.md#none"]


def test_pages_link_to_files_inside_docs_only() -> None:
    """The site is built from docs/ alone."""
    for page in (ROOT / "docs").glob("*.md"):
        assert "](../" not in prose(page), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_source_files_named_on_a_page_exist(page: Path) -> None:
    named = re.findall(r"`((?:[\w.]+/)+\w+\.(?:py|md|sh|sbatch|yaml|json))\b", prose(page))
    named = [name for name in named if not re.search("NAME|FOLDER", name) and not name.startswith(WRITTEN)]
    assert [name for name in named if not any((folder / name).exists() for folder in FOLDERS)] == []


def test_names_in_the_table_of_changes_exist() -> None:
    """The table names each registry as `NAME` of `file.py`."""
    section = prose(ROOT / "CONTRIBUTING.md").partition("## Where a change goes")[2].partition("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    pairs = re.findall(r"`(\w+)`(?: or `(\w+)`)? (?:in|of) `([\w/]+)\.py`", rows)
    assert len(pairs) >= 20
    for *names, file in pairs:
        module = import_module(f"othink_ray.{file.replace('/', '.').removesuffix('.__init__')}")
        assert [name for name in names if name and not hasattr(module, name)] == [], file

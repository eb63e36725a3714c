"""Refuses retired vocabulary in the code:  python -m tests.arch.language

Checks docstrings (their first word), identifiers (retired names of CONTRIBUTING.md), class names (each exists once) and
the length of test names.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("othink_ray", "benchmarks", "tests")
UNIQUE = ("othink_ray", "benchmarks")  # each class name exists once in these together
MOST_DEFINITIONS = 14  # of one function name in a room's public code
LONGEST_TEST_NAME = 60  # characters
FIRST_WORDS = ("Of", "Who", "Whoever", "What", "Those", "Whose")
# Retired name -> what the field calls it. A name is a whole word of an identifier: `open_exam`, `ExamPage`.
RETIRED = {
    "asked": "requested",
    "classroom": "SFT workers",
    "about": "attributes",
    "ahead": "prefetch",
    "coming": "upcoming",
    "corrected": "importance weights",
    "correction": "TIS",
    "corrections": "TIS",
    "colour": "color",
    "colours": "colors",
    "conduct": "run",
    "dealt": "assigned",
    "expect": "prefetch",
    "expecting": "prefetch",
    "equip": "sync new engines",
    "exam": "eval set",
    "exams": "eval sets",
    "examiners": "eval workers",
    "foresee": "preflight",
    "grey": "gray",
    "hand": "shard",
    "journal": "callbacks",
    "meet": "rendezvous",
    "narrow": "last-layer pruning",
    "own": "custom",
    "place": "index",
    "places": "indices",
    "products": "matmul",
    "seat": "bundle",
    "seats": "bundles",
    "seating": "placement",
    "skeleton": "meta network",
    "students": "SFT workers",
    "suits": "supports",
    "team": "worker group",
    "teacher": "demonstrations",
    "told": "logged",
    "watching": "watch",
    "watches": "callbacks",
    "worth": "faster",
}


def findings() -> Iterator[str]:
    """Yield one line for each use of the retired language."""
    classes, functions = defaultdict(list), defaultdict(list)
    for folder in CODE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            where = file.relative_to(ROOT)
            for name in words(file.stem):
                if name in RETIRED:
                    yield f"{where}: `{name}` in a file name is retired: {RETIRED[name]}"
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                yield from (f"{where}:{line}" for line in _docstring(node))
                yield from (f"{where}:{line}" for line in _names(node))
                if isinstance(node, ast.ClassDef) and folder in UNIQUE:
                    classes[node.name].append(f"{where}:{node.lineno}")
            if folder == "othink_ray":
                for node in tree.body:
                    if isinstance(node, ast.FunctionDef):
                        functions[node.name].append(f"{where}:{node.lineno}")
    for kind, found, most in (("class", classes, 1), ("function", functions, MOST_DEFINITIONS)):
        for name, found_in in found.items():
            if len(found_in) > most:
                yield f"{kind} {name} is defined {len(found_in)} times: {', '.join(found_in)}"


def words(identifier: str) -> list[str]:
    """`open_EvalSet2` -> open, eval, set."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)]


def _docstring(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node) or ""
        if text.split(maxsplit=1)[:1] and re.match(r"\w+", text) and re.match(r"\w+", text)[0] in FIRST_WORDS:  # type: ignore[index]
            yield f"{getattr(node, 'lineno', 1)}: a docstring starts with `{text.split()[0]}`: say what comes out"


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        identifier = node.name
    elif isinstance(node, ast.arg):
        identifier = node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        identifier = node.id
    else:
        return
    if isinstance(node, ast.FunctionDef) and identifier.startswith("test_"):  # a sentence
        if len(identifier) > LONGEST_TEST_NAME:
            yield f"{node.lineno}: `{identifier}`: a test's name has at most {LONGEST_TEST_NAME} characters"
        return
    for word in words(identifier):
        if word in RETIRED:
            yield f"{node.lineno}: `{identifier}`: `{word}` is retired: {RETIRED[word]}"


if __name__ == "__main__":
    found = list(findings())
    print("\n".join(found) or "vocabulary: nothing retired is left")
    sys.exit(bool(found))

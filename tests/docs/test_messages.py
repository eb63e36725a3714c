"""docs/troubleshooting.md quotes messages as they are in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import othink_ray

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"


def texts() -> Iterator[str]:
    """Yield all strings of the package, with … for each interpolated value, and the text of the set-up script."""
    for file in Path(othink_ray.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    yield re.sub(r"\$(\w+|\(([^()]|\([^()]*\))*\))", "…", (ROOT / "launch" / "setup_env.sh").read_text())


def quoted() -> list[str]:
    """Return the messages in the first columns of the page's tables."""
    return re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE)


def test_each_quoted_message_is_in_the_code() -> None:
    strings = "\n".join(texts())
    assert len(quoted()) > 20
    assert [message for message in quoted() if message not in strings] == []

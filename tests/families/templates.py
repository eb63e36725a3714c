"""Modified chat templates for a model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def with_template(folder: Path, change: Callable[[str], str]) -> None:
    """Replace the folder's chat template with `change(template)`."""
    file = folder / "chat_template.jinja"
    original = file.read_text(encoding="utf-8")
    changed = change(original)
    assert changed != original
    file.write_text(changed, encoding="utf-8")

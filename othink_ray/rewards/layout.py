"""The format reward R_format of Eq. 1."""

from __future__ import annotations

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(text: str) -> float:
    """1.0 if the whole text is <think>…</think> and then <answer>…</answer>, each tag once, else 0.0.

    White space may stand around and between the two; their content may be empty and may span lines.
    """
    body = text.strip()
    # Counted, not matched: this stays linear on any text.
    if any(body.count(tag) != 1 for tag in TAGS):
        return 0.0
    thought, _, rest = body.partition("</think>")
    return float(thought.startswith("<think>") and rest.lstrip().startswith("<answer>") and rest.endswith("</answer>"))

"""Prompts dealt to engines by how much work each is likely to be: the step ends when the last engine does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from othink_ray.types import Group, Prompt

_KEPT = 2**17  # prompts whose lengths are remembered; those not seen for longest are forgotten first
_CHARACTERS_A_TOKEN = 4
_TOKENS_AN_IMAGE = 256
# A prompt's tokens go through the network side by side, an answer's one after the other.
_PROMPT_TOKENS_AN_ANSWER_TOKEN = 8


class AnswerLengths:
    """How long answers were, by prompt: what the next ones are likely to be."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self._tokens = 0
        self._answers = 0

    def note(self, group: Group) -> None:
        lengths = [len(answer.token_ids) for answer in group.completions]
        self._seen.pop(group.prompt.id, None)
        self._seen[group.prompt.id] = float(np.mean(lengths))
        if len(self._seen) > _KEPT:
            del self._seen[next(iter(self._seen))]
        self._tokens += sum(lengths)
        self._answers += len(lengths)

    def work(self, prompt: Prompt, answers: int) -> float:
        """In answer tokens: those of its last answers, or of an average one; its text and images count a little."""
        length = self._seen.get(prompt.id, self._tokens / max(self._answers, 1))
        text = sum(len(message.text) for message in prompt.messages) / _CHARACTERS_A_TOKEN
        images = len(prompt.images) * _TOKENS_AN_IMAGE
        return answers * length + (text + images) / _PROMPT_TOKENS_AN_ANSWER_TOKEN


def deal(work: Sequence[float], hands: int) -> list[list[int]]:
    """Indices for each hand: the most work first, each to the hand with the least so far."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    load = [0.0] * hands
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        hand = load.index(min(load))
        dealt[hand].append(index)
        load[hand] += work[index]
    return dealt

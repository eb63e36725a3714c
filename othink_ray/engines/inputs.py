"""What an engine makes of prompts, made before they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from othink_ray.engines.base import on_one_thread
from othink_ray.types import Prompt

T = TypeVar("T")


class Inputs(Generic[T]):
    """One input a prompt."""

    def __init__(self, make: Callable[[Prompt], T]) -> None:
        self._make = make
        self._made: dict[Prompt, T] = {}

    @on_one_thread()
    def prepare(self, prompts: Iterable[Prompt]) -> None:
        """These are kept, and no others."""
        self._made = {prompt: self.of(prompt) for prompt in prompts}

    def of(self, prompt: Prompt) -> T:
        return self._made[prompt] if prompt in self._made else self._make(prompt)

    def take(self, prompt: Prompt) -> T:
        """Who takes one does not come again."""
        return self._made.pop(prompt) if prompt in self._made else self._make(prompt)

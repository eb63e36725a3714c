"""What an engine makes of prompts, made before they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from othink_ray.engines.base import on_one_thread
from othink_ray.families.base import Family, ImageTensors
from othink_ray.types import PixelDigest, Prompt
from othink_ray.weights.digest import digests

DTYPES_OF_PIXELS = {"uint8": torch.uint8, "float32": torch.float32, "bfloat16": torch.bfloat16}


def pixel_digest(pixels: Tensor) -> PixelDigest:
    """Of all images of a prompt, one below the other; each engine has them in a form of its own."""
    [digest] = digests([("pixels", pixels)]).values()
    return PixelDigest(value=digest.value, dtype=str(pixels.dtype).removeprefix("torch."))


def pixels_as(family: Family, images: ImageTensors, dtype: str) -> Tensor:
    """The pixels that an engine of this form should have."""
    return family.raw_pixels(images) if dtype == "uint8" else images.pixels.to(DTYPES_OF_PIXELS[dtype])


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

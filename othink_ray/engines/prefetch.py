"""What an engine makes of prompts, made before they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from itertools import chain
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from othink_ray.engines.base import on_one_thread
from othink_ray.engines.collate import LaidOut, MicroBatch
from othink_ray.families.base import Family, ImageTensors
from othink_ray.types import Pack, PixelDigest, Prompt
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A micro-batch on the device, and what is known of it already."""

    rows: Sequence[Pack]
    batch: MicroBatch
    features: Tensor | None = None  # of its images, where policy and reference share them
    reference: Tensor | None = None  # its logprobs
    old: Tensor | None = None  # logprobs before the first of several optimizer steps
    encodes: int = 0  # images that a vision tower has looked at for this


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept of a micro-batch on the device until its turn: no pixels, no positions."""

    old: Tensor | None = None
    features: Tensor | None = None
    reference: Tensor | None = None
    encodes: int = 0

    def with_batch(self, rows: Sequence[Pack], batch: MicroBatch) -> Prepared:
        """The micro-batch itself beside it."""
        return Prepared(
            rows=rows,
            batch=batch,
            features=self.features,
            reference=self.reference,
            old=self.old,
            encodes=self.encodes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetched:
    """A micro-batch before its turn: its pixels wait in host memory, as those of a whole step may not fit a device."""

    laid_out: LaidOut
    kept: Kept


class Made:
    """The first micro-batches of one update; the last of them may still be in the making."""

    def __init__(self) -> None:
        self.begun: list[tuple[Sequence[Pack], Future[Prefetched]]] = []

    def of(self, rows: Sequence[Pack]) -> Prefetched | None:
        """That of exactly these rows, waited for where it is in the making; it is not kept here any longer."""
        for place, (own, making) in enumerate(self.begun):
            if len(own) == len(rows) and all(map(_equal, own, rows)):
                del self.begun[place]
                return making.result()
        return None


class Prefetcher:
    """Prepares the next update's micro-batches, as many as there is time for."""

    def __init__(self, make: Callable[[Sequence[Pack], bool], Prefetched]) -> None:
        """`make`: of the rows of a micro-batch, with the reference's logprobs or without."""
        self.make = make
        self._made, self._most = Made(), 0
        self._lock = Lock()

    def take(self) -> Made:
        """At the beginning of an update: what was begun for it. No more is begun."""
        with self._lock:
            made, self._made = self._made, Made()
        return made

    def prepare(self, updates: Sequence[Sequence[Sequence[Pack]]], *, with_reference: bool) -> None:
        """Until the update begins, and one micro-batch more than the last time at most.

        What is made now shortens the next update, and so the time for making more: in small steps both settle.
        """
        made, most, begun = self._made, self._most + 1, 0
        for rows in list(chain(*updates))[:most]:
            making: Future[Prefetched] = Future()
            with self._lock:
                if made is not self._made:
                    break
                made.begun.append((rows, making))
            begun += 1
            try:
                making.set_result(self.make(rows, with_reference))
            except BaseException as error:
                making.set_exception(error)
                raise
        self._most = begun


def _equal(left: Pack, right: Pack) -> bool:
    return all(np.array_equal(getattr(left, one.name), getattr(right, one.name)) for one in fields(Pack))

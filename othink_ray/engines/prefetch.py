"""Caches of inputs that are prepared before they are used: prompts of a rollout engine, micro-batches of a learner."""

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
from othink_ray.engines.collate import HostBatch, MicroBatch
from othink_ray.families.base import Family, ImageTensors
from othink_ray.types import Pack, PixelDigest, Prompt
from othink_ray.weights import digests

DTYPES_OF_PIXELS = {"uint8": torch.uint8, "float32": torch.float32, "bfloat16": torch.bfloat16}


def pixel_digest(pixels: Tensor) -> PixelDigest:
    """Return the digest of all images of a prompt, concatenated, in the dtype in which the engine has them."""
    [digest] = digests([("pixels", pixels)]).values()
    return PixelDigest(value=digest.value, dtype=str(pixels.dtype).removeprefix("torch."))


def pixels_as(family: Family, images: ImageTensors, dtype: str) -> Tensor:
    """Return the pixels in an engine's `dtype`; uint8 means before normalization."""
    return family.raw_pixels(images) if dtype == "uint8" else images.pixels.to(DTYPES_OF_PIXELS[dtype])


T = TypeVar("T")


class Inputs(Generic[T]):
    """Cache of one prepared input per prompt; an input that is not cached is prepared when it is needed."""

    def __init__(self, make: Callable[[Prompt], T]) -> None:
        self._make = make
        self._cached: dict[Prompt, T] = {}

    @on_one_thread()
    def prefetch(self, prompts: Iterable[Prompt]) -> None:
        """Prepare and cache the inputs of these prompts; drop all others from the cache."""
        self._cached = {prompt: self.get(prompt) for prompt in prompts}

    def get(self, prompt: Prompt) -> T:
        """Return the cached input, which stays cached, or else prepare one without caching it."""
        return self._cached[prompt] if prompt in self._cached else self._make(prompt)

    def take(self, prompt: Prompt) -> T:
        """Return the cached input and drop it from the cache, or else prepare one."""
        return self._cached.pop(prompt) if prompt in self._cached else self._make(prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A micro-batch on the device with its precomputed tensors."""

    packs: Sequence[Pack]
    batch: MicroBatch
    features: Tensor | None = None  # (image tokens, H), where policy and reference share them
    reference: Tensor | None = None  # (M,) the reference's logprobs
    old: Tensor | None = None  # (M,) logprobs before the first of several optimizer steps
    encodes: int = 0  # images that a vision tower has encoded for this micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Precomputed:
    """Tensors of a micro-batch that stay on the device until its turn; pixels and positions do not."""

    old: Tensor | None = None
    features: Tensor | None = None
    reference: Tensor | None = None
    encodes: int = 0

    def with_batch(self, packs: Sequence[Pack], batch: MicroBatch) -> Prepared:
        """Return these tensors together with the micro-batch itself."""
        return Prepared(
            packs=packs,
            batch=batch,
            features=self.features,
            reference=self.reference,
            old=self.old,
            encodes=self.encodes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetched:
    """A micro-batch before its turn. Its pixels stay in host memory: the device may not hold those of a whole step."""

    host_batch: HostBatch
    precomputed: Precomputed


class PrefetchQueue:
    """The first micro-batches of one update; the last of them may still be in progress."""

    def __init__(self) -> None:
        self.started: list[tuple[Sequence[Pack], Future[Prefetched]]] = []

    def pop(self, packs: Sequence[Pack]) -> Prefetched | None:
        """Remove and return the micro-batch of exactly these packed samples, waiting for it; None if not started."""
        for index, (started, future) in enumerate(self.started):
            if len(started) == len(packs) and all(map(_equal, started, packs)):
                del self.started[index]
                return future.result()
        return None


class Prefetcher:
    """Prefetches weight-independent inputs of the next update: collated micro-batches, frozen image features, reference
    logprobs; as many micro-batches as there is time for."""

    def __init__(self, make: Callable[[Sequence[Pack], bool], Prefetched]) -> None:
        """`make(packs, with_reference)` prepares one micro-batch."""
        self.make = make
        self._queue, self._limit = PrefetchQueue(), 0
        self._lock = Lock()

    def take(self) -> PrefetchQueue:
        """Return the micro-batches started for the update that begins now, and stop starting more for it."""
        with self._lock:
            queue, self._queue = self._queue, PrefetchQueue()
        return queue

    def prefetch(self, updates: Sequence[Sequence[Sequence[Pack]]], *, with_reference: bool) -> None:
        """Prepare micro-batches until the update begins, at most one more than the last time.

        Each micro-batch prepared now shortens the next update, and with it the time to prepare more: growing by one
        lets both settle.
        """
        queue, limit, started = self._queue, self._limit + 1, 0
        for packs in list(chain(*updates))[:limit]:
            future: Future[Prefetched] = Future()
            with self._lock:
                if queue is not self._queue:
                    break
                queue.started.append((packs, future))
            started += 1
            try:
                future.set_result(self.make(packs, with_reference))
            except BaseException as error:
                future.set_exception(error)
                raise
        self._limit = started


def _equal(left: Pack, right: Pack) -> bool:
    return all(np.array_equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(Pack))

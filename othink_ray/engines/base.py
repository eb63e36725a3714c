"""What the runtime asks of an engine. One contract suite runs over every implementation."""

from __future__ import annotations

import hashlib
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, device, get_num_threads, set_num_threads  # by name: vLLM has torch's own setter do nothing
from torch.distributed import TCPStore, init_process_group, is_initialized  # type: ignore[attr-defined]  # documented
from torch.distributed.constants import default_pg_timeout

from othink_ray.types import Group, Pack, PixelDigest, Probe, Prompt, UpdateStats
from othink_ray.weights.digest import Held, TensorDigest, mismatches


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a batch of prompts is answered. The same seed gives the same answers on any number of engines."""

    answers: int
    max_tokens: int
    temperature: float  # 0 is greedy
    seed: int

    def seed_of(self, prompt: Prompt) -> int:
        """The seed of one prompt's group: it depends on the prompt's id, never on where or when it runs."""
        digest = hashlib.sha256(f"{self.seed}/{prompt.id}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


def share_of_cores(threads: int | None, sharers: int) -> int:
    """Threads for one of `sharers` processes that work at the same time; more than cores would wait for each other."""
    return threads or max(1, (os.cpu_count() or 1) // sharers)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """For what engines and learner do at the same time: threads of both on the same cores would wait for each other."""
    threads = get_num_threads()
    set_num_threads(1)
    try:
        yield
    finally:
        set_num_threads(threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousInfo:
    """Where a learner process stands: its rank among how many, and the address at which they meet."""

    rank: int
    world_size: int
    master_address: str
    master_port: int

    def rendezvous(self, on: device) -> None:
        """Wait for the other ranks. A process meets them once, whatever it makes of it."""
        if is_initialized():
            return
        init_process_group(
            "nccl" if on.type == "cuda" else "gloo",
            store=TCPStore(self.master_address, self.master_port),
            rank=self.rank,
            world_size=self.world_size,
            timeout=default_pg_timeout,
            device_id=on if on.type == "cuda" and self.world_size > 1 else None,
        )


def rendezvous_info(address: str = "127.0.0.1") -> TCPStore:
    """Where the ranks of a learner meet, for as long as the caller keeps it; it listens at `address` alone.

    It listens from the start: a port that only was free when somebody looked is another's by the time the ranks come.
    """
    listening = socket.create_server((address, 0))
    port = listening.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def require_room(prompt: Prompt, expanded: Sequence[int], max_model_len: int) -> None:
    """Refuses a prompt after which no answer token fits."""
    if len(expanded) >= max_model_len:
        raise ValueError(
            f"prompt {prompt.id} has {len(expanded)} tokens, its images included, but rollout.max_model_len = "
            f"{max_model_len} must hold an answer too: raise it, or lower model.max_pixels"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapters:
    """Linear layers to whose product with x an engine adds B A x; a push brings both factors, each under its name."""

    rank: int  # A is (rank, in), B is (out, rank)
    layers: tuple[str, ...]  # paths in the Hugging Face network; with .lora_A.weight and .lora_B.weight the names


class RolloutEngine(Protocol):
    """Samples groups with one version of the weights."""

    version: int

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """They will be asked next: do for them what needs no weights, and keep it until then."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        """Groups in the order in which they finish."""
        ...

    def sleep(self) -> None:
        """Leave the device to the learner until the next push."""
        ...

    def begin_push(self) -> None: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def finish_push(self, version: int, buckets: int) -> None: ...

    def check_weights(self, expected: Mapping[str, TensorDigest], *, complete: bool) -> dict[str, str]:
        """What is wrong with the weights that this engine computes with, by name; `complete`: these are all of them."""
        ...

    def probe(self, prompts: Sequence[Prompt], sampling: Sampling, candidates: int) -> list[Probe]: ...


OPENED = -1  # the version of an engine that has the policy of the folder that it was opened with


class UnfinishedPush(RuntimeError):
    """An engine holds parts of two policies."""


_UNFINISHED = -2  # the version of an engine during a push


class Receiver(ABC):
    """The receiving end of a push. Until all of its buckets have arrived, an engine refuses to answer."""

    version = OPENED
    _arrived = 0

    def begin_push(self) -> None:
        self.version, self._arrived = _UNFINISHED, 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """One bucket of a push; weights that are in none of them stay as they are."""
        assert self.version == _UNFINISHED, "weights outside of a push"
        with on_one_thread():
            self._write(weights)
        self._arrived += 1

    def finish_push(self, version: int, buckets: int) -> None:
        """The policy is whole again: everything computed with older weights is forgotten."""
        if self._arrived != buckets:
            raise UnfinishedPush(f"of the {buckets} buckets of weights version {version}, {self._arrived} arrived")
        self._forget()
        self.version = version

    def check_weights(self, expected: Mapping[str, TensorDigest], *, complete: bool) -> dict[str, str]:
        with on_one_thread():
            return mismatches(expected, self._held_weights(expected, complete))

    def _require_whole(self) -> None:
        if self.version == _UNFINISHED:
            raise UnfinishedPush("a push of weights did not finish: this engine holds parts of two policies")

    @abstractmethod
    def _write(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    @abstractmethod
    def _forget(self) -> None: ...

    @abstractmethod
    def _held_weights(self, expected: Mapping[str, TensorDigest], complete: bool) -> Sequence[Held]:
        """Read from what the engine computes with, never from what it received; one for each of its workers."""
        ...


class LearnerEngine(Protocol):
    """One rank of the learner; every rank is called with its own share, all at the same time."""

    def update(
        self,
        updates: Sequence[Sequence[Sequence[Pack]]],
        *,
        beta: float,
        lr: float,
        loss: str,
        correction: str,
    ) -> UpdateStats:
        """Optimiser steps over [update][micro-batch][row]; an empty one keeps this rank in step with others."""
        ...

    def prepare(self, updates: Sequence[Sequence[Sequence[Pack]]], *, with_reference: bool) -> None:
        """On a thread of its own, until the `update` with these rows begins: what no update changes of them.

        With it or without it, the next update's outcome is the same.
        """
        ...

    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        """The policy's logprobs (T, K) of each probe's candidates."""
        ...

    def pixel_digests(self, probes: Sequence[Probe]) -> list[PixelDigest]:
        """Of the images of each probe as the policy sees them, in the form that the probe has them in."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that training changes, whole, one after the other, under their Hugging Face module names."""
        ...

    def frozen_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All others, in the same way."""
        ...

    def release_memory(self) -> None:
        """Leave what this process does not use to the engines on the same GPU, which wake when it is done."""
        ...

    def export(self, folder: Path) -> None:
        """Write the policy as a plain Hugging Face folder."""
        ...

    def save(self, folder: Path) -> None:
        """Begin to write weights and optimiser, each rank its share; what is written is as it is now."""
        ...

    def written(self) -> bool:
        """Whether `saved` would give an answer at once."""
        ...

    def saved(self) -> dict[str, str]:
        """Wait until this rank's share is on the disk; the SHA-256 of each of its files."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, on however many ranks."""
        ...


def release_cache(device: torch.device) -> None:
    """Return freed blocks to the device. torch's allocator keeps them otherwise, and no other process can have them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""Protocols of rollout and learner engines, and the parts that their implementations share.

One contract suite runs over every implementation.
"""

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
from torch import Tensor, get_num_threads, set_num_threads  # by name: vLLM replaces torch.set_num_threads by a no-op
from torch.distributed import TCPStore, init_process_group, is_initialized  # type: ignore[attr-defined]  # documented
from torch.distributed.constants import default_pg_timeout

from othink_ray.types import Group, Pack, PixelDigest, Probe, Prompt, UpdateSettings, UpdateStats
from othink_ray.weights import TensorDigest, WorkerDigests, mismatches


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters of a batch of prompts. The same seed gives the same answers on any number of engines."""

    answers: int  # per prompt
    max_tokens: int  # per answer
    temperature: float  # 0 is greedy
    seed: int

    def seed_of(self, prompt: Prompt) -> int:
        """Return the seed of one prompt's group: a hash of seed and prompt id, the same on any engine at any time."""
        digest = hashlib.sha256(f"{self.seed}/{prompt.id}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


def share_of_cores(threads: int | None, sharers: int) -> int:
    """Return `threads`, or an equal share of the cores for one of `sharers` processes that compute at the same time."""
    return threads or max(1, (os.cpu_count() or 1) // sharers)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Run torch on one thread, for work that engines and learner do at the same time on the same cores."""
    threads = get_num_threads()
    set_num_threads(1)
    try:
        yield
    finally:
        set_num_threads(threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousInfo:
    """Rank and world size of a learner process, and the address of the store at which the ranks rendezvous."""

    rank: int
    world_size: int
    master_address: str
    master_port: int

    def join(self, device: torch.device) -> None:
        """Wait for the other ranks and create the default process group, unless this process has one already."""
        if is_initialized():
            return
        init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=TCPStore(self.master_address, self.master_port),
            rank=self.rank,
            world_size=self.world_size,
            timeout=default_pg_timeout,
            device_id=device if device.type == "cuda" and self.world_size > 1 else None,
        )


def rendezvous_store(address: str = "127.0.0.1") -> TCPStore:
    """Return the store at which the ranks of a learner rendezvous; it listens on `address` while the caller holds it.

    It listens at once: a port that is only looked up may be taken by another process before the ranks connect.
    """
    listening = socket.create_server((address, 0))
    port = listening.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def require_room(prompt: Prompt, expanded: Sequence[int], max_model_len: int) -> None:
    """Raise ValueError where a prompt leaves no room for an answer token."""
    if len(expanded) >= max_model_len:
        raise ValueError(
            f"prompt {prompt.id} has {len(expanded)} tokens, its images included, but rollout.max_model_len = "
            f"{max_model_len} must hold an answer too: raise it, or lower model.max_pixels"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapters:
    """LoRA rank, and the linear layers to whose output an engine adds B A x; a push brings both factors by name."""

    rank: int  # A is (rank, in), B is (out, rank)
    layers: tuple[str, ...]  # paths in the Hugging Face network; a factor's name appends .lora_A.weight, .lora_B.weight


class RolloutEngine(Protocol):
    """A sampler of groups, all from one version of the weights."""

    version: int

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Prefetch the weight-independent inputs of the next prompts, and cache them until `generate` takes them."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        """Yield one group per prompt, in the order in which the groups finish."""
        ...

    def sleep(self) -> None:
        """Free the device for the learner until the next push."""
        ...

    def begin_push(self) -> None:
        """Refuse to generate until `finish_push`."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load one bucket of a push."""
        ...

    def finish_push(self, version: int, buckets: int) -> None:
        """Let `generate` use the pushed weights, as `version`; raise UnfinishedPush unless all `buckets` arrived."""
        ...

    def check_weights(self, expected: Mapping[str, TensorDigest], *, complete: bool) -> dict[str, str]:
        """Return what is wrong in the weights in use, by weight name; `complete`: `expected` names every weight."""
        ...

    def probe(self, prompts: Sequence[Prompt], sampling: Sampling, candidates: int) -> list[Probe]:
        """Return one sampled answer per prompt, in order, with the likeliest `candidates` tokens at each position."""
        ...


OPENED = -1  # version of an engine that still has the weights of the model folder it was opened with


class UnfinishedPush(RuntimeError):
    """Raised by an engine that has no complete policy: a push did not finish, or the engine is asleep."""


_UNFINISHED = -2  # version of an engine during a push


class Receiver(ABC):
    """Base class for the receiving end of a push: the engine refuses to generate until all buckets have arrived."""

    version = OPENED
    _arrived = 0

    def begin_push(self) -> None:
        self.version, self._arrived = _UNFINISHED, 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load one bucket of a push; weights that are in no bucket keep their values."""
        assert self.version == _UNFINISHED, "weights outside of a push"
        with on_one_thread():
            self._write(weights)
        self._arrived += 1

    def finish_push(self, version: int, buckets: int) -> None:
        """Drop the caches of older weights and set `version`; raise UnfinishedPush unless all `buckets` arrived."""
        if self._arrived != buckets:
            raise UnfinishedPush(f"only {self._arrived} of the {buckets} buckets of weights version {version} arrived")
        self._drop_caches()
        self.version = version

    def check_weights(self, expected: Mapping[str, TensorDigest], *, complete: bool) -> dict[str, str]:
        with on_one_thread():
            return mismatches(expected, self._held_weights(expected, complete))

    def _require_whole(self) -> None:
        if self.version == _UNFINISHED:
            raise UnfinishedPush("a push of weights did not finish: this engine holds parts of two policies")

    @abstractmethod
    def _write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy one bucket into the weights."""
        ...

    @abstractmethod
    def _drop_caches(self) -> None:
        """Drop the caches that depend on the weights."""
        ...

    @abstractmethod
    def _held_weights(self, expected: Mapping[str, TensorDigest], complete: bool) -> Sequence[WorkerDigests]:
        """Return one record per worker, read from the weights it computes with, never from the received buckets."""
        ...


class LearnerEngine(Protocol):
    """One rank of the learner. Methods are collective: every rank is called at the same time, with its own shard."""

    def update(self, updates: Sequence[Sequence[Sequence[Pack]]], settings: UpdateSettings) -> UpdateStats:
        """Run one optimizer step per update over `[update][micro-batch][packed sample]`; return the reduced stats.

        An empty micro-batch keeps this rank's collectives in step with the other ranks.
        """
        ...

    def prefetch(self, updates: Sequence[Sequence[Sequence[Pack]]], settings: UpdateSettings) -> None:
        """Prefetch weight-independent inputs of the next update, until `update` is called with these packed samples.

        Runs on its own thread. It never changes the update's result.
        """
        ...

    def candidate_logprobs(self, probes: Sequence[Probe]) -> list[NDArray[np.float32]]:
        """Return the policy's logprobs (T, K) of each probe's candidates."""
        ...

    def pixel_digests(self, probes: Sequence[Probe]) -> list[PixelDigest]:
        """Return the digest of each probe's pixels as the policy sees them, in the dtype of the probe's own digest."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained weights, each gathered to its full shape, under their Hugging Face module names."""
        ...

    def frozen_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all other weights, in the form of `named_weights`."""
        ...

    def release_memory(self) -> None:
        """Return unused GPU memory to the device, for rollout engines on the same GPU that wake up next."""
        ...

    def export(self, folder: Path) -> None:
        """Write the policy as a plain Hugging Face folder."""
        ...

    def save(self, folder: Path) -> None:
        """Start to write this rank's shard of a snapshot of weights and optimizer state, in the background."""
        ...

    def save_is_written(self) -> bool:
        """Return whether `finish_save` would return without waiting."""
        ...

    def finish_save(self) -> dict[str, str]:
        """Wait until this rank's shard is on disk; return file name -> SHA-256."""
        ...

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint that `save` wrote, on any number of ranks."""
        ...


def release_cache(device: torch.device) -> None:
    """Return freed blocks to the device; torch's allocator would cache them, out of reach of other processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""Named tensors as a few flat byte buffers: what a shared-memory store moves without copying piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor of a chunk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tensors back to back in one buffer."""

    pieces: tuple[Piece, ...]
    data: NDArray[np.uint8]


def to_chunks(weights: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Chunk]:
    """Chunks of at most `bucket_bytes`, in order; a larger tensor makes a chunk of its own."""
    pieces: list[Piece] = []
    data, used = np.empty(0, dtype=np.uint8), 0
    for name, weight in weights:
        piece = Piece(name=name, shape=tuple(weight.shape), dtype=weight.dtype)
        if used + piece.nbytes > len(data):
            if pieces:
                yield Chunk(pieces=tuple(pieces), data=data[:used])
            pieces, used = [], 0
            data = np.empty(max(bucket_bytes, piece.nbytes), dtype=np.uint8)  # what is not written takes no memory
        pieces.append(piece)
        # Copied at once: the learner may overwrite or release the parameter before the chunk is sent.
        bytes_of_it = weight.contiguous().view(-1).view(torch.uint8)
        torch.from_numpy(data[used : used + piece.nbytes]).copy_(bytes_of_it)
        used += piece.nbytes
    if pieces:
        yield Chunk(pieces=tuple(pieces), data=data[:used])


def from_chunks(chunks: Iterable[Chunk]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors again, copied: a shared buffer is read-only, and engines may keep or change what they get."""
    for chunk in chunks:
        start = 0
        for piece in chunk.pieces:
            weight = torch.empty(piece.shape, dtype=piece.dtype)
            weight.view(-1).view(torch.uint8).numpy()[:] = chunk.data[start : start + piece.nbytes]
            yield piece.name, weight
            start += piece.nbytes

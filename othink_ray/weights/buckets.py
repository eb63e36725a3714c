"""Weight buckets: named tensors packed into a few flat byte buffers, which the object store moves without copies."""

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
    """Name, shape and dtype of one tensor in a chunk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Several tensors back to back in one byte buffer."""

    pieces: tuple[Piece, ...]
    data: NDArray[np.uint8]


def to_chunks(weights: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Chunk]:
    """Yield chunks of at most `bucket_bytes`, in order; a larger tensor gets a separate chunk."""
    pieces: list[Piece] = []
    data, used = np.empty(0, dtype=np.uint8), 0
    for name, weight in weights:
        piece = Piece(name=name, shape=tuple(weight.shape), dtype=weight.dtype)
        if used + piece.nbytes > len(data):
            if pieces:
                yield Chunk(pieces=tuple(pieces), data=data[:used])
            pieces, used = [], 0
            data = np.empty(max(bucket_bytes, piece.nbytes), dtype=np.uint8)  # unwritten pages use no memory
        pieces.append(piece)
        # Copy now: the learner may overwrite or release the parameter before the chunk is sent.
        raw = weight.contiguous().view(-1).view(torch.uint8)
        torch.from_numpy(data[used : used + piece.nbytes]).copy_(raw)
        used += piece.nbytes
    if pieces:
        yield Chunk(pieces=tuple(pieces), data=data[:used])


def from_chunks(chunks: Iterable[Chunk]) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors as copies: shared buffers are read-only, and engines may keep or modify the tensors."""
    for chunk in chunks:
        start = 0
        for piece in chunk.pieces:
            weight = torch.empty(piece.shape, dtype=piece.dtype)
            weight.view(-1).view(torch.uint8).numpy()[:] = chunk.data[start : start + piece.nbytes]
            yield piece.name, weight
            start += piece.nbytes

"""Activations from any iterable: chunks of rows that are seen once a pass and in one order.

What ``fastsae.data.Source`` is to rows that can be read by number. Shuffling is that of a buffer:
it is filled with rows in the order they come, permuted, and handed out until half of it is left;
then it is filled up and permuted anew. At the end of a pass over the iterable all of it is handed
out, so each pass is exact: every row once. The order is a function of the seed and of the rows'
order, and the count of rows handed out is the whole state, as long as the iterable gives the same
chunks again: to go on, the rows before that are read once more and dropped.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.batches import Batch
from fastsae.data import open_source
from fastsae.order import permutation

_PURPOSE = 3  # of the permutations of a buffer; order.py has 1, 2, 4 and 5


class IterableSource:
    """Chunks x [n, d_in], or pairs (x, target [n, d_out]), of tensors or NumPy arrays.

    chunks: each ``iter(chunks)`` is one pass: a list, a DataLoader, an object whose ``__iter__`` is
    a generator. buffer_rows: rows that are shuffled among each other and kept in memory, float32.

    Its rows have no numbers, so it has no length, cannot be split and cannot be evaluated on.
    TypeError: a generator itself, which could not start anew. ValueError, TypeError: a chunk is not
    as it should be, named by its number.
    """

    n_rows = None
    gradient = None

    def __init__(
        self, chunks: Iterable[Any], *, buffer_rows: int = 65536, name: str = "iterable"
    ) -> None:
        if buffer_rows < 2:
            raise ValueError(f"buffer_rows: expected at least 2, got {buffer_rows}")
        self.chunks, self.buffer_rows, self.name = chunks, buffer_rows, name
        try:
            chunk = next(self._chunks())
        except StopIteration:
            raise ValueError(f"{name}: expected at least one chunk, got none") from None
        x, target = _chunk(name, 0, chunk, None, None)
        self.d_in = x.shape[1]
        self._d_target = None if target is None else target.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what is to be reconstructed: the target's, or ``d_in`` where there is none."""
        return self.d_in if self._d_target is None else self._d_target

    @property
    def target(self) -> IterableSource | None:
        """Not None where chunks carry targets."""
        return None if self._d_target is None else self

    def identity(self) -> dict[str, Any]:
        """What tells a stream of rows from others, as far as that is known."""
        return {"d_in": self.d_in, "d_out": self.d_out, "buffer_rows": self.buffer_rows}

    def batches(
        self, batch_size: int, seed: int = 0, start: int = 0
    ) -> Generator[Batch, None, None]:
        """An endless stream of shuffled batches of exactly batch_size rows, after `start` rows.

        ValueError: a pass without rows, or a chunk that is not as it should be.
        """
        for name, value, least in (("batch_size", batch_size, 1), ("start", start, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        return self._batches(batch_size, seed, start)

    def _batches(self, batch_size: int, seed: int, start: int) -> Generator[Batch, None, None]:
        pieces: list[Batch] = []
        missing, dropped = batch_size, 0
        for piece in self._shuffled(seed):
            drop = min(start - dropped, len(piece.x))
            dropped += drop
            rest = _rows(piece, slice(drop, None))
            while len(rest.x) >= missing:
                pieces.append(_rows(rest, slice(missing)))
                yield _concatenated(pieces)
                rest, pieces, missing = _rows(rest, slice(missing, None)), [], batch_size
            if len(rest.x):
                pieces.append(rest)
                missing -= len(rest.x)

    def _shuffled(self, seed: int) -> Iterator[Batch]:
        """Pieces of the shuffled stream, each of at most a buffer."""
        fillings = 0
        while True:
            kept: list[Batch] = []
            n_kept = n_pass = 0
            for piece in self._pass():
                n_pass += len(piece.x)
                while len(piece.x):
                    taken = _rows(piece, slice(self.buffer_rows - n_kept))
                    kept.append(taken)
                    n_kept += len(taken.x)
                    piece = _rows(piece, slice(len(taken.x), None))
                    if n_kept == self.buffer_rows:
                        buffer = _permuted(_concatenated(kept), seed, fillings)
                        fillings += 1
                        half = self.buffer_rows // 2
                        yield _rows(buffer, slice(half))
                        kept, n_kept = [_rows(buffer, slice(half, None))], self.buffer_rows - half
            if not n_pass:
                raise ValueError(f"{self.name}: expected rows in a pass over it, got none")
            yield _permuted(_concatenated(kept), seed, fillings)
            fillings += 1

    def _pass(self) -> Iterator[Batch]:
        for number, chunk in enumerate(self._chunks()):
            yield Batch(*_chunk(self.name, number, chunk, self.d_in, self._d_target))

    def _chunks(self) -> Iterator[Any]:
        chunks = iter(self.chunks)
        if chunks is self.chunks:
            raise TypeError(
                f"{self.name}: expected an iterable that starts anew each time it is passed over, "
                f"got a {type(chunks).__name__}: give an object whose __iter__ makes it"
            )
        return chunks


def _chunk(
    name: str, number: int, chunk: Any, d_in: int | None, d_target: int | None
) -> tuple[Tensor, Tensor | None]:
    """x and target of a chunk, checked, in float32."""
    label = f"{name}: chunk {number}"
    x, target = chunk if isinstance(chunk, tuple | list) and len(chunk) == 2 else (chunk, None)
    if d_in is not None and (target is None) != (d_target is None):
        raise ValueError(f"{label}: expected all chunks with a target or none")
    rows = [_matrix(f"{label}: x", x, d_in)]
    if target is not None:
        rows.append(_matrix(f"{label}: target", target, d_target))
        if len(rows[0]) != len(rows[1]):
            raise ValueError(
                f"{label}: expected a target for each of {len(rows[0])} rows, got {len(rows[1])}"
            )
    return rows[0], rows[1] if target is not None else None


def _matrix(label: str, rows: Any, width: int | None) -> Tensor:
    if isinstance(rows, np.ndarray):
        rows = torch.from_numpy(np.ascontiguousarray(rows))
    if not isinstance(rows, Tensor):
        raise TypeError(f"{label}: expected a tensor or an array, got {type(rows).__name__}")
    if rows.ndim == 2 and not len(rows) and rows.shape[1] == width:
        return rows.float()
    try:
        source = open_source(rows)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {str(error).removeprefix('tensor: ')}") from None
    if width is not None and source.d_in != width:
        raise ValueError(f"{label}: expected width {width}, got {source.d_in}")
    try:
        return source.rows(np.arange(source.n_rows))
    except ValueError as error:
        raise ValueError(f"{label}: {str(error).removeprefix('tensor: ')}") from None


def _rows(batch: Batch, rows: slice | Tensor) -> Batch:
    return Batch(batch.x[rows], None if batch.target is None else batch.target[rows])


def _concatenated(pieces: list[Batch]) -> Batch:
    targets = [piece.target for piece in pieces if piece.target is not None]
    return Batch(torch.cat([piece.x for piece in pieces]), torch.cat(targets) if targets else None)


def _permuted(batch: Batch, seed: int, filling: int) -> Batch:
    order = torch.from_numpy(permutation(len(batch.x), seed, _PURPOSE, filling))
    return _rows(batch, order.to(batch.x.device))

"""Activations from any iterable: chunks of rows that are seen once a pass and in one order.

What ``fastsae.data.Source`` is to rows that can be read by number. Shuffling is that of a buffer:
it is filled with rows in the order they come, permuted, and handed out until half of it is left;
then it is filled up and permuted anew. At the end of a pass over the iterable all of it is handed
out, so each pass is exact: every row once. The order is a function of the seed and of the rows'
order, and the count of rows handed out is the whole state, as long as the iterable gives the same
chunks again: to go on, the rows before that are read once more and dropped. Of chunks that have
numbers, only those that still wait in the buffer are read again.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fastsae.batches import Batch
from fastsae.buffer import Buffer, joined, rows_of
from fastsae.data import open_source
from fastsae.order import RowIndex


@runtime_checkable
class NumberedChunks(Protocol):
    """An iterable of chunks that can also be asked for one by its number."""

    @property
    def sizes(self) -> Sequence[int]:
        """How many rows each chunk has."""

    def __getitem__(self, number: int, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


class IterableSource:
    """Chunks x [n, d_in], or pairs (x, target [n, d_out]), of tensors or NumPy arrays.

    chunks: each ``iter(chunks)`` is one pass: a list, a DataLoader, an object whose ``__iter__`` is
    a generator, ``NumberedChunks``. buffer_rows: rows that are shuffled among each other and kept
    in memory, float32.

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

    @property
    def buffer_bytes(self) -> int:
        """The most memory that shuffling takes: the buffer, and its copies while it is permuted."""
        return 3 * 4 * self.buffer_rows * (self.d_in + (self._d_target or 0))

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
        missing = batch_size
        buffer, number, drop = Buffer(self.buffer_rows, seed), 0, start
        if isinstance(self.chunks, NumberedChunks):
            buffer, number, drop = self._gone_to(start, buffer, self.chunks)
        for piece in self._shuffled(buffer, number):
            dropped = min(drop, len(piece.x))
            drop -= dropped
            rest = rows_of(piece, slice(dropped, None))
            while len(rest.x) >= missing:
                pieces.append(rows_of(rest, slice(missing)))
                yield joined(pieces)
                rest, pieces, missing = rows_of(rest, slice(missing, None)), [], batch_size
            if len(rest.x):
                pieces.append(rest)
                missing -= len(rest.x)

    def _shuffled(self, buffer: Buffer, number: int) -> Iterator[Batch]:
        """Pieces of the stream, from a buffer on that chunk `number` of a pass comes into next."""
        while True:
            n_pass = buffer.n_kept
            for piece in self._pass(number):
                n_pass += len(piece.x)
                yield from buffer.take(piece)
            if not n_pass:
                raise ValueError(f"{self.name}: expected rows in a pass over it, got none")
            yield buffer.rest()
            number = 0

    def _gone_to(
        self, start: int, buffer: Buffer, chunks: NumberedChunks
    ) -> tuple[Buffer, int, int]:
        """The buffer at the last chunk before `start` rows were handed out, the number of the chunk
        that comes next, and how many rows are missing to `start`.

        Found with the rows' numbers in their place, so that no chunk is read but those needed."""
        starts = np.cumsum([0, *chunks.sizes])
        handed = 0
        while starts[-1]:
            for number, size in enumerate(chunks.sizes):
                before, then = replace(buffer, kept=list(buffer.kept)), handed
                numbers = torch.arange(size)[:, None] + int(starts[number])
                handed += sum(len(piece.x) for piece in buffer.take(Batch(numbers, None)))
                if handed > start:
                    return self._filled(before, starts), number, start - then
            if handed + buffer.n_kept > start:
                return self._filled(buffer, starts), len(chunks.sizes), start - handed
            handed += len(buffer.rest().x)
        return buffer, 0, 0

    def _filled(self, buffer: Buffer, starts: RowIndex) -> Buffer:
        """The buffer with rows in the place of their numbers."""
        if not buffer.n_kept:
            return replace(buffer, kept=[])
        wanted = joined(buffer.kept).x[:, 0].numpy()
        chunk_of = np.searchsorted(starts, wanted, side="right") - 1
        kept = Batch(
            torch.empty(len(wanted), self.d_in),
            None if self._d_target is None else torch.empty(len(wanted), self._d_target),
        )
        for number in np.unique(chunk_of).tolist():
            places = np.flatnonzero(chunk_of == number)
            rows = rows_of(
                self._numbered(number), torch.from_numpy(wanted[places] - starts[number])
            )
            for whole, part in zip(kept[:2], rows[:2], strict=True):
                if whole is not None and part is not None:
                    whole[torch.from_numpy(places)] = part.to(whole.device)
        return replace(buffer, kept=[kept])

    def _pass(self, first: int) -> Iterator[Batch]:
        """The chunks of a pass from one on."""
        if isinstance(self.chunks, NumberedChunks):
            yield from map(self._numbered, range(first, len(self.chunks.sizes)))
            return
        for number, chunk in enumerate(self._chunks()):
            yield Batch(*_chunk(self.name, number, chunk, self.d_in, self._d_target))

    def _numbered(self, number: int) -> Batch:
        assert isinstance(self.chunks, NumberedChunks)
        chunk = self.chunks[number]
        found = Batch(*_chunk(self.name, number, chunk, self.d_in, self._d_target))
        if len(found.x) != self.chunks.sizes[number]:
            raise ValueError(
                f"{self.name}: chunk {number}: expected {self.chunks.sizes[number]} rows, "
                f"got {len(found.x)}"
            )
        return found

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

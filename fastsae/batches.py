"""Shuffled batches of a source, read ahead in a thread where they lie in files."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsae.order import Order, Pool, RowIndex, in_range

if TYPE_CHECKING:
    from fastsae.data import Source

_AHEAD = 2  # batches of a file that are read and wait, or are being read


class Batch(NamedTuple):
    """Inputs ``x`` float32 [N, d_in] and what is paired with them, row for row.

    ``target`` float32 [N, d_out] is a transcoder's; ``gradient`` float32 [N, d_in] is ∂L/∂x of the
    language model that ``x`` comes from (``fastsae.harvest`` says of which loss).
    """

    x: Tensor
    target: Tensor | None
    gradient: Tensor | None = None


class Batches(Iterator[Batch]):
    """An endless stream of shuffled batches, each of exactly ``batch_size`` rows.

    The stream is that of `Order`, epoch after epoch, cut every ``batch_size`` rows; a batch may
    span any number of epochs: no row is dropped or repeated. ``rows_seen`` is the position:
    ``Batches(source, batch_size, seed, start=rows_seen)`` goes on with the very next row, and
    also may go on with another batch size. A batch that raises leaves the position as it was.

    From the second batch on, what lies in files is read ahead in a thread: ``_AHEAD`` batches are
    held in memory beside the one handed out. The thread ends with ``close`` or with this object.

    part: (i, n) for the i-th of n equal parts of each batch, in its order; others take the others.
    block: that of `Order`. Above 1, two pools of what lies in files are held in memory, each read
    block by block, all of them whatever ``part`` is.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
        block: int = 1,
    ) -> None:
        if source.n_rows == 0:
            raise ValueError(f"{source.name}: expected at least one row to draw from, got none")
        self.source = source
        self.batch_size = in_range("batch_size", batch_size, 1)
        self.rows_seen = in_range("start", start, 0)
        i, n = part
        if batch_size % n:
            raise ValueError(f"batch_size: expected a multiple of {n} parts, got {batch_size}")
        own = i * batch_size // n, (i + 1) * batch_size // n
        order = Order(source.n_rows, seed, block)
        reader = _Reader if block == 1 or not source.in_files else _PoolReader
        self._reader = reader(source, self.batch_size, order, own)
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[tuple[RowIndex, Batch]]] = deque()  # from rows_seen on
        self._process = 0  # that the thread is in: a fork has none
        self._begun = False

    def __next__(self) -> Batch:
        if self._begun and self.source.in_files:
            batch = self._read_ahead()
        else:
            batch = self.source.checked(*self._reader.read(self.rows_seen, ahead=False))
        self._begun = True
        self.rows_seen += self.batch_size
        return batch

    def _read_ahead(self) -> Batch:
        if self._process != os.getpid():
            self._thread = ThreadPoolExecutor(1, "fastsae-reader")
            self._process = os.getpid()
            self._ahead.clear()
        assert self._thread is not None
        while len(self._ahead) <= _AHEAD:
            position = self.rows_seen + len(self._ahead) * self.batch_size
            self._ahead.append(self._thread.submit(self._reader.read, position, True))
        try:
            batch = self.source.checked(*self._ahead[0].result())
        except Exception:
            self.close()
            raise
        self._ahead.popleft()
        return batch

    def close(self) -> None:
        """Ends the thread, if there is one; to ask for another batch starts it again."""
        if self._thread is not None and self._process == os.getpid():
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._process = None, 0
        self._ahead.clear()


class _Reader:
    """The batches of a stream by position. Knows nothing of ``Batches``, so that a thread that
    reads does not keep one alive; used by one thread at a time.

    No arithmetic of torch here: its threads would be others than those of the step."""

    def __init__(self, source: Source, batch_size: int, order: Order, own: tuple[int, int]) -> None:
        self.source, self.batch_size, self.order, self.own = source, batch_size, order, own
        self._pool = Pool(-1, np.empty(0, np.int64))
        self._soon: tuple[int, RowIndex] = (-1, np.empty(0, np.int64))  # a position, its rows

    def read(self, position: int, ahead: bool) -> tuple[RowIndex, Batch]:
        """The rows at a position, by number and as they are stored. With `ahead` what comes behind
        them is fetched meanwhile."""
        rows = self._soon[1] if self._soon[0] == position else self._asked_for(position)
        if ahead:
            following = position + self.batch_size
            self._soon = following, self._asked_for(following)
        return rows, self.source.stored(rows)

    def _asked_for(self, position: int) -> RowIndex:
        """The numbers of the rows at a position, which the system is told of."""
        rows = np.concatenate([pool.rows[some] for pool, some in self._pieces(position)])
        with contextlib.suppress(ValueError):  # what is wrong is said when they are read
            self.source.prefetch(rows)
        return rows

    def _pieces(self, position: int) -> Iterator[tuple[Pool, slice]]:
        """What this reader's part of the batch at a position consists of."""
        at, end = position + self.own[0], position + self.own[1]
        while at < end:
            if not self._pool.first <= at < self._pool.end:
                self._pool = self.order.pool(at)
            stop = min(end, self._pool.end)
            yield self._pool, slice(at - self._pool.first, stop - self._pool.first)
            at = stop


class _PoolReader(_Reader):
    """Reads a pool before its rows are wanted, in the order in which they lie in the file: the next
    one a little with each batch, so that no batch waits for a whole pool."""

    def __init__(self, source: Source, batch_size: int, order: Order, own: tuple[int, int]) -> None:
        super().__init__(source, batch_size, order, own)
        self._held: dict[int, _Held] = {}  # by where they begin: the one in use, and the next
        self._memory: Batch | None = None  # of a pool that is no longer wanted

    def read(self, position: int, ahead: bool) -> tuple[RowIndex, Batch]:
        pieces = [(self._hold(pool), some) for pool, some in self._pieces(position)]
        for held, _ in pieces:
            held.fill(len(held.rows))
        rows = np.concatenate([held.rows[some] for held, some in pieces])
        stored = Batch(
            *(
                None if parts[0] is None else _rows(parts, [h.places[some] for h, some in pieces])
                for parts in zip(*(held.stored for held, _ in pieces), strict=True)
            )  # type: ignore[arg-type]
        )
        last = self._pool
        for first in [first for first in self._held if first < last.first]:
            self._memory = self._held.pop(first).stored
        if ahead:
            following = self._held.get(last.end) or self._hold(self.order.pool(last.end))
            share = (position + self.batch_size - last.first) / len(last.rows)
            following.fill(int(len(following.rows) * min(share, 1)))
        return rows, stored

    def _hold(self, pool: Pool) -> _Held:
        if pool.first not in self._held:
            self._held[pool.first] = _Held(self.source, pool.rows, self._memory)
            self._memory = None
        return self._held[pool.first]


class _Held:
    """The rows of a pool in memory, as far as they were read, in the order of their numbers.

    memory: what to put them into, where it suffices; new memory costs more than to fill it."""

    def __init__(self, source: Source, rows: RowIndex, memory: Batch | None) -> None:
        self.source, self.rows = source, rows
        self._by_number = rows.argsort()
        self.places = self._by_number.argsort()
        """Where each row is in memory."""
        self._n_read = 0
        enough = memory is not None and len(memory.x) >= len(rows)
        self.stored = memory if memory is not None and enough else Batch(torch.empty(0), None)

    def fill(self, n: int) -> None:
        """Reads on until n rows are there."""
        start, places = self._n_read, self._by_number[self._n_read : n]
        if not len(places):
            return
        found = self.source.stored(self.rows[places])
        if not len(self.stored.x):
            new = (t if t is None else t.new_empty(len(self.rows), t.shape[1]) for t in found)
            self.stored = Batch(*new)  # type: ignore[arg-type]
        for to, t in zip(self.stored, found, strict=True):
            if to is not None and t is not None:
                _bytes(to)[start:n] = _bytes(t)
        self._n_read = n


def _rows(tensors: Sequence[Tensor], places: list[RowIndex]) -> Tensor:
    """Rows of several tensors, one after another."""
    found = [_bytes(t).take(rows, axis=0) for t, rows in zip(tensors, places, strict=True)]
    joined = found[0] if len(found) == 1 else np.concatenate(found)
    return torch.from_numpy(joined).view(tensors[0].dtype)


def _bytes(t: Tensor) -> npt.NDArray[np.uint8]:
    return t.view(torch.uint8).numpy()

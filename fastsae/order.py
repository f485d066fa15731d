"""In which order rows are drawn, apart from where they lie.

* Stable: a permutation is made of the raw stream of Philox4x64-10, keyed and counted directly, and
  of a sort of distinct integers. Both are fully specified, so the order is the same in every NumPy
  version and on every machine. (NumPy promises this for its bit generators, not for the methods of
  ``Generator``.) No global random state is read or changed.
* Exact: an epoch holds every row once.
* Resumable: the order of epoch e depends on (seed, e) alone, so the count of rows handed out is the
  whole state of a stream.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RowIndex = npt.NDArray[np.int64]

POOL_ROWS = 65536
"""Rows of a pool, about: see `Order`."""

# Second word of the Philox key: what a permutation is for, so that those of one seed have nothing
# to do with each other.
SHUFFLE, HOLDOUT, WINDOWS, EVALUATED, PROBE_SPLIT, PROBE_ROWS, WORDS = range(1, 8)
BUFFER, BLOCKS, POOL = range(8, 11)


def permutation(
    n: int, seed: int, purpose: int = SHUFFLE, epoch: int = 0, part: int = 0
) -> RowIndex:
    """A uniformly random order of range(n), int64 [n]: a pure function of its arguments.

    ``seed``, ``epoch`` and ``part`` are in [0, 2⁶⁴). The upper bits of each sort key are random and
    the lower bits are the row's number, so that all keys differ and any sort algorithm gives the
    same order. Memory: 16 bytes a row while it is made, 8 after.
    """
    seed, epoch = in_range("seed", seed, 0, 1 << 64), in_range("epoch", epoch, 0, 1 << 64)
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, epoch, part, 0], dtype=np.uint64)
    keys: npt.NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(n)
    number_bits = np.uint64((1 << n.bit_length()) - 1)
    keys &= ~number_bits
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= number_bits
    return keys.view(np.int64)


class Pool(NamedTuple):
    """A stretch of a stream of rows."""

    first: int
    """Its position in the stream."""
    rows: RowIndex
    """The numbers of its rows, in order."""

    @property
    def end(self) -> int:
        return self.first + len(self.rows)


class Order:
    """An endless stream of row numbers, epoch after epoch, as pools that follow each other.

    block 1: a pool is an epoch, one permutation of all rows. Above: blocks of so many consecutive
    rows (the last one of the data may be short) are permuted, each ``POOL_ROWS`` ÷ block of them in
    that order are a pool, and its rows are permuted among each other.
    """

    def __init__(self, n_rows: int, seed: int, block: int) -> None:
        self.n_rows, self.seed = n_rows, in_range("seed", seed, 0, 1 << 64)
        self.block = in_range("block", block, 1, POOL_ROWS + 1)
        self._epoch, self._blocks, self._ends = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def pool(self, position: int) -> Pool:
        """The pool that a position is in."""
        epoch, offset = divmod(position, self.n_rows)
        start = epoch * self.n_rows
        if self.block == 1:
            return Pool(start, permutation(self.n_rows, self.seed, SHUFFLE, epoch))
        if epoch != self._epoch:
            n_blocks = -(-self.n_rows // self.block)
            self._blocks = permutation(n_blocks, self.seed, BLOCKS, epoch)
            self._ends = np.minimum((self._blocks + 1) * self.block, self.n_rows)
            self._ends = (self._ends - self._blocks * self.block).cumsum()
            self._epoch = epoch
        together = POOL_ROWS // self.block
        part = int(np.searchsorted(self._ends, offset, side="right")) // together
        blocks = self._blocks[part * together : (part + 1) * together]
        rows = (blocks[:, None] * self.block + np.arange(self.block)).reshape(-1)
        rows = rows[rows < self.n_rows]
        first = int(self._ends[part * together - 1]) if part else 0
        order = permutation(len(rows), self.seed, POOL, epoch, part)
        return Pool(start + first, rows[order])


def in_range(name: str, value: int, low: int, end: int | None = None) -> int:
    """The value, as an int. ValueError: it is not in [low, end)."""
    if operator.index(value) < low or (end is not None and value >= end):
        limit = "" if end is None else f" and < {end}"
        raise ValueError(f"expected {name} >= {low}{limit}, got {value}")
    return int(value)

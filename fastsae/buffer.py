"""Rows in a random order that no memory of the whole is needed for: a buffer of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsae.batches import Batch
from fastsae.order import BUFFER, permutation


@dataclass
class Buffer:
    """Rows that wait, in the order in which they would be handed out."""

    size: int
    seed: int
    kept: list[Batch] = field(default_factory=list)
    n_kept: int = 0
    fillings: int = 0
    """How often it was permuted."""

    def take(self, piece: Batch) -> Iterator[Batch]:
        """Takes rows in; yields what is handed out for them."""
        while len(piece.x):
            taken = rows_of(piece, slice(self.size - self.n_kept))
            self.kept.append(taken)
            self.n_kept += len(taken.x)
            piece = rows_of(piece, slice(len(taken.x), None))
            if self.n_kept == self.size:
                buffer, half = self._permuted(), self.size // 2
                self.kept, self.n_kept = [rows_of(buffer, slice(half, None))], self.size - half
                yield rows_of(buffer, slice(half))

    def rest(self) -> Batch:
        """Hands out all that waits."""
        buffer = self._permuted()
        self.kept, self.n_kept = [], 0
        return buffer

    def _permuted(self) -> Batch:
        batch = joined(self.kept)
        order = torch.from_numpy(permutation(len(batch.x), self.seed, BUFFER, self.fillings))
        self.fillings += 1
        return rows_of(batch, order.to(batch.x.device))


def rows_of(batch: Batch, rows: slice | Tensor) -> Batch:
    """Rows of x and of target."""
    return Batch(batch.x[rows], None if batch.target is None else batch.target[rows])


def joined(pieces: list[Batch]) -> Batch:
    """The rows of all pieces, in their order."""
    targets = [piece.target for piece in pieces if piece.target is not None]
    return Batch(torch.cat([piece.x for piece in pieces]), torch.cat(targets) if targets else None)

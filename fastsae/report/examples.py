"""Rows that a latent fires on, with the text around them where the data carry tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastsae.contexts import PAD, REACH
from fastsae.data import RowIndex, Source


@dataclass(frozen=True)
class Example:
    """A row that a latent fires on."""

    row: int
    """Its number in the source it comes from."""
    value: float
    """The latent's activation."""
    before: tuple[str, ...] = ()
    token: str | None = None
    """Text of the row's own token; None where the data carries no tokens."""
    after: tuple[str, ...] = ()


def examples(source: Source, rows: RowIndex, values: Sequence[float]) -> list[Example]:
    """Rows by their numbers in the source [m], with the activations there."""
    numbers = rows.tolist()
    if source.contexts is None:
        return [Example(row, value) for row, value in zip(numbers, values, strict=True)]
    piece = source.contexts.piece
    found = []
    for row, value, ids in zip(
        numbers, values, source.token_ids(rows, REACH).tolist(), strict=True
    ):
        pieces = ["" if token == PAD else piece(token) for token in ids]
        before, after = (tuple(filter(None, p)) for p in (pieces[:REACH], pieces[REACH + 1 :]))
        found.append(Example(row, value, before, pieces[REACH], after))
    return found

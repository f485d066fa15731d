"""Rows that a latent fires on, with the text around them where the data carry tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastsae.contexts import PAD, REACH
from fastsae.data import Source
from fastsae.order import RowIndex


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
    active: tuple[tuple[int, float], ...] = ()
    """Where else in this text the latent is active, as far as known: how many tokens after the
    row's own, below 0 before it, and the activation there."""


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
        before, after = (
            tuple(piece(token) for token in some if token != PAD)
            for some in (ids[:REACH], ids[REACH + 1 :])
        )
        found.append(Example(row, value, before, piece(ids[REACH]), after))
    return found

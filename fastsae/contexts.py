"""The text around a row of activations, where the data carries tokens.

The embedded samples and the sets of ``fastsae harvest`` store which token each row belongs to.
Token ids mean something only together with a vocabulary: the samples have one, a set has none, and
its contexts read as ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Ids = npt.NDArray[np.int64]

REACH = 8  # tokens before and after a row's own
PAD = -1  # where the text, or what is known of it, ends

_SAMPLE_PAD = 65535


@dataclass(frozen=True, eq=False)
class Contexts:
    """Token ids around rows, and the text of each id."""

    ids: Callable[[Ids, int], Ids]
    """Rows by number in the data [m], reach in [0, REACH] → [m, 2·reach + 1]; the row's own token
    is in the middle, PAD stands where there is none."""
    vocabulary: Mapping[int, str] = field(default_factory=dict)
    """Texts of ids, for display: a space at the start begins a word. Empty: not known."""
    adjacent: bool = False
    """Whether tokens beside a row's own are those of the rows beside it in the data."""

    def piece(self, token: int) -> str:
        """`text_of` an id."""
        return text_of(self.vocabulary, token)


def text_of(vocabulary: Mapping[int, str], token: int) -> str:
    """The text of an id; the id itself where the vocabulary is empty or has no such id."""
    return vocabulary.get(token, f" {token}")


def vocabulary_of(tokenizer: Any) -> dict[int, str]:
    """The texts of all ids of a tokenizer, as they read behind another token.

    tokenizer: one of transformers, as in `LanguageModel`.
    """
    (first, *_) = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = tokenizer.decode([first])
    ids = range(len(tokenizer))
    return {i: tokenizer.decode([first, i]).removeprefix(before) for i in ids}


def sample_contexts(ctx: npt.NDArray[np.uint16], vocabulary: Path) -> Contexts:
    """Of an embedded sample: ctx [N, 2·REACH + 1], and its vocabulary's file."""

    def ids(rows: Ids, reach: int) -> Ids:
        found = ctx[rows, REACH - reach : REACH + reach + 1].astype(np.int64)
        return np.where(found == _SAMPLE_PAD, PAD, found)

    texts: dict[str, str] = json.loads(vocabulary.read_text(encoding="utf-8"))
    return Contexts(ids, {int(token): text for token, text in texts.items()})


class Labelled(Protocol):
    """Rows with labels: token, window and position."""

    @property
    def n_rows(self) -> int: ...

    def gather(self, name: str, numbers: Ids, /) -> Tensor:
        """The label of rows by number [m] → int32 [m]."""


def set_contexts(stored: Labelled) -> Contexts:
    """Of a harvested set, whose rows of one window lie in the order of the text."""

    def ids(rows: Ids, reach: int) -> Ids:
        offsets = np.arange(-reach, reach + 1)
        wanted = rows[:, None] + offsets
        numbers = wanted.clip(0, stored.n_rows - 1)

        def label(name: str) -> Ids:
            found = stored.gather(name, numbers.reshape(-1)).numpy().astype(np.int64)
            return found.reshape(numbers.shape)

        window, position = label("window"), label("position")
        own = slice(reach, reach + 1)
        same_text = (window == window[:, own]) & (position - position[:, own] == offsets)
        return np.where(same_text & (wanted == numbers), label("token"), PAD)

    return Contexts(ids, adjacent=True)

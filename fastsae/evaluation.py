"""Windows of text to measure an SAE on inside its language model, and which it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fastsae.activations import activations
from fastsae.files import sha256
from fastsae.models import LanguageModel, check_causal, check_window
from fastsae.order import EVALUATED, permutation
from fastsae.sites import Site, find_module
from fastsae.windows import Ids, cut_windows, window_order


@dataclass(frozen=True)
class At:
    """Where in a language model an SAE sits, and how the model is run."""

    layer: int
    """The block, counted from 1."""
    site: Site = "residual"
    """Output of the block (residual), of its MLP or of its attention."""
    batch_size: int = 4
    """Windows that the model reads at a time."""
    bf16_model: bool = False
    """Run the model's products in bfloat16 (autocast)."""

    def module(self, model: LanguageModel) -> nn.Module:
        """The module there. ValueError: none is there, or the model is not causal or trains."""
        for name in ("layer", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.site not in get_args(Site):
            expected = ", ".join(get_args(Site))
            raise ValueError(f"site: expected one of {expected}, got {self.site!r}")
        check_causal(model)
        if model.net.training:
            raise ValueError(f"{model.name}: expected a model in eval mode, got training mode")
        return find_module(model.net, self.site, self.layer)

    def batches(self, ids: Ids) -> Iterator[Ids]:
        """Windows [n, window], batch_size of them at a time."""
        for first in range(0, len(ids), self.batch_size):
            yield ids[first : first + self.batch_size]

    def activations(self, model: LanguageModel, ids: Ids) -> Iterator[Tensor]:
        """x [n, window, D] of each batch; the model runs no further than the site.

        ValueError: as `module`, and windows longer than the model can read.
        """
        check_window(model, ids.shape[1])
        modules = {"": self.module(model)}
        for batch in self.batches(ids):
            yield activations(model, modules, batch, bf16_model=self.bf16_model)[""]["x"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of text files, cut as `fastsae.harvest` cuts them."""

    ids: Ids
    """int32 [n, window]."""
    names: tuple[str, ...]
    """Of the files, without their suffix."""
    file: npt.NDArray[np.int64]
    """[n]: the place in `names` of each window's file."""
    seen: npt.NDArray[np.bool_] | None = None
    """[n]: whether the SAE's data may hold rows of it; None where that is not known."""
    special: tuple[int, int] = (0, 0)
    """How many special tokens begin and end each window."""

    @property
    def rows(self) -> npt.NDArray[np.bool_]:
        """[window]: the positions that a harvest keeps: without special tokens and position 0."""
        places = np.arange(self.ids.shape[1])
        before, after = self.special
        return (places >= max(before, 1)) & (places < self.ids.shape[1] - after)

    def sample(self, tokens: int, *, seen: bool = False) -> Windows:
        """Random windows, always the same, of at least that many positions, or all there are.

        seen: also those that the SAE's data hold. ValueError: there is none to take.
        """
        if tokens < 1:
            raise ValueError(f"tokens: expected at least 1, got {tokens}")
        order = permutation(len(self.ids), 0, EVALUATED)
        if self.seen is not None and not seen:
            order = order[~self.seen[order]]
        if not len(order):
            raise ValueError(
                "text: expected windows that the SAE's data do not hold, got none; give other "
                "files, or take windows that they hold with --seen"
            )
        chosen = np.sort(order[: -(-tokens // self.ids.shape[1])])
        of_them = None if self.seen is None else self.seen[chosen]
        return replace(self, ids=self.ids[chosen], file=self.file[chosen], seen=of_them)


def read_windows(
    tokenizer: Any, text: Sequence[Path], window: int, index: Mapping[str, Any] | None = None
) -> Windows:
    """All windows of .txt and .jsonl files; `index` is that of the set the SAE was trained on.

    Which windows the harvest took is known where all of its files are given, in its order and with
    its window; other files may stand between them. Otherwise all of a file that it read count as
    seen. ValueError: a file is not readable or has no document that is long enough.
    """
    if not text:
        raise ValueError("text: expected at least one file, got none")
    cut = [cut_windows(tokenizer, [path], window) for path in text]
    ids, special = np.concatenate([of_file for of_file, _ in cut]), cut[0][1]
    file = np.repeat(np.arange(len(text)), [len(of_file) for of_file, _ in cut])
    seen = None if index is None else _seen(index, [sha256(path) for path in text], file, window)
    return Windows(ids, tuple(path.stem for path in text), file, seen, special)


def _seen(
    index: Mapping[str, Any], digests: list[str], file: npt.NDArray[np.int64], window: int
) -> npt.NDArray[np.bool_]:
    theirs = [entry["sha256"] for entry in index["text"]]
    known = [i for i, digest in enumerate(digests) if digest in theirs]
    seen = np.isin(file, known)
    if [digests[i] for i in known] == theirs and window == index["window"]:
        numbers = np.flatnonzero(seen)  # as the harvest numbered them
        a_window = window - len(index["dropped_positions"])
        taken = window_order(len(numbers), index["seed"])[: -(-index["rows"] // a_window)]
        seen[:] = False
        seen[numbers[taken]] = True
    return seen

"""What a trained SAE does on rows of activations: firing counts, L0, cosines, latents up close.

Two passes over the rows. The first counts, and the counts decide which latents are looked at; the
second keeps where these fire. Memory: a few numbers a latent and a row, the codes of one batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsae.corpus import MAX_BATCH_PAIRS, batches_of_codes
from fastsae.data import Source
from fastsae.latent_index import TopContexts
from fastsae.order import RowIndex, permutation
from fastsae.report.examples import Example, examples
from fastsae.sae import SAE

Floats = npt.NDArray[np.float64]
Text = Literal["words", "ids", "none"]

MAX_ROWS = 1 << 15
GROUPS = (("most frequent", 6), ("rarest that fire", 6), ("random", 8))
CONTEXTS = 6  # a latent
_TOKENS = 4  # a latent, those it fires on most
_BATCH_PAIRS = MAX_BATCH_PAIRS
_COSINE_PAIRS = 1 << 26  # queries × latents
_MIN_QUERIES = 256


@dataclass(frozen=True)
class Latent:
    """A latent up close."""

    latent: int
    group: str
    """Why it was chosen: a name of GROUPS."""
    count: int
    """Rows it fires on."""
    examples: tuple[Example, ...]
    """The rows with the largest |value|, in that order."""
    tokens: tuple[tuple[str, float], ...]
    """The tokens it fires on most, each with its share of the count."""


@dataclass(frozen=True)
class Portrait:
    """What `portray` found."""

    rows: tuple[int, ...]
    """Rows looked at, of each source."""
    counts: npt.NDArray[np.int64]
    """(F): on how many of the rows each latent fires."""
    l0: npt.NDArray[np.int64]
    """(rows): how many latents fire on each."""
    cosines: Floats
    """Of the decoder rows of some latents (all, where there are few): see `nearest_cosines`."""
    latents: tuple[Latent, ...]
    text: Text
    """What examples show: words, token ids without a vocabulary, or rows without tokens."""

    @property
    def n_rows(self) -> int:
        return sum(self.rows)


@torch.no_grad()
def portray(sae: SAE, sources: Sequence[Source], max_rows: int = MAX_ROWS) -> Portrait:
    """Looks at the first max_rows rows of the sources, one source after the other.

    In the selection rule's form of inference. ValueError: no rows, or rows of another width.
    """
    rows: list[int] = []
    for source in sources:
        if source.d_in != sae.config.d_in:
            raise ValueError(f"{source.name}: expected width {sae.config.d_in}, got {source.d_in}")
        rows.append(min(source.n_rows, max_rows - sum(rows)))
    if sum(rows) == 0:
        raise ValueError("expected at least one row to look at, got none")
    views = [source.select(np.arange(n)) for source, n in zip(sources, rows, strict=True)]

    was_training = sae.training
    sae.eval()
    try:
        counts = np.zeros(sae.config.d_sae, np.int64)
        l0 = []
        for codes in batches_of_codes(sae, views, _BATCH_PAIRS):
            counts += codes.firing_counts().cpu().numpy()
            l0.append(codes.l0().cpu().numpy())
        latents = _look_at(sae, views, counts)
    finally:
        sae.train(was_training)
    cosines = nearest_cosines(sae.W_dec)
    known = [source.contexts for source in sources if source.contexts is not None]
    text: Text = "none" if not known else "words" if known[0].vocabulary else "ids"
    return Portrait(tuple(rows), counts, np.concatenate(l0), cosines, latents, text)


def choose(counts: npt.NDArray[np.int64]) -> list[tuple[int, str]]:
    """(latent, group) of the latents to look at, each once; equal counts by id, none that is 0."""
    alive = np.flatnonzero(counts)
    by_count = alive[np.argsort(-counts[alive], kind="stable")]
    rarest = alive[np.argsort(counts[alive], kind="stable")]
    random = alive[permutation(len(alive), seed=0)]
    chosen: dict[int, str] = {}
    for (group, size), order in zip(GROUPS, (by_count, rarest, random), strict=True):
        new = [latent for latent in order[: size + len(chosen)].tolist() if latent not in chosen]
        chosen.update((latent, group) for latent in new[:size])
    return list(chosen.items())


@torch.no_grad()
def nearest_cosines(W_dec: Tensor, max_pairs: int = _COSINE_PAIRS) -> Floats:
    """The cosine of decoder rows with their nearest other row; W_dec (F, D), float64 (queries).

    All F rows are neighbours, in blocks: no F×F matrix exists. Queries are all rows where F² is at
    most max_pairs, else max_pairs / F rows at random, in the order of their ids. Empty where F = 1.
    """
    n = len(W_dec)
    if n < 2:
        return np.empty(0)
    queries = torch.arange(n)
    if n * n > max_pairs:
        size = min(n, max(_MIN_QUERIES, max_pairs // n))
        queries = torch.from_numpy(np.sort(permutation(n, seed=0)[:size]))

    def unit(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows.float(), dim=1)

    best = []
    for ids in queries.to(W_dec.device).split(1024):
        directions = unit(W_dec[ids])
        nearest = directions.new_full((len(ids),), -torch.inf)
        for first in range(0, n, 8192):
            cosines = directions @ unit(W_dec[first : first + 8192]).T
            own = (ids >= first) & (ids < first + cosines.shape[1])
            cosines[own.nonzero()[:, 0], ids[own] - first] = -torch.inf
            nearest = torch.maximum(nearest, cosines.amax(1))
        best.append(nearest.double().clamp(-1, 1).cpu().numpy())
    return np.concatenate(best)


def _look_at(
    sae: SAE, sources: Sequence[Source], counts: npt.NDArray[np.int64]
) -> tuple[Latent, ...]:
    chosen = choose(counts)
    place = torch.full((sae.config.d_sae + 1,), -1, dtype=torch.int64)  # the last one: of padding
    place[[latent for latent, _ in chosen]] = torch.arange(len(chosen))
    place = place.to(sae.W_dec.device)
    found, first = [], 0
    for codes in batches_of_codes(sae, sources, _BATCH_PAIRS):
        at = place[codes.idx.reshape(-1).long()]
        hit = ((at >= 0) & (codes.vals.reshape(-1) != 0)).nonzero()[:, 0]
        pairs = (at[hit], codes.token_ids()[hit] + first, codes.vals.reshape(-1)[hit].float())
        found.append([t.cpu().numpy() for t in pairs])
        first += codes.n_tokens
    places, rows, values = (np.concatenate(column) for column in zip(*found, strict=True))
    tops = TopContexts(len(chosen), CONTEXTS)
    tops.update(places, rows, values)
    starts = np.cumsum([0] + [source.n_rows for source in sources])
    latents = []
    for i, (latent, group) in enumerate(chosen):
        top = zip(tops.rows[i].tolist(), tops.values[i].tolist(), strict=True)
        examples = [_example(sources, starts, row, value) for row, value in top if row >= 0]
        tokens = _tokens(sources, starts, rows[places == i])
        latents.append(Latent(latent, group, int(counts[latent]), tuple(examples), tokens))
    return tuple(latents)


def _example(sources: Sequence[Source], starts: RowIndex, row: int, value: float) -> Example:
    number = int(np.searchsorted(starts, row, side="right")) - 1
    (found,) = examples(sources[number], np.array([row - int(starts[number])]), [value])
    return found


def _tokens(
    sources: Sequence[Source], starts: RowIndex, rows: RowIndex
) -> tuple[tuple[str, float], ...]:
    """The tokens that these rows have most often; equally frequent ones by id."""
    totals: Counter[tuple[int, str]] = Counter()
    for source, start, end in zip(sources, starts, starts[1:], strict=False):
        here = rows[(rows >= start) & (rows < end)] - start
        if source.contexts is None or not len(here):
            continue
        ids, numbers = np.unique(source.token_ids(here, 0), return_counts=True)
        for token, number in zip(ids.tolist(), numbers.tolist(), strict=True):
            totals[token, source.contexts.piece(token)] += number
    most = sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:_TOKENS]
    return tuple((piece, number / len(rows)) for (_, piece), number in most)

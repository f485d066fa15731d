"""What is to be shown of each latent, latent by latent, in a bounded memory.

CodeSet (counts, deciles, top rows) ─┐
SAE (nearest decoder rows)  ─────────┼─▶ Facts, `_CHUNK` latents at a time
a model's unembedding (effects)  ────┘
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastsae.contexts import REACH, text_of
from fastsae.corpus import CodeSet
from fastsae.data import Source
from fastsae.logits import Effects, logit_effects
from fastsae.matching import nearest_others
from fastsae.report.examples import Example, examples
from fastsae.sae import SAE
from fastsae.sums import unit_rows

NEAREST, EFFECTS, TOKENS = 8, 10, 4  # of a latent, at most
_CHUNK = 4096  # latents whose neighbours and effects are found together

Effect = tuple[int, str, float]
"""Id and text of a token, and the effect on it."""


@dataclass(frozen=True)
class Facts:
    """A latent; sizes are |activation|, for rules that keep negative ones."""

    latent: int
    count: int
    """Rows on which it is active."""
    density: float
    """The share of all rows that these are."""
    mean: float
    """The mean size where it is active."""
    largest: float
    """The activation of the largest size; 0 if it is never active."""
    deciles: tuple[float, ...]
    """The nine of the sizes where it is active: of `LatentIndex`, within 1/8."""
    tokens: tuple[tuple[str, int], ...]
    """The most frequent tokens of the rows that the set keeps of it, and on how many they are."""
    contexts: tuple[Example, ...]
    """The rows with the largest sizes, in that order."""
    nearest: tuple[tuple[int, float], ...]
    """Other latents by the cosine of their decoder rows, the largest that are above 0."""
    promoted: tuple[Effect, ...]
    """Tokens with the largest direct logit effects of its decoder row; () without a model."""
    suppressed: tuple[Effect, ...]
    """Those with the most negative ones."""


def facts(
    sae: SAE,
    codes: CodeSet,
    source: Source,
    unembedding: Tensor | None = None,
    words: Mapping[int, str] = MappingProxyType({}),
    *,
    contexts: int = 10,
) -> Iterator[Facts]:
    """All latents in the order of their ids.

    codes: of this SAE and these rows (`CodeSet.check`). unembedding: `folded_unembedding` of the
    model that reads the directions, words: the texts of its ids. contexts: rows shown of a latent,
    of those the set keeps.
    """
    means, units = codes.means(), unit_rows(sae.W_dec, "W_dec")
    for first in range(0, codes.n_latents, _CHUNK):
        ids = np.arange(first, min(first + _CHUNK, codes.n_latents))
        found, nearest = nearest_others(units, ids, NEAREST)
        cosines = found.astype(np.float32)
        shown, tokens = _of_rows(codes, source, ids, contexts)
        both: tuple[Effects, Effects] | None = None
        if unembedding is not None:
            both = logit_effects(unembedding, sae.W_dec[first : first + len(ids)], EFFECTS)
        counts, quantiles = codes.counts[ids].tolist(), exact(codes.quantiles[ids].numpy())
        largest, mean = (exact(t[ids].float().numpy()) for t in (codes.values[:, 0], means))
        for i, latent in enumerate(ids.tolist()):
            pairs = zip(nearest[i].tolist(), exact(cosines[i]), strict=True)
            yield Facts(
                latent=latent,
                count=counts[i],
                density=counts[i] / codes.n_rows,
                mean=mean[i],
                largest=largest[i],
                deciles=tuple(quantiles[i]),
                tokens=tokens[i],
                contexts=shown[i],
                nearest=tuple((other, cosine) for other, cosine in pairs if cosine > 0),
                promoted=_effects(both[0], i, words) if both else (),
                suppressed=_effects(both[1], i, words) if both else (),
            )


def exact(values: npt.NDArray[np.float32]) -> list:
    """Floats, in lists as deep as the array, of few digits that read back as the same float32."""
    if values.ndim > 1:
        return [exact(row) for row in values]
    return [float(str(value)) for value in values]


def _of_rows(
    codes: CodeSet, source: Source, ids: npt.NDArray[np.int64], n_shown: int
) -> tuple[list[tuple[Example, ...]], list[tuple[tuple[str, int], ...]]]:
    """(rows with their text, most frequent tokens) of each of these latents."""
    rows, values = codes.rows[ids].numpy(), codes.values[ids].numpy()
    kept = rows >= 0
    some = kept.copy()
    some[:, n_shown:] = False
    listed = examples(source, rows[some], exact(values[some]))
    if source.contexts is not None and source.contexts.adjacent and source.index is None:
        listed = _with_neighbours(codes, listed, ids.repeat(some.sum(1)))
    found = iter(listed)
    shown = [tuple(next(found) for _ in range(n)) for n in some.sum(1).tolist()]
    if source.contexts is None:
        return shown, [()] * len(ids)
    own = iter(source.token_ids(rows[kept], 0)[:, 0].tolist())
    tokens = []
    for n in kept.sum(1).tolist():
        # Equally frequent ones in the order of their largest activations.
        most = Counter(next(own) for _ in range(n)).most_common(TOKENS)
        tokens.append(tuple((source.contexts.piece(token), number) for token, number in most))
    return shown, tokens


def _with_neighbours(
    codes: CodeSet, listed: Sequence[Example], latents: npt.NDArray[np.int64]
) -> list[Example]:
    """Examples of latents [m], with what these do on the tokens around."""
    places = np.array([*range(-REACH, 0), *range(1, REACH + 1)])
    rows = np.array([example.row for example in listed], np.int64)[:, None] + places
    values = codes.at(rows.reshape(-1), latents.repeat(len(places))).reshape(rows.shape)
    found = []
    for example, here in zip(listed, values, strict=True):
        there = here.nonzero()[0]
        active = zip(places[there].tolist(), exact(here[there]), strict=True)
        n_before, n_after = len(example.before), len(example.after)
        kept = tuple((at, value) for at, value in active if -n_before <= at <= n_after)
        found.append(replace(example, active=kept) if kept else example)
    return found


def _effects(found: Effects, i: int, words: Mapping[int, str]) -> tuple[Effect, ...]:
    pairs = zip(found.ids[i].tolist(), exact(found.values[i].numpy()), strict=True)
    return tuple((token, text_of(words, token), value) for token, value in pairs if token >= 0)

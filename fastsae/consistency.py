"""How much of a dictionary two trainings have in common.

    MCC(A, B) = the mean cosine of the rows of A and B, matched one to one for the largest mean
    PW-MCC    = the mean of MCC over all pairs of several runs' decoders (Song et al. 2025)
    GT-MCC    = MCC of the true directions with a run's decoder, where these are known
    shared    = latents whose decoder and encoder rows have the same partner, both at a cosine
                above 0.7 (Paulo and Belrose 2025)

Cosines are signed, rows of zeros have cosine 0; `fastsae.matching` says how partners are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from fastsae.data import Source
from fastsae.matching import Matching, cosine_histogram, match
from fastsae.sae import SAE

SHARED_ABOVE = 0.7


@dataclass(frozen=True, eq=False)
class Pair:
    """Two runs, by their places in the list, and what their dictionaries have in common."""

    first: int
    second: int
    decoder: Matching
    encoder: Matching | None = None

    @property
    def agreement(self) -> float:
        """The share of latents whose decoder and encoder rows have the same partner."""
        return float(np.mean(self._same))

    def shared(self, above: float = SHARED_ABOVE) -> float:
        """The share of latents for which that holds with both cosines above a threshold."""
        assert self.encoder is not None
        close = (self.decoder.cosines > above) & (self.encoder.cosines > above)
        return float(np.mean(self._same & close))

    @property
    def _same(self) -> Any:
        if self.encoder is None:
            raise ValueError("expected a pair with a matching of encoders, got one without")
        return self.decoder.partners == self.encoder.partners


@dataclass(frozen=True, eq=False)
class Comparison:
    """All pairs of several runs."""

    pairs: tuple[Pair, ...]

    @property
    def pw_mcc(self) -> float:
        """The mean of the pairs' MCC (their decoders')."""
        return float(np.mean([pair.decoder.mean for pair in self.pairs]))

    @property
    def deviation(self) -> float:
        """The standard deviation of the pairs' MCC, with the number of pairs as divisor."""
        return float(np.std([pair.decoder.mean for pair in self.pairs]))

    @property
    def gap(self) -> float:
        """By how much `pw_mcc` may be too low, at most; 0 where the matchings are exact."""
        return float(np.mean([pair.decoder.gap for pair in self.pairs]))


def pw_mcc(decoders: Sequence[Tensor], **options: Any) -> Comparison:
    """The pairs of several decoders (F, D), all of one shape; options are those of `match`."""
    return _compare([(W_dec,) for W_dec in decoders], options)


def compare(saes: Sequence[SAE], **options: Any) -> Comparison:
    """As `pw_mcc`, with the encoders matched, too."""
    return _compare([(sae.W_dec, sae.W_enc) for sae in saes], options)


def gt_mcc(truth: Tensor, W_dec: Tensor, **options: Any) -> Matching:
    """True directions (M, D) matched with rows of W_dec (F, D), M ≤ F; GT-MCC is its `mean`.

    With M < F it asks whether each true direction has a latent of its own.
    """
    return match(truth, W_dec, **options)


def _compare(weights: Sequence[tuple[Tensor, ...]], options: dict[str, Any]) -> Comparison:
    if len(weights) < 2:
        raise ValueError(f"expected at least two runs to compare, got {len(weights)}")
    for tensors in weights:
        got, expected = tuple(tensors[0].shape), tuple(weights[0][0].shape)
        if got != expected:
            raise ValueError(f"expected runs of one shape, {expected}, got {got}")
    pairs = []
    for i, j in combinations(range(len(weights)), 2):
        found = [match(a, b, **options) for a, b in zip(weights[i], weights[j], strict=True)]
        pairs.append(Pair(i, j, *found))
    return Comparison(tuple(pairs))


def figures(saes: Sequence[SAE], truth: Source | None, **options: Any) -> dict[str, Any]:
    """What `fastsae compare` prints and writes, as plain data: of one SAE the truth is needed.

    truth: rows (M, D). A pair's histogram is `cosine_histogram` of its decoders' partners.
    """
    found: dict[str, Any] = {}
    if len(saes) > 1 or truth is None:
        compared = compare(saes, **options)
        found |= {"pw_mcc": compared.pw_mcc, "deviation": compared.deviation, "gap": compared.gap}
        found["pairs"] = [_pair_figures(pair) for pair in compared.pairs]
    if truth is not None:
        rows = truth.rows(np.arange(truth.n_rows))
        found["gt_mcc"] = [gt_mcc(rows, sae.W_dec, **options).mean for sae in saes]
    return found


def _pair_figures(pair: Pair) -> dict[str, Any]:
    assert pair.encoder is not None
    return {
        "runs": [pair.first, pair.second],
        "mcc": pair.decoder.mean,
        "gap": pair.decoder.gap,
        "nearest": float(pair.decoder.nearest.mean()),
        "encoder_mcc": pair.encoder.mean,
        "agreement": pair.agreement,
        "shared": pair.shared(),
        "histogram": cosine_histogram(pair.decoder.cosines),
    }


def table(figures: dict[str, Any]) -> str:
    """The same as text."""
    lines = []
    if "pairs" in figures:
        names = ("mcc", "gap", "nearest", "encoder_mcc", "agreement", "shared")
        lines.append("runs   " + "".join(f"{name:>13}" for name in names))
        for pair in figures["pairs"]:
            cells = "".join(f"{pair[name]:13.4f}" for name in names)
            lines.append(f"{pair['runs'][0]}, {pair['runs'][1]}   {cells}")
        lines.append(f"PW-MCC {figures['pw_mcc']:.4f} ± {figures['deviation']:.4f}")
    for i, value in enumerate(figures.get("gt_mcc", [])):
        lines.append(f"GT-MCC {value:.4f} of run {i}")
    return "\n".join(lines)

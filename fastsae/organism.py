"""Data whose true features are known: a model organism for dictionary learning.

    x = Σ_{i∈S} a_i d_i,  S: k of m unit directions d_i at random,  a_i = |N(0, 1)|

The defaults are those of Song et al. 2025: 32 directions in 16 dimensions, 3 active, 50,000 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.sums import unit_rows


@dataclass(frozen=True)
class Organism:
    """What the data are made of. ValueError: sizes that do not fit."""

    n_features: int = 32
    """True directions, m."""
    d: int = 16
    """Width of the data."""
    k: int = 3
    """Active directions a row."""
    seed: int = 0
    """Of the directions."""

    def __post_init__(self) -> None:
        if self.d < 1 or not 1 <= self.k <= self.n_features:
            raise ValueError(
                f"expected d >= 1 and k in [1, {self.n_features}], got {self.d} and {self.k}"
            )

    @property
    def features(self) -> Tensor:
        """The true directions: float32 (m, d), unit rows."""
        generator = torch.Generator().manual_seed(self.seed)
        return unit_rows(torch.randn(self.n_features, self.d, generator=generator))

    def sample(self, n_rows: int = 50_000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Rows x (n, d), float32, and the coefficients that made them (n, m); seed: of the rows."""
        generator = torch.Generator().manual_seed(seed + (1 << 32))  # not that of the directions
        order = torch.rand(n_rows, self.n_features, generator=generator).argsort(1)
        size = torch.randn(n_rows, self.n_features, generator=generator).abs()
        coefficients = size.where(order < self.k, 0)
        return coefficients @ self.features, coefficients

"""What the codes of a corpus say of each latent, gathered as they come, in a bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsae.codes import Codes

Ids = npt.NDArray[np.int64]

QUANTILES = tuple(i / 10 for i in range(1, 10))

_PER_OCTAVE, _LEAST_EXPONENT, _BUCKETS = 8, -16, 256


class TopContexts:
    """The rows with each latent's largest |value|: of equal ones the first, in that order."""

    def __init__(self, n_latents: int, per_latent: int) -> None:
        self.rows = np.full((n_latents, per_latent), -1, np.int64)
        """(F, m): row numbers; -1 pads."""
        self.values = np.zeros((n_latents, per_latent), np.float32)
        """(F, m): the values there; 0 pads."""

    def update(self, latents: Ids, rows: Ids, values: npt.NDArray[np.float32]) -> None:
        """Adds pairs: latents, rows (above those before, ascending) and values [n]."""
        m = self.rows.shape[1]
        large = np.abs(values) > np.abs(self.values[latents, -1])
        latents, rows, values = latents[large], rows[large], values[large]
        touched, place = np.unique(latents, return_inverse=True)
        place = np.concatenate([np.arange(len(touched)).repeat(m), place])
        rows = np.concatenate([self.rows[touched].reshape(-1), rows])
        values = np.concatenate([self.values[touched].reshape(-1), values])
        order = np.lexsort((rows, -np.abs(values), place))
        ranks = (
            np.arange(len(order))
            - np.searchsorted(place[order], np.arange(len(touched)))[place[order]]
        )
        order, ranks = order[ranks < m], ranks[ranks < m]
        self.rows[touched[place[order]], ranks] = rows[order]
        self.values[touched[place[order]], ranks] = values[order]


class LatentIndex:
    """What a corpus says of each latent: counts, top contexts, quantiles of |value| where active.

    Quantiles come from a histogram of eight buckets an octave from 2⁻¹⁶ to 2¹⁶ (the first and last
    take what lies beyond): the value of rank ⌈q·count⌉, placed in its bucket as if the bucket's
    values were evenly spaced. So the relative error is below 1/8 within that range.
    """

    def __init__(self, n_latents: int, per_latent: int) -> None:
        self.top = TopContexts(n_latents, per_latent)
        self.histogram = np.zeros((n_latents, _BUCKETS), np.int32)

    @staticmethod
    def bytes_a_latent(per_latent: int) -> int:
        return 4 * _BUCKETS + 12 * per_latent

    def update(self, codes: Codes, first_row: int) -> None:
        """Adds codes without padding, of rows first_row, first_row + 1, …"""
        latents = codes.idx.numpy().astype(np.int64)
        values = codes.vals.numpy()
        self.top.update(latents, codes.token_ids().numpy() + first_row, values)
        exponents = np.abs(values).view(np.int32) >> 20  # with three bits of the fraction
        lowest = (127 + _LEAST_EXPONENT) * _PER_OCTAVE
        buckets = (exponents - lowest).clip(0, _BUCKETS - 1)
        np.add.at(self.histogram.reshape(-1), latents * _BUCKETS + buckets, 1)

    @property
    def counts(self) -> Ids:
        """(F): on how many rows each latent is active."""
        return self.histogram.sum(1, dtype=np.int64)

    def quantiles(self) -> npt.NDArray[np.float32]:
        """(F, len(QUANTILES)), 0 for latents that are never active."""
        eighths = np.arange(_BUCKETS + 1)
        edges = (1 + eighths % _PER_OCTAVE / _PER_OCTAVE) * 2.0 ** (
            eighths // _PER_OCTAVE + _LEAST_EXPONENT
        )
        counts = self.counts
        found = np.zeros((len(counts), len(QUANTILES)), np.float32)
        fired = np.flatnonzero(counts)
        for first in range(0, len(fired), 4096):
            some = fired[first : first + 4096]
            upto = self.histogram[some].cumsum(1)
            for i, q in enumerate(QUANTILES):
                rank = np.ceil(q * counts[some] - 1e-9).clip(1)[:, None]
                bucket = (upto < rank).sum(1)
                here = self.histogram[some, bucket]
                below = upto[np.arange(len(some)), bucket] - here
                share = (rank[:, 0] - below - 0.5) / here
                found[some, i] = edges[bucket] + share * (edges[bucket + 1] - edges[bucket])
        largest = np.abs(self.top.values[:, :1])
        return np.minimum(found, largest)

    def tensors(self) -> dict[str, Tensor]:
        """What latents.safetensors holds."""
        arrays = {"counts": self.counts, "quantiles": self.quantiles()}
        arrays |= {"rows": self.top.rows, "values": self.top.values}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

"""Exponential moving average of an SAE's parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae import ops
from fastsae.sae import SAE

_BLOCK_ROWS = 1 << 14  # of a parameter, so that no second copy of it is made


class EMA:
    """averages ← d·averages + (1 − d)·parameters after each step, float32 at least.

    After step t (from 1) d = min(decay, (1 + t) / (10 + t)), so that the start is soon forgotten.
    Rows of W_dec are brought back to norm 1 where the SAE's decoder has unit rows. Buffers (scales,
    thresholds of selection rules) are not averaged.
    """

    def __init__(self, sae: SAE, decay: float) -> None:
        self.sae, self.decay = sae, decay
        self.averages: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in sae.named_parameters()
        }

    @torch.no_grad()
    def restart(self) -> None:
        """The averages are the parameters as they are now."""
        for name, p in self.sae.named_parameters():
            self.averages[name].copy_(p)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters after step `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, p in self.sae.named_parameters():
            average = self.averages[name]
            if p.ndim == 0:
                average.lerp_(p.to(average.dtype), weight)
                continue
            for old, new in zip(average.split(_BLOCK_ROWS), p.split(_BLOCK_ROWS), strict=True):
                old.lerp_(new.to(average.dtype), weight)
        if self.sae.config.decoder_norm == "unit":
            ops.normalize_rows_(self.averages["W_dec"], backend=self.sae.backend)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the SAE's parameters are the averages; they must not be written to."""
        parameters = dict(self.sae.named_parameters())
        own = {name: p.data for name, p in parameters.items()}
        for name, p in parameters.items():
            p.data = self.averages[name].to(p.dtype)
        try:
            yield
        finally:
            for name, p in parameters.items():
                p.data = own[name]
